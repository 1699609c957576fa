{{/* How a container reaches the broker. `side` is server or client. */}}

{{- define "lorabbit.brokerHost" -}}
{{ include "lorabbit.name" (dict "root" . "part" "rabbitmq") }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{- define "lorabbit.brokerPort" -}}
{{- if eq .Values.rabbitmq.mode "external" -}}
{{ int .Values.rabbitmq.external.port }}
{{- else -}}
{{ ternary 5671 5672 .Values.rabbitmq.tls.enabled }}
{{- end -}}
{{- end -}}

{{- define "lorabbit.brokerSecret" -}}
{{- $name := include "lorabbit.name" (dict "root" . "part" "rabbitmq") -}}
{{- if eq .Values.rabbitmq.mode "external" -}}
{{ required "rabbitmq.external.existingSecret: name the secret with server-url and client-url" .Values.rabbitmq.external.existingSecret }}
{{- else if eq .Values.rabbitmq.mode "operator" -}}
{{ $name }}-default-user
{{- else -}}
{{ .Values.rabbitmq.auth.existingSecret | default $name }}
{{- end -}}
{{- end -}}

{{- define "lorabbit.tlsSecret" -}}
{{- $tls := .Values.rabbitmq.tls -}}
{{- if $tls.certManager.enabled -}}
{{ include "lorabbit.name" (dict "root" . "part" "rabbitmq") }}-tls
{{- else -}}
{{ required "rabbitmq.tls: name a secret in existingSecret, or enable certManager" $tls.existingSecret }}
{{- end -}}
{{- end -}}

{{/* The secret with the authority's certificate; empty where the broker's is publicly known or there is none. */}}
{{- define "lorabbit.brokerCaSecret" -}}
{{- if eq .Values.rabbitmq.mode "external" -}}
{{ .Values.rabbitmq.external.caSecret }}
{{- else if and (eq .Values.rabbitmq.mode "builtin") .Values.rabbitmq.tls.enabled -}}
{{ include "lorabbit.tlsSecret" . }}
{{- end -}}
{{- end -}}

{{/* A text inside a URL: what reads it takes no + for a space. */}}
{{- define "lorabbit.quoted" -}}
{{ urlquery . | replace "+" "%20" }}
{{- end -}}

{{/* The built-in broker's URL for `who`: a user with its password and an @, or nobody. */}}
{{- define "lorabbit.brokerUrl" -}}
{{- $tls := .root.Values.rabbitmq.tls.enabled -}}
{{ ternary "amqps" "amqp" $tls }}://{{ .who }}{{ include "lorabbit.brokerHost" .root }}:{{ include "lorabbit.brokerPort" .root }}/
{{- if $tls }}?ssl_options={{ dict "cafile" "/run/lorabbit/broker-ca/ca.crt" | toJson | include "lorabbit.quoted" }}{{ end }}
{{- end -}}

{{/* Port of the built-in broker's management interface, where clients have users of their own; empty elsewhere. */}}
{{- define "lorabbit.managementPort" -}}
{{- if .Values.enrolment.enabled -}}
{{- if ne .Values.rabbitmq.mode "builtin" -}}
{{- fail "enrolment.enabled: the chart gives clients users of their own on the built-in broker alone" -}}
{{- end -}}
{{ ternary 15671 15672 .Values.rabbitmq.tls.enabled }}
{{- end -}}
{{- end -}}

{{/* Port of the built-in broker's metrics, where somebody is to read them; empty elsewhere. */}}
{{- define "lorabbit.metricsPort" -}}
{{- if or .Values.monitoring.serviceMonitor .Values.networkPolicy.metricsFrom -}}
15692
{{- end -}}
{{- end -}}

{{- define "lorabbit.brokerEnv" -}}
{{- if eq .Values.rabbitmq.mode "operator" -}}
- name: BROKER_USER
  valueFrom:
    secretKeyRef: {name: {{ include "lorabbit.brokerSecret" . }}, key: username}
- name: BROKER_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "lorabbit.brokerSecret" . }}, key: password}
- name: LORABBIT_BROKER_URL
  value: amqp://$(BROKER_USER):$(BROKER_PASSWORD)@{{ include "lorabbit.brokerHost" . }}:5672/
{{- else -}}
- name: LORABBIT_BROKER_URL_FILE
  value: /run/lorabbit/broker/url
{{- end -}}
{{- end -}}

{{/* What a client with a user of its own is told instead. */}}
{{- define "lorabbit.joinEnv" -}}
- name: LORABBIT_BROKER_URL
  value: {{ include "lorabbit.brokerUrl" (dict "root" . "who" "") | quote }}
- name: LORABBIT_SERVER_URL
  value: http://{{ include "lorabbit.name" (dict "root" . "part" "server") }}.{{ .Release.Namespace }}.svc:8080
- name: LORABBIT_JOIN_TOKEN_FILE
  value: /run/lorabbit/broker/token
{{- end -}}

{{- define "lorabbit.brokerMounts" -}}
{{- if ne .Values.rabbitmq.mode "operator" -}}
- name: broker
  mountPath: /run/lorabbit/broker
  readOnly: true
{{- if include "lorabbit.brokerCaSecret" . }}
- name: broker-ca
  mountPath: /run/lorabbit/broker-ca
  readOnly: true
{{- end }}
{{- end -}}
{{- end -}}

{{- define "lorabbit.brokerVolumes" -}}
{{- if ne .root.Values.rabbitmq.mode "operator" -}}
- name: broker
  secret:
{{- if and .root.Values.enrolment.enabled (eq .side "client") }}
    secretName: {{ .root.Values.enrolment.tokenSecret | default (printf "%s-join" .root.Release.Name) | quote }}
    defaultMode: 0440
    items:
      - {key: token, path: token}
{{- else }}
    secretName: {{ include "lorabbit.brokerSecret" .root | quote }}
    defaultMode: 0440
    items:
      - {key: {{ .side }}-url, path: url}
{{- if .root.Values.enrolment.enabled }}
      - {key: management-url, path: management-url}
{{- end }}
{{- end }}
{{- with include "lorabbit.brokerCaSecret" .root }}
- name: broker-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
{{- end }}
{{- end -}}
{{- end -}}

{{/* RabbitMQ's configuration: the one that compose uses, with this release's limits. */}}
{{- define "lorabbit.rabbitmqConf" -}}
{{- $conf := .Files.Get "files/rabbitmq.conf" -}}
{{- $conf = regexReplaceAll "(?m)^vm_memory_high_watermark.absolute = .*$" $conf (printf "vm_memory_high_watermark.absolute = %s" .Values.rabbitmq.memoryHighWatermark) -}}
{{- $conf = regexReplaceAll "(?m)^disk_free_limit.absolute = .*$" $conf (printf "disk_free_limit.absolute = %s" .Values.rabbitmq.diskFreeLimit) -}}
{{ $conf }}
{{- end -}}

{{/* The store's secret: the key url is what the server mounts. */}}
{{- define "lorabbit.storeSecret" -}}
{{- if eq .Values.redis.mode "external" -}}
{{ required "redis.auth.existingSecret: name the secret with the key url" .Values.redis.auth.existingSecret }}
{{- else -}}
{{ .Values.redis.auth.existingSecret | default (include "lorabbit.name" (dict "root" . "part" "redis")) }}
{{- end -}}
{{- end -}}

{{- define "lorabbit.storePort" -}}
{{ ternary (int .Values.redis.external.port) 6379 (eq .Values.redis.mode "external") }}
{{- end -}}

{{/* What a server is told in its environment. */}}
{{- define "lorabbit.serverEnv" -}}
{{ include "lorabbit.brokerEnv" . }}
{{- if and (eq .Values.rabbitmq.mode "operator") (gt (int .Values.rabbitmq.replicas) 1) }}
- {name: LORABBIT_REPLICATED_QUEUES, value: "true"}
{{- end }}
{{- if .Values.enrolment.enabled }}
- {name: LORABBIT_MANAGEMENT_URL_FILE, value: /run/lorabbit/broker/management-url}
- {name: LORABBIT_HTTP_TOKEN_FILE, value: /run/lorabbit/http/token}
{{- if .Values.rabbitmq.tls.enabled }}
- {name: LORABBIT_TLS_CA, value: /run/lorabbit/broker-ca/ca.crt}
{{- end }}
{{- end }}
- {name: LORABBIT_REDIS_URL_FILE, value: /run/lorabbit/store/url}
- {name: LORABBIT_LOG_FORMAT, value: json}
- {name: LORABBIT_LOG_LEVEL, value: {{ .Values.server.logLevel }}}
- {name: LORABBIT_HEARTBEAT_SECONDS, value: {{ .Values.server.heartbeatSeconds | quote }}}
- {name: LORABBIT_CLIENT_LEASE_SECONDS, value: {{ .Values.server.clientLeaseSeconds | quote }}}
- {name: LORABBIT_LEASE_SECONDS, value: {{ .Values.server.leaseSeconds | quote }}}
- {name: LORABBIT_CHUNK_BYTES, value: {{ int64 .Values.server.chunkBytes | quote }}}
- {name: LORABBIT_MAX_PAYLOAD_BYTES, value: {{ int64 .Values.server.maxPayloadBytes | quote }}}
{{- end -}}

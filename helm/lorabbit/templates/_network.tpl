{{/* A Service whose name leads to its pods themselves; what is below a Service is on the same ports. */}}
{{- define "lorabbit.headless" }}
{{- if .Values.services.headless }}
clusterIP: None
{{- end }}
{{- end }}
{{/* Peers of network policies, each beginning with a line break. */}}
{{- define "lorabbit.peer" }}
- podSelector:
    matchLabels:
{{ include "lorabbit.selector" . | indent 6 }}
{{- end }}
{{- define "lorabbit.networks" }}
{{- range . }}
- ipBlock: {cidr: {{ . }}}
{{- end }}
{{- end }}
{{- define "lorabbit.toBroker" }}
- ports: [{port: {{ include "lorabbit.brokerPort" . }}}]
  to:
{{- if eq .Values.rabbitmq.mode "external" }}
{{- include "lorabbit.networks" .Values.rabbitmq.external.cidrs | indent 4 }}
{{- else if eq .Values.rabbitmq.mode "operator" }}
    - podSelector:
        matchLabels:
          app.kubernetes.io/name: {{ include "lorabbit.name" (dict "root" . "part" "rabbitmq") }}
{{- else }}
{{- include "lorabbit.peer" (dict "root" . "component" "rabbitmq") | indent 4 }}
{{- end }}
{{- end }}

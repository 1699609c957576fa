{{/* What every pod and container has in common: the restricted pod security standard. */}}

{{- define "lorabbit.podSecurity" -}}
automountServiceAccountToken: false
# A Service named after the release would otherwise put variables such as LORABBIT_SERVER_PORT into every container.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int64 .user }}
  runAsGroup: {{ int64 .user }}
  fsGroup: {{ int64 .user }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "lorabbit.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "lorabbit.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{/* A claim template: its labels are immutable, so only those that never change. */}}
{{- define "lorabbit.claim" -}}
- apiVersion: v1
  kind: PersistentVolumeClaim
  metadata:
    name: data
    labels:
{{ include "lorabbit.selector" . | indent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
{{- with .persistence.storageClass }}
    storageClassName: {{ . }}
{{- end }}
    resources:
      requests: {storage: {{ .persistence.size }}}
{{- end -}}

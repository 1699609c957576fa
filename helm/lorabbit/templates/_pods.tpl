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
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "lorabbit.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Gives a volume to the pod's user, where Kubernetes sets no group: hostPath. */}}
{{- define "lorabbit.volumeOwner" -}}
{{- if .root.Values.volumePermissions.enabled -}}
initContainers:
  - name: volume-owner
    image: {{ .image }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [chown, "{{ int64 .user }}:{{ int64 .user }}", {{ .path }}]
    securityContext:
      runAsUser: 0
      runAsNonRoot: false
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL], add: [CHOWN]}
    resources:
      requests: {cpu: 10m, memory: 16Mi}
      limits: {cpu: 100m, memory: 64Mi}
    volumeMounts:
      - {name: data, mountPath: {{ .path }}}
{{- end -}}
{{- end -}}

{{/* Variables of a container: `own`, as a list in YAML, and those of the values, which take the place of any of the same name. */}}
{{- define "lorabbit.env" -}}
{{- $given := list -}}
{{- range .extra }}{{ $given = append $given .name }}{{ end -}}
{{- $kept := list -}}
{{- range fromYamlArray .own }}{{ if not (has .name $given) }}{{ $kept = append $kept . }}{{ end }}{{ end -}}
{{ toYaml (concat $kept .extra) }}
{{- end -}}

{{- define "lorabbit.storageClass" -}}
{{- with . }}
storageClassName: {{ eq . "-" | ternary "" . | quote }}
{{- end }}
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
{{- include "lorabbit.storageClass" .persistence.storageClass | indent 4 }}
    resources:
      requests: {storage: {{ .persistence.size }}}
{{- end -}}

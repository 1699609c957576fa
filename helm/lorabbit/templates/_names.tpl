{{/* Names and labels. A release's name is the first part of every name, and of every client's identity. */}}

{{- define "lorabbit.name" -}}
{{- $name := printf "%s-%s" .root.Release.Name .part -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .root.Release.Name) -}}
{{- fail (printf "release name %q: small letters, digits and dashes, a letter first, because services and clients are named after it" .root.Release.Name) -}}
{{- end -}}
{{- if gt (len $name) 48 -}}
{{- fail (printf "%q has %d characters; a name of 48 at most leaves room for what Kubernetes appends: shorten the release's or the pool's name" $name (len $name)) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* What selects the pods of one part: never changes over a release's life. */}}
{{- define "lorabbit.selector" -}}
app.kubernetes.io/name: lorabbit
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
lorabbit/pool: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "lorabbit.labels" -}}
{{ include "lorabbit.selector" . }}
app.kubernetes.io/part-of: lorabbit
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "lorabbit.image" -}}
{{- $name := .image.repository -}}
{{- if and .own .root.Values.image.registry -}}
{{- $name = printf "%s/%s" (trimSuffix "/" .root.Values.image.registry) $name -}}
{{- end -}}
{{- if eq .image.tag "latest" -}}
{{- fail (printf "image %s: the tag latest is another image tomorrow; name a version or a digest" $name) -}}
{{- end -}}
{{- if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .tag }}
{{- end -}}
{{- end -}}

{{/* One map over another, whatever is empty in the second included. */}}
{{- define "lorabbit.over" -}}
{{- $out := deepCopy (index . 0) -}}
{{- range $key, $value := index . 1 -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $out $key)) -}}
{{- $value = include "lorabbit.over" (list (get $out $key) $value) | fromYaml -}}
{{- end -}}
{{- $_ := set $out $key $value -}}
{{- end -}}
{{- toYaml $out -}}
{{- end -}}

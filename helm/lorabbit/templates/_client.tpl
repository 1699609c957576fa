{{/* A pool with everything that it does not say itself taken from clientDefaults. */}}
{{- define "lorabbit.pool" -}}
{{- $pool := include "lorabbit.over" (list .root.Values.clientDefaults .pool) | fromYaml -}}
{{- include "lorabbit.refusePool" (dict "root" .root "pool" $pool) -}}
{{- toYaml $pool -}}
{{- end -}}

{{/* Name of an IndexedJob pool's Job. A Job's template cannot change: another template is another Job, and the clients keep
their identities. */}}
{{- define "lorabbit.jobName" -}}
{{ include "lorabbit.name" (dict "root" .root "part" .pool.name) }}-{{ printf "%s %v %v" (include "lorabbit.clientPod" .) .pool.replicas .pool.retries | sha256sum | trunc 8 }}
{{- end -}}

{{- define "lorabbit.clientEnv" -}}
{{- $pool := .pool -}}
{{ include (.root.Values.enrolment.enabled | ternary "lorabbit.joinEnv" "lorabbit.brokerEnv") .root }}
{{- if eq $pool.kind "StatefulSet" }}
- name: LORABBIT_CLIENT
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
{{- else if eq $pool.kind "IndexedJob" }}
- name: POD_INDEX
  valueFrom:
    fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
- {name: LORABBIT_CLIENT, value: "{{ include "lorabbit.name" (dict "root" .root "part" $pool.name) }}-$(POD_INDEX)"}
- {name: LORABBIT_IDLE_SECONDS, value: {{ $pool.idleSeconds | quote }}}
{{- end }}
- {name: LORABBIT_DEVICE, value: {{ eq $pool.device "cpu" | ternary "cpu" "cuda" }}}
- {name: LORABBIT_THREADS, value: {{ int $pool.threads | quote }}}
- {name: LORABBIT_LOG_FORMAT, value: json}
- {name: LORABBIT_LOG_LEVEL, value: {{ .root.Values.server.logLevel }}}
- {name: LORABBIT_POOL, value: {{ $pool.name | quote }}}
- {name: LORABBIT_DRAIN_SECONDS, value: {{ max 0 (sub (int $pool.terminationGracePeriodSeconds) 10) | quote }}}
- {name: LORABBIT_DTYPE, value: {{ $pool.capability.dtype }}}
- {name: LORABBIT_QUANTISATION, value: {{ $pool.capability.quantisation }}}
{{- with int $pool.capability.maxRank }}
- {name: LORABBIT_MAX_RANK, value: {{ . | quote }}}
{{- end }}
{{- with int $pool.capability.maxBatch }}
- {name: LORABBIT_MAX_BATCH, value: {{ . | quote }}}
{{- end }}
{{- with $pool.tags }}
- {name: LORABBIT_TAGS, value: {{ join "," . | quote }}}
{{- end }}
{{- if $pool.data.existingClaim }}
- {name: LORABBIT_DATA_ROOT, value: /data}
{{- end }}
{{- end -}}

{{/* Template of a pool's pods. Nothing in it depends on the chart's version: a Job's template is immutable. */}}
{{- define "lorabbit.clientPod" -}}
{{- $pool := .pool -}}
{{- $names := dict "root" .root "component" "client" "pool" $pool.name -}}
{{- $suffix := eq $pool.device "cpu" | ternary "" (printf "-%s" $pool.device) -}}
{{- $image := include "lorabbit.image" (dict "root" .root "own" true "image" $pool.image "tag" (printf "%s%s" .root.Chart.AppVersion $suffix)) -}}
{{- $hasVolume := and (eq $pool.kind "StatefulSet") $pool.persistence.enabled -}}
metadata:
  labels:
{{ include "lorabbit.selector" $names | indent 4 }}
    app.kubernetes.io/part-of: lorabbit
  annotations:
    checksum/broker: {{ toJson .root.Values.rabbitmq.auth | sha256sum }}
{{- with $pool.podAnnotations }}
{{ toYaml . | indent 4 }}
{{- end }}
spec:
{{ include "lorabbit.podSecurity" (dict "root" .root "user" 10001) | indent 2 }}
  terminationGracePeriodSeconds: {{ int $pool.terminationGracePeriodSeconds }}
{{- if eq $pool.kind "IndexedJob" }}
  restartPolicy: Never
{{- end }}
{{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
{{- end }}
{{- $tolerations := $pool.tolerations }}
{{- if ne $pool.device "cpu" }}
{{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with include "lorabbit.placement" (dict "nodeSelector" $pool.nodeSelector "tolerations" $tolerations "affinity" $pool.affinity) }}
{{ . | indent 2 }}
{{- end }}
{{- if $hasVolume }}
{{- with include "lorabbit.volumeOwner" (dict "root" .root "image" ($image) "user" 10001 "path" "/var/lib/lorabbit") }}
{{ . | indent 2 }}
{{- end }}
{{- end }}
  containers:
    - name: client
      image: {{ $image }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      args: [client]
{{ include "lorabbit.containerSecurity" .root | indent 6 }}
      env:
{{ include "lorabbit.env" (dict "own" (include "lorabbit.clientEnv" .) "extra" $pool.extraEnv) | indent 8 }}
      # A client listens nowhere: it is ready while it holds a connection, which can only be the broker's. There is no
      # liveness probe: the process ends by itself where it cannot go on, and reconnects for ever where it can.
      readinessProbe:
        exec:
          command: [grep, -qsE, '^ *[0-9]+: [0-9A-F]+:[0-9A-F]+ [0-9A-F]+:[0-9A-F]+ 01 ', /proc/net/tcp, /proc/net/tcp6]
        periodSeconds: 10
        timeoutSeconds: 5
      resources:
{{- $resources := deepCopy $pool.resources }}
{{- if and (eq $pool.device "cuda") $pool.gpu.resource }}
{{- $_ := set $resources "limits" (set $resources.limits $pool.gpu.resource (int $pool.gpu.count)) }}
{{- end }}
{{ toYaml $resources | indent 8 }}
      volumeMounts:
        - {name: data, mountPath: /var/lib/lorabbit}
        - {name: tmp, mountPath: /tmp}
{{- if $pool.data.existingClaim }}
        - name: dataset
          mountPath: /data
          readOnly: true
{{- with $pool.data.subPath }}
          subPathExpr: {{ . | quote }}
{{- end }}
{{- end }}
{{- with include "lorabbit.brokerMounts" .root }}
{{ . | indent 8 }}
{{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 2Gi}
{{- if not $hasVolume }}
    - name: data
      emptyDir: {sizeLimit: {{ $pool.persistence.size }}}
{{- end }}
{{- with $pool.data.existingClaim }}
    - name: dataset
      persistentVolumeClaim: {claimName: {{ . | quote }}, readOnly: true}
{{- end }}
{{- with include "lorabbit.brokerVolumes" (dict "root" .root "side" "client") }}
{{ . | indent 4 }}
{{- end }}
{{- end -}}

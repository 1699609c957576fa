{{/* Values that do not go together. Each is refused in a sentence, instead of made into a release that never runs. */}}

{{- define "lorabbit.refusePool" -}}
{{- $pool := .pool -}}
{{- $this := printf "clientPools %q" $pool.name -}}
{{- $values := .root.Values -}}
{{- if has $pool.name (list "server" "rabbitmq" "redis" "pods") -}}
{{- fail (printf "clientPools: a pool cannot be named %q, which another part of the release is" $pool.name) -}}
{{- end -}}
{{- if and (eq $pool.kind "Deployment") $pool.data.subPath -}}
{{- fail (printf "%s: the clients of a Deployment have no lasting identity, so data.subPath cannot name one" $this) -}}
{{- end -}}
{{- if and $pool.data.subPath (not $pool.data.existingClaim) -}}
{{- fail (printf "%s: data.subPath is a folder of the claim in data.existingClaim; name that too" $this) -}}
{{- end -}}
{{- if and (eq $pool.kind "IndexedJob") (eq (int $pool.replicas) 0) -}}
{{- fail (printf "%s: an IndexedJob of 0 clients is over at once and takes none later; leave the pool out" $this) -}}
{{- end -}}
{{- $keeps := and (eq $pool.kind "StatefulSet") $pool.persistence.enabled (eq $pool.persistence.whenScaled "Retain") -}}
{{- if and $values.enrolment.enabled (ne $pool.kind "Deployment") (not $keeps) -}}
{{- fail (printf "%s: with enrolment.enabled a client's password is on its volume, and a new pod of that name without it is not let in; take a StatefulSet with persistence.enabled and persistence.whenScaled: Retain, or a Deployment, whose every pod is a client of its own" $this) -}}
{{- end -}}
{{- if and (eq $pool.device "cpu") (eq $pool.capability.dtype "float16") -}}
{{- fail (printf "%s: capability.dtype float16 is for GPUs; take bfloat16 or float32 where device is cpu" $this) -}}
{{- end -}}
{{- if and (eq $pool.device "jetson") (not $pool.runtimeClassName) -}}
{{- fail (printf "%s: a Jetson's GPU comes with a runtime class; set runtimeClassName, such as nvidia" $this) -}}
{{- end -}}
{{- if $pool.autoscaling.enabled -}}
{{- if eq $pool.kind "IndexedJob" -}}
{{- fail (printf "%s: an IndexedJob has a fixed number of clients; autoscaling needs a StatefulSet or a Deployment" $this) -}}
{{- end -}}
{{- if gt (int $pool.autoscaling.min) (int $pool.autoscaling.max) -}}
{{- fail (printf "%s: autoscaling.min, %d, is more than autoscaling.max, %d" $this (int $pool.autoscaling.min) (int $pool.autoscaling.max)) -}}
{{- end -}}
{{- if and $values.networkPolicy.enabled (not $values.networkPolicy.httpFrom) -}}
{{- fail (printf "%s: autoscaling needs networkPolicy.httpFrom: say where KEDA runs, for example a namespaceSelector; it reads the server's metrics there" $this) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lorabbit.refuseRelease" -}}
{{- with .Values.server -}}
{{- if and (gt (int .replicas) 1) (ne .persistence.accessMode "ReadWriteMany") (not .persistence.existingClaim) -}}
{{- fail "server.replicas: a server that stands by shares the leader's volume; set server.persistence.accessMode to ReadWriteMany from the first installation on (a claim keeps its access mode for life), or name a ReadWriteMany claim in server.persistence.existingClaim" -}}
{{- end -}}
{{- if lt (float64 .clientLeaseSeconds) (mulf 2 .heartbeatSeconds) -}}
{{- fail (printf "server.clientLeaseSeconds: at least twice server.heartbeatSeconds, which is %v, is expected: a client that is there would count as lost" .heartbeatSeconds) -}}
{{- end -}}
{{- end -}}
{{- with .Values.rabbitmq -}}
{{- if and (ne .mode "builtin") (or .auth.existingSecret .auth.serverPassword .auth.clientPassword) -}}
{{- fail "rabbitmq.auth: of the built-in broker alone; the operator makes a user itself, and an external broker's are in rabbitmq.external.existingSecret" -}}
{{- end -}}
{{- $limit := dig "limits" "memory" "" (.resources | default dict) -}}
{{- if and $limit (ne .mode "external") (gt (float64 (include "lorabbit.bytes" .memoryHighWatermark)) (mulf 0.6 (include "lorabbit.bytes" $limit))) -}}
{{- fail (printf "rabbitmq.memoryHighWatermark: %s is more than 60 %% of rabbitmq.resources.limits.memory, %v: the broker would be killed before publishers wait" .memoryHighWatermark $limit) -}}
{{- end -}}
{{- end -}}
{{- with .Values.redis -}}
{{- $limit := dig "limits" "memory" "" (.resources | default dict) -}}
{{- if and $limit (eq .mode "builtin") (ge (float64 (include "lorabbit.bytes" .maxMemory)) (float64 (include "lorabbit.bytes" $limit))) -}}
{{- fail (printf "redis.maxMemory: %s is not below redis.resources.limits.memory, %v: the store would be killed before it refuses writes" .maxMemory $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Bytes of a size as Kubernetes (Gi, G), RabbitMQ (GiB, GB) or Redis (gb, of 1024) writes it. */}}
{{- define "lorabbit.bytes" -}}
{{- $number := regexFind "^[0-9.]+" (toString .) -}}
{{- $unit := toString . | trimPrefix $number | trimSuffix "B" | lower -}}
{{- $bytes := float64 $number -}}
{{- if kindIs "string" . -}}
{{- range until (get (dict "" 0 "k" 1 "m" 2 "g" 3 "t" 4 "p" 5 "e" 6) (trunc 1 $unit)) -}}
{{- $bytes = mulf $bytes (ternary 1024 1000 (gt (len $unit) 1)) -}}
{{- end -}}
{{- else -}}
{{- $bytes = float64 . -}}
{{- end -}}
{{ printf "%.0f" $bytes }}
{{- end -}}

{{- define "outrider.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "outrider.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "outrider.labels" -}}
{{ include "outrider.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "outrider.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "outrider.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The pods that answer requests: all, or the leader of each group. */ -}}
{{- define "outrider.servers" -}}
{{ include "outrider.selector" . }}
{{- if .Values.multiNode.enabled }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end -}}

{{- define "outrider.scaleTarget" -}}
{{- if .Values.multiNode.enabled -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: StatefulSet
{{- end }}
name: {{ include "outrider.fullname" . }}
{{- end -}}

{{- /* The settings file; Ray is what joins several nodes. */ -}}
{{- define "outrider.settings" -}}
{{- $settings := deepCopy .Values.settings -}}
{{- if .Values.multiNode.enabled -}}
{{- if not (or (hasKey $settings "tensor-parallel-size") (hasKey $settings "tensor_parallel_size")) -}}
{{- fail "multiNode: settings need tensor-parallel-size, the number of GPUs of all nodes of a replica" -}}
{{- end -}}
{{- $_ := set $settings "distributed-executor-backend" "ray" -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

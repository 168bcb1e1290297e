{{- /* What the pods of a replica have in common, whoever makes them. */ -}}

{{- define "outrider.podMetadata" -}}
labels:
  {{- include "outrider.labels" . | nindent 2 }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/settings: {{ include "outrider.settings" . | sha256sum }}
  {{- with .Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "outrider.podSpec" -}}
serviceAccountName: {{ include "outrider.serviceAccount" . }}
automountServiceAccountToken: false
{{- /* A Service called "outrider" would set OUTRIDER_PORT=tcp://... */}}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add .Values.drain.preStopSeconds .Values.drain.timeoutSeconds 15 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 0
  fsGroup: 0
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
volumes:
  - name: settings
    configMap:
      name: {{ include "outrider.fullname" . }}
  - name: tmp
    emptyDir:
      medium: Memory
      sizeLimit: {{ .Values.tmp }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ .Values.shm }}
  {{- if .Values.cache.existingClaim }}
  - name: cache
    persistentVolumeClaim:
      claimName: {{ .Values.cache.existingClaim }}
  {{- else if or (not .Values.cache.enabled) .Values.multiNode.enabled }}
  - name: cache
    emptyDir: {}
  {{- end }}
  {{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "outrider.container" -}}
image: "{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- if or .Values.apiKey.existingSecret .Values.huggingFace.existingSecret .Values.extraEnv }}
env:
  {{- with .Values.apiKey.existingSecret }}
  - name: OUTRIDER_API_KEY
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: {{ $.Values.apiKey.key }}
  {{- end }}
  {{- with .Values.huggingFace.existingSecret }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: {{ $.Values.huggingFace.key }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: settings
    mountPath: /etc/outrider-settings
    readOnly: true
  - name: tmp
    mountPath: /tmp
  - name: shm
    mountPath: /dev/shm
  - name: cache
    mountPath: /cache
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "outrider.args" -}}
{{- with .Values.model }}
- {{ . | quote }}
{{- end }}
- --config=/etc/outrider-settings/config.yaml
- --host=0.0.0.0
- --port=8000
- --shutdown-timeout={{ .Values.drain.timeoutSeconds }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* /ready: send requests. /live: do not restart; it stays true while an engine is started again. */ -}}
{{- define "outrider.serving" -}}
ports:
  - name: http
    containerPort: 8000
startupProbe:
  httpGet: {path: /ready, port: http}
  timeoutSeconds: 5
  {{- toYaml .Values.probes.startup | nindent 2 }}
readinessProbe:
  httpGet: {path: /ready, port: http}
  timeoutSeconds: 5
  {{- toYaml .Values.probes.readiness | nindent 2 }}
livenessProbe:
  httpGet: {path: /live, port: http}
  timeoutSeconds: 5
  {{- toYaml .Values.probes.liveness | nindent 2 }}
lifecycle:
  preStop:
    exec:
      {{- /* Nothing to do: in this time load balancers learn that the pod is going. */}}
      command: [sleep, {{ .Values.drain.preStopSeconds | quote }}]
{{- end -}}

{{- define "lighterman.selector" -}}
app.kubernetes.io/name: lighterman
{{- end }}

{{- define "lighterman.labels" -}}
{{ include "lighterman.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- /* The port of ADDRESS:PORT, whose ADDRESS may be an IPv6 one in brackets. */ -}}
{{- define "lighterman.port" -}}
{{ regexReplaceAll "^.*:" . "" }}
{{- end }}

{{- /* A probe of the admin port. The kubelet asks at the node's address unless a host is named, so one that is no wildcard is. */ -}}
{{- define "lighterman.probe" -}}
{{- $address := regexReplaceAll ":[0-9]+$" .listen "" | trimPrefix "[" | trimSuffix "]" -}}
httpGet:
  path: {{ .path }}
  port: admin
  {{- if not (has $address (list "::" "0.0.0.0")) }}
  host: {{ $address | quote }}
  {{- end }}
{{- end }}

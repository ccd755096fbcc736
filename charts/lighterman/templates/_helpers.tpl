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

{{- /* Of (list VALUE $): `true` where the chart makes the policy whose value is true, always or false.
       Where VALUE is true, the cluster has to know the kind. */ -}}
{{- define "lighterman.policy" -}}
{{- $value := toString (index . 0) -}}
{{- $kind := "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy" -}}
{{- if or (eq $value "always") (and (eq $value "true") ((index . 1).Capabilities.APIVersions.Has $kind)) }}true{{ end -}}
{{- end }}

{{- /* `true` where the agents get rights to write pods: a policy narrows them, or a value accepts that
       none does. */ -}}
{{- define "lighterman.podRights" -}}
{{- if or .Values.podRightsWithoutPolicy (include "lighterman.policy" (list .Values.podPolicy .)) }}true{{ end -}}
{{- end }}

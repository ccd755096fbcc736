{{- define "lighterman.selector" -}}
app.kubernetes.io/name: lighterman
{{- end }}

{{- define "lighterman.labels" -}}
{{ include "lighterman.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- /* The port of ADDRESS:PORT; ADDRESS may be an IPv6 address in brackets. */ -}}
{{- define "lighterman.port" -}}
{{ regexReplaceAll "^.*:" . "" }}
{{- end }}

{{- /* A probe of the admin port. The kubelet probes the node's address unless `host` is set, so an
       address that is no wildcard becomes `host`. */ -}}
{{- define "lighterman.probe" -}}
{{- $address := regexReplaceAll ":[0-9]+$" .listen "" | trimPrefix "[" | trimSuffix "]" -}}
httpGet:
  path: {{ .path }}
  port: admin
  {{- if not (has $address (list "::" "0.0.0.0")) }}
  host: {{ $address | quote }}
  {{- end }}
{{- end }}

{{- /* Of (list VALUE $): `true` where the chart makes the policy with the value true, always or false.
       For the value true the cluster must have the kind. */ -}}
{{- define "lighterman.policy" -}}
{{- $value := toString (index . 0) -}}
{{- $kind := "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy" -}}
{{- if or (eq $value "always") (and (eq $value "true") ((index . 1).Capabilities.APIVersions.Has $kind)) }}true{{ end -}}
{{- end }}

{{- /* `true` where the agents get rights to write pods: a policy narrows the rights, or
       podRightsWithoutPolicy accepts the risk. */ -}}
{{- define "lighterman.podRights" -}}
{{- if or .Values.podRightsWithoutPolicy (include "lighterman.policy" (list .Values.podPolicy .)) }}true{{ end -}}
{{- end }}

//! Pull secrets of the namespaces where the agent may read them.
//!
//! A secret is read for each use and not cached. No log and no error contains a secret's content.
//! kube logs an answer that it cannot parse, so this module parses the answer.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::GetParams;
use kube::core::Request;
use kube::{Client, Resource};
use serde_json::{Value, json};

use crate::api_server::error::{REQUEST_TIMEOUT, call, is_object_name};
use crate::ports::{ClusterError, PullSecret};

/// Most bytes of a pull secret: a dozen registries. The credentials of one registry have a few KiB
/// at most (a cloud's key, encoded twice). A Secret may have 1 MiB.
const MAX_BYTES: usize = 64 << 10;

pub(super) async fn pull_secret(client: &Client, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError> {
    let what = format!("secret {k8s_namespace}/{name}");
    if !is_object_name(name) {
        return Err(ClusterError::Gone(what));
    }
    // A read from etcd: the watch cache may still have a password that was just replaced.
    let request = Request::new(Secret::url_path(&(), Some(k8s_namespace))).get(name, &GetParams::default());
    let request = request.map_err(|error| ClusterError::Other(format!("{what}: {error}")))?;
    let answer = call(REQUEST_TIMEOUT, client.request_text(request))
        .await
        .map_err(|failure| failure.into_cluster_error(&what))?;
    let secret = serde_json::from_str::<Secret>(&answer)
        .map_err(|_| ClusterError::Other(format!("{what}: the API server's answer is not a Secret")))?;
    docker_config(secret).map_err(|reason| ClusterError::Other(format!("{what} {reason}")))
}

/// The file `.docker/config.json` in the secret. The older form `.dockercfg`, which kubelets accept
/// too, is converted to the same shape.
fn docker_config(secret: Secret) -> Result<PullSecret, &'static str> {
    let mut data = secret.data.unwrap_or_default();
    match secret.type_.as_deref() {
        Some("kubernetes.io/dockerconfigjson") => take_key(&mut data, ".dockerconfigjson").map(PullSecret),
        Some("kubernetes.io/dockercfg") => {
            let auths = take_key(&mut data, ".dockercfg")?;
            match serde_json::from_slice(&auths) {
                Ok(auths @ Value::Object(_)) => Ok(PullSecret(json!({ "auths": auths }).to_string().into_bytes())),
                _ => Err("has a .dockercfg that is not a JSON object"),
            }
        }
        _ => Err("is not a pull secret: its type must be kubernetes.io/dockerconfigjson or kubernetes.io/dockercfg"),
    }
}

fn take_key(data: &mut BTreeMap<String, ByteString>, key: &str) -> Result<Vec<u8>, &'static str> {
    match data.remove(key) {
        Some(ByteString(bytes)) if bytes.len() <= MAX_BYTES => Ok(bytes),
        Some(_) => Err("is larger than 64 KiB"),
        None => Err("lacks the key of its type (.dockerconfigjson or .dockercfg)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(type_: &str, key: &str, content: &[u8]) -> Result<PullSecret, &'static str> {
        let data = Some([(key.to_owned(), ByteString(content.to_vec()))].into());
        docker_config(Secret { type_: Some(type_.to_owned()), data, ..Secret::default() })
    }

    #[test]
    fn both_kinds_of_pull_secret_have_one_shape() {
        let config = br#"{"auths":{"reg.test":{"auth":"dTpw"}}}"#;
        assert_eq!(secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", config).unwrap().0, config);
        assert_eq!(
            secret("kubernetes.io/dockercfg", ".dockercfg", br#"{"reg.test":{"auth":"dTpw"}}"#).unwrap().0,
            config
        );
    }

    #[test]
    fn a_secret_of_another_type_or_shape_is_rejected_with_a_reason() {
        let (json, old) = ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg");
        for (type_, key, content, reason) in [
            ("Opaque", ".dockerconfigjson", &b"{}"[..], "is not a pull secret"),
            ("kubernetes.io/service-account-token", "token", b"t", "is not a pull secret"),
            (json, ".dockercfg", b"{}", "lacks the key"),
            (json, ".dockerconfigjson", &[b' '; MAX_BYTES + 1], "larger than 64 KiB"),
            (old, ".dockercfg", b"[]", "not a JSON object"),
            (old, ".dockercfg", b"{", "not a JSON object"),
        ] {
            let error = secret(type_, key, content).unwrap_err();
            assert!(error.contains(reason), "{type_} {key}: {error}");
        }
        assert!(secret(json, ".dockerconfigjson", &[b' '; MAX_BYTES]).is_ok());
    }
}

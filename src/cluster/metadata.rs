//! The metadata of one object by name.

use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::GetParams;
use serde::de::DeserializeOwned;

use crate::api_server::error::{ApiError, REQUEST_TIMEOUT, call};

/// Reads the API server's watch cache first, which costs etcd nothing. The cache may lag, so the
/// absence of an object, or of an object with this UID, is confirmed by a read from etcd.
pub(super) async fn metadata<K>(api: &Api<K>, name: &str, uid: Option<&str>) -> Result<ObjectMeta, ApiError>
where
    K: Clone + Debug + DeserializeOwned,
{
    let get = async |params: GetParams| {
        let found = call(REQUEST_TIMEOUT, api.get_metadata_with(name, &params)).await?.metadata;
        match uid {
            Some(uid) if found.uid.as_deref() != Some(uid) => {
                Err(ApiError::NotFound("a new object has this name".to_owned()))
            }
            _ => Ok(found),
        }
    };
    match get(GetParams::any()).await {
        Err(ApiError::NotFound(_)) => get(GetParams::default()).await,
        answer => answer,
    }
}

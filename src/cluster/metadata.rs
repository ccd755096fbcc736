//! The metadata of one object, by its name.

use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::GetParams;
use serde::de::DeserializeOwned;

use super::api_error::{ApiError, REQUEST_TIMEOUT, call};

/// From the API server's watch cache, which costs etcd nothing. The cache may be behind what made the caller ask: that an object is not
/// there, or is another than the one with this UID, is believed of etcd alone.
pub(super) async fn metadata<K>(api: &Api<K>, name: &str, uid: Option<&str>) -> Result<ObjectMeta, ApiError>
where
    K: Clone + Debug + DeserializeOwned,
{
    let ask = async |how: GetParams| {
        let found = call(REQUEST_TIMEOUT, api.get_metadata_with(name, &how)).await?.metadata;
        match uid {
            Some(uid) if found.uid.as_deref() != Some(uid) => {
                Err(ApiError::NotFound("another object has its name".to_owned()))
            }
            _ => Ok(found),
        }
    };
    match ask(GetParams::any()).await {
        Err(ApiError::NotFound(_)) => ask(GetParams::default()).await,
        answer => answer,
    }
}

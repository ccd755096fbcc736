//! A real etcd and a real kube-apiserver on loopback, once for the whole test binary; a Kubernetes namespace for each test.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kube::api::DeleteParams;
use lighterman::cluster::{KubeCluster, connect};
use lighterman::model::PodRef;
use serde_json::Value;

use crate::fleet::apiserver::ApiServer;
pub(super) use crate::fleet::apiserver::{KubeNamespace, SERVICE_ACCOUNT, create, program};

/// Far more than any test here needs on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

pub(super) const ISSUER: &str = "https://kubernetes.default.svc";

/// Runs a test's body under a deadline.
pub(super) async fn with_deadline<T>(body: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, body).await.expect("the test takes too long")
}

fn api_server() -> &'static Arc<ApiServer> {
    static SERVER: OnceLock<Arc<ApiServer>> = OnceLock::new();
    SERVER.get_or_init(|| ApiServer::start(Ipv4Addr::LOCALHOST).into())
}

/// The API server's own address.
pub(super) fn address() -> SocketAddr {
    api_server().address
}

/// The key that the API server signs ServiceAccount tokens with.
pub(super) fn signing_key() -> Vec<u8> {
    fs::read(api_server().folder.join("sa.key")).unwrap()
}

/// What the API server was asked about pods and workloads, and to change, as far as it has logged it: user agent and URI.
pub(super) fn requests() -> Vec<(String, String)> {
    let text = |field: &Value| Some(field.as_str()?.to_owned());
    let entry = |entry: Value| Some((text(&entry["userAgent"])?, text(&entry["requestURI"])?));
    api_server().audit().into_iter().filter_map(entry).collect()
}

impl KubeNamespace {
    pub(super) async fn new() -> Self {
        Self::on_server(tokio::task::spawn_blocking(|| Arc::clone(api_server())).await.unwrap()).await
    }

    pub(super) async fn agent(&self) -> KubeCluster {
        connect(self.config()).await.unwrap()
    }

    /// The minor version of the API server.
    pub(super) async fn minor(&self) -> u32 {
        self.admin.apiserver_version().await.unwrap().minor.trim_end_matches('+').parse().unwrap()
    }

    /// A pod that waits on this place's node, as far as anybody can tell.
    pub(super) async fn pod(&self, name: &str) -> PodRef {
        self.pod_on(name, &self.name).await
    }

    /// Deletes at once; there is no kubelet that would have to agree.
    pub(super) async fn delete_pod(&self, name: &str) {
        self.pods().delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }

    /// What a person sees.
    pub(super) async fn describe_pod(&self, name: &str) -> String {
        let kubeconfig = self.config().kubeconfig.unwrap();
        let output = tokio::process::Command::new(program("kubectl"))
            .args(["--kubeconfig", path(&kubeconfig), "-n", &self.name, "describe", "pod", name])
            .output()
            .await
            .expect("kubectl runs");
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        write!(text, "{}", String::from_utf8_lossy(&output.stderr)).unwrap();
        text
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path of ASCII characters")
}

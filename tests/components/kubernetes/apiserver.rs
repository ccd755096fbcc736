//! A real etcd and a real kube-apiserver on loopback, shared by the whole test binary. Each test
//! has a Kubernetes namespace.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kube::api::DeleteParams;
use lighterman::api_server::connect;
use lighterman::cluster::KubeCluster;
use lighterman::model::PodRef;
use serde_json::Value;

use crate::fleet::apiserver::ApiServer;
pub(super) use crate::fleet::apiserver::{KubeNamespace, SERVICE_ACCOUNT, create, program};

/// Deadline of a test: far more than any test here needs on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

pub(super) const ISSUER: &str = "https://kubernetes.default.svc";

pub(super) async fn with_deadline<T>(body: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, body).await.expect("the test ends within its deadline")
}

fn api_server() -> &'static Arc<ApiServer> {
    static SERVER: OnceLock<Arc<ApiServer>> = OnceLock::new();
    SERVER.get_or_init(|| ApiServer::start(Ipv4Addr::LOCALHOST).into())
}

/// Address of the API server itself, without a proxy.
pub(super) fn address() -> SocketAddr {
    api_server().address
}

/// Key with which the API server signs ServiceAccount tokens.
pub(super) fn signing_key() -> Vec<u8> {
    fs::read(api_server().folder.join("sa.key")).unwrap()
}

/// User agent and URI of the logged requests so far: requests about pods and workloads, and
/// changes. The API server logs a request shortly after the response.
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
        KubeCluster::new(&connect(self.config()).await.unwrap())
    }

    /// The minor version of the API server.
    pub(super) async fn minor(&self) -> u32 {
        self.admin.apiserver_version().await.unwrap().minor.trim_end_matches('+').parse().unwrap()
    }

    /// Creates a pod on this namespace's node. No kubelet runs, so the pod never starts.
    pub(super) async fn pod(&self, name: &str) -> PodRef {
        self.pod_on(name, &self.name).await
    }

    /// Deletes at once, without a kubelet's confirmation.
    pub(super) async fn delete_pod(&self, name: &str) {
        self.pods().delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }

    /// Output of `kubectl describe pod`, which users read.
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
    path.to_str().expect("the path is UTF-8")
}

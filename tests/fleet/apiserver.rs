//! A real etcd and a real kube-apiserver, with a Kubernetes namespace for each test.
//!
//! No controllers and no kubelets run, so only tests and agents change objects.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use lighterman::api_server::Config;
use lighterman::model::PodRef;
use serde_json::{Value, json};

/// The servers are ready in about ten seconds; a busy machine takes longer.
const DEADLINE: Duration = Duration::from_secs(90);

const ADMIN_TOKEN: &str = "admin-of-the-tests";
pub(crate) const SERVICE_ACCOUNT: &str = "lighterman";

/// A running etcd and kube-apiserver.
pub(crate) struct ApiServer {
    pub(crate) folder: PathBuf,
    pub(crate) address: SocketAddr,
    /// Parent of both servers. Its standard input closes when this process ends, also after a
    /// crash; the shell then kills both servers and removes their folder.
    _shell: Child,
}

/// Folder where `make testbed` installs programs.
fn testbed() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || {
        set("LIGHTERMAN_CACHE").unwrap_or_else(|| {
            let home = || set("HOME").expect("HOME is set").join(".cache");
            set("XDG_CACHE_HOME").unwrap_or_else(home).join("lighterman")
        })
    };
    set("LIGHTERMAN_TESTBED").unwrap_or_else(|| cache().join("testbed"))
}

/// Path of a Kubernetes program or etcd in the testbed.
pub(crate) fn program(name: &str) -> PathBuf {
    let candidates = ["k8s/bin", "bin"].map(|folder| testbed().join(folder).join(name));
    let found = candidates.iter().find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not in {}: run `make testbed`", testbed().display())).clone()
}

/// `$1` etcd, `$2` kube-apiserver, `$3` folder, `$4` etcd's port, `$5` etcd's peer port, `$6` the
/// API server's port, `$7` the API server's address.
const RUN_SCRIPT: &str = r#"
trap '' INT
cd "$3"
"$1" --data-dir=etcd --unsafe-no-fsync --listen-client-urls="http://127.0.0.1:$4" --advertise-client-urls="http://127.0.0.1:$4" \
  --listen-peer-urls="http://127.0.0.1:$5" --initial-advertise-peer-urls="http://127.0.0.1:$5" \
  --initial-cluster="default=http://127.0.0.1:$5" > etcd.log 2>&1 & etcd=$!
"$2" --etcd-servers="http://127.0.0.1:$4" --bind-address="$7" --secure-port="$6" --cert-dir=certs \
  --advertise-address=192.0.2.1 --endpoint-reconciler-type=none --service-cluster-ip-range=10.96.0.0/24 \
  --token-auth-file=tokens.csv --authorization-mode=RBAC --disable-admission-plugins=ServiceAccount \
  --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=sa.pub \
  --service-account-signing-key-file=sa.key \
  --audit-policy-file=audit.yaml --audit-log-path=audit.log > apiserver.log 2>&1 & apiserver=$!
cat > /dev/null
kill -KILL "$apiserver" "$etcd"
wait
rm -rf "$3"
"#;

impl ApiServer {
    /// Starts the servers in the network namespace of this thread.
    pub(crate) fn start(address: Ipv4Addr) -> Self {
        let (etcd, apiserver) = (program("etcd"), program("kube-apiserver"));
        let folder = tempfile::tempdir().unwrap().keep();
        let openssl = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).current_dir(&folder).output().expect("openssl runs");
            assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        // An RSA key, as in nearly every cluster, so that tokens are signed with RS256.
        openssl(&["genrsa", "-out", "sa.key", "2048"]);
        openssl(&["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"]);
        fs::write(folder.join("tokens.csv"), format!("{ADMIN_TOKEN},admin,1,system:masters\n")).unwrap();
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
            "rules": [
                { "level": "Metadata", "resources": [{ "group": "", "resources": ["pods"] }, { "group": "apps" }, { "group": "batch" }] },
                { "level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"] },
                { "level": "None" },
            ],
        });
        fs::write(folder.join("audit.yaml"), policy.to_string()).unwrap();
        let ports = free_ports();
        let shell = Command::new("sh")
            .args(["-c", RUN_SCRIPT, "sh"])
            .args([&etcd, &apiserver, &folder])
            .args(ports.map(|port| port.to_string()))
            .arg(address.to_string())
            .stdin(Stdio::piped())
            // A reader of the tests' output would otherwise wait for the servers' end.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh runs");
        let server = Self { folder, address: (address, ports[2]).into(), _shell: shell };
        let begun = Instant::now();
        while TcpStream::connect(server.address).is_err() {
            let log = || fs::read_to_string(server.folder.join("apiserver.log")).unwrap_or_default();
            assert!(begun.elapsed() < DEADLINE, "the API server does not start:\n{}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// Audit entries so far: requests about pods and workloads, and changes of any object. The API
    /// server logs a request shortly after the response.
    pub(crate) fn audit(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.folder.join("audit.log")).unwrap();
        // The last line may be incomplete.
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// A kubeconfig for the API server, or for a proxy of the API server, on `port`.
    fn kubeconfig(&self, port: u16, token: &str) -> String {
        let certificate = self.folder.join("certs/apiserver.crt");
        let server = SocketAddr::new(self.address.ip(), port);
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{ "name": "tests", "cluster": { "server": format!("https://{server}"), "certificate-authority": certificate } }],
            "users": [{ "name": "tests", "user": { "token": token } }],
            "contexts": [{ "name": "tests", "context": { "cluster": "tests", "user": "tests" } }],
        })
        .to_string()
    }
}

/// Ports that are free at the moment.
fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// A Kubernetes namespace, node and agent of one test. The node has the namespace's name, so no
/// other test has a node of that name.
pub(crate) struct KubeNamespace {
    pub(crate) name: String,
    pub(crate) admin: Client,
    pub(crate) server: Arc<ApiServer>,
    folder: tempfile::TempDir,
}

impl KubeNamespace {
    /// Starts servers at this address, in the network namespace of the runtime's threads. The
    /// servers end when the returned value is dropped.
    pub(crate) async fn with_own_server(address: Ipv4Addr) -> Self {
        Self::on_server(tokio::task::spawn_blocking(move || ApiServer::start(address)).await.unwrap().into()).await
    }

    pub(crate) async fn on_server(server: Arc<ApiServer>) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let admin = client(&server.kubeconfig(server.address.port(), ADMIN_TOKEN)).await;
        let ready = || kube::core::Request::new("").get("readyz", &kube::api::GetParams::default()).unwrap();
        while admin.request_text(ready()).await.ok().as_deref() != Some("ok") {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let name = format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let namespace = json!({ "metadata": { "name": name, "annotations": { "lighterman.dev/enabled": "true" } } });
        create::<Namespace>(&Api::all(admin.clone()), namespace).await;
        let accounts = Api::namespaced(admin.clone(), &name);
        create::<ServiceAccount>(&accounts, json!({ "metadata": { "name": SERVICE_ACCOUNT } })).await;
        Self { name, admin, server, folder: tempfile::tempdir().unwrap() }
    }

    /// Configuration of this namespace's agent, with the rights of an administrator.
    pub(crate) fn config(&self) -> Config {
        self.config_of(ADMIN_TOKEN)
    }

    /// Configuration of this namespace's agent, with the rights of this token.
    pub(crate) fn config_of(&self, token: &str) -> Config {
        self.config_with(self.server.address.port(), token)
    }

    pub(crate) fn config_with(&self, port: u16, token: &str) -> Config {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let kubeconfig = self.folder.path().join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::write(&kubeconfig, self.server.kubeconfig(port, token)).unwrap();
        Config {
            node: self.name.parse().unwrap(),
            k8s_namespace: self.name.clone(),
            pod_name: "agent".to_owned(),
            pod_uid: None,
            service_account: SERVICE_ACCOUNT.to_owned(),
            kubeconfig: Some(kubeconfig),
            start_jitter: Duration::ZERO,
        }
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.admin.clone(), &self.name)
    }

    pub(crate) async fn pod_on(&self, name: &str, node: &str) -> PodRef {
        let pod = json!({
            "metadata": { "name": name },
            "spec": {
                "nodeName": node,
                "serviceAccountName": SERVICE_ACCOUNT,
                "containers": [{ "name": "main", "image": "reg.test/app:1" }],
            },
        });
        let created = create::<Pod>(&self.pods(), pod).await;
        PodRef { k8s_namespace: self.name.clone(), name: name.to_owned(), uid: created.metadata.uid.unwrap() }
    }

    /// Requests a token from the API server. Without `audience` the token is for the API server
    /// itself; without `pod` the token is bound to no object.
    pub(crate) async fn token(&self, service_account: &str, audience: Option<String>, pod: Option<&PodRef>) -> String {
        let bound = |pod: &PodRef| BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.clone()),
        };
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: audience.into_iter().collect(),
                bound_object_ref: pod.map(bound),
                expiration_seconds: Some(3600),
            },
            ..TokenRequest::default()
        };
        let accounts = Api::<ServiceAccount>::namespaced(self.admin.clone(), &self.name);
        let answer = accounts.create_token_request(service_account, &PostParams::default(), &request).await.unwrap();
        answer.status.unwrap().token
    }
}

async fn client(kubeconfig: &str) -> Client {
    let file = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// Creates an object from its JSON.
pub(crate) async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

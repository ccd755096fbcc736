//! Agents' writes to the API server: for pods that wait for an image, and while idle. The benchmark
//! itself writes the pods' status, which is the kubelet's part.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::Api;
use kube::api::{Patch, PatchParams};
use lighterman::oci::Reference;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::fleet::apiserver::create;
use crate::nodes::{Nodes, SETTLE, name_of, with_nodes};
use crate::report::{BenchError, figure, note};
use crate::storage::Storage;

const NODES: usize = 8;

/// Waiting pods on each node but the first, all with the same image.
const PODS: usize = 3;

/// Length of the idle period. With all nodes, 40 minutes of one agent.
const IDLE: Duration = Duration::from_secs(300);

/// Time after which all writes of a recovery are done: Events and nudges are retried after seconds,
/// and claims are released.
const WRITE_DELAY: Duration = Duration::from_secs(20);

const WAIT_DEADLINE: Duration = Duration::from_secs(120);

const NEEDED: u64 = 3 << 30;

pub(crate) fn run() -> Result<(), BenchError> {
    with_nodes(Storage::memory(NEEDED)?, NODES, async |nodes| {
        let image = name_of("waited-for", 1)?;
        nodes.put_image_on(0, &image, &[16 << 20, 16 << 20], 1).await?;
        nodes.wait_providers(&image, 1..NODES, &[0]).await?;
        let started = ApiWrites::so_far(nodes);
        note(&format!("until all agents were connected: {}", started.describe()));
        let pods = PODS * (NODES - 1);
        recover_waiting_pods(nodes, &image).await?;
        sleep(WRITE_DELAY).await;
        let waited = ApiWrites::so_far(nodes).since(&started);
        let for_pods = waited.count(|what| what.contains(" pods") || what.contains(" events"));
        let context =
            format!("{pods} pods on {} nodes wait for one image; all agents' writes: {}", NODES - 1, waited.describe());
        figure("api_writes_per_waiting_pod", for_pods as f64 / pods as f64, &context);
        idle(nodes).await
    })
}

async fn idle(nodes: &Nodes) -> Result<(), BenchError> {
    let before = ApiWrites::so_far(nodes);
    sleep(IDLE).await;
    let written = ApiWrites::so_far(nodes).since(&before);
    let hours = IDLE.as_secs_f64() * NODES as f64 / 3600.0;
    let context = format!(
        "per agent; {NODES} agents, {} s: {}; token renewals, every 45 to 51 minutes, are outside the period",
        IDLE.as_secs(),
        written.describe()
    );
    figure("api_writes_idle_per_hour", written.count(|_| true) as f64 / hours, &context);
    Ok(())
}

/// Number of create, update, patch and delete requests of agents, by verb and resource.
struct ApiWrites(BTreeMap<String, usize>);

impl ApiWrites {
    fn so_far(nodes: &Nodes) -> Self {
        let agents = format!("system:serviceaccount:{}:", nodes.kubernetes.name);
        let mut counts = BTreeMap::new();
        for entry in nodes.kubernetes.server.audit() {
            let text = |field: &Value| field.as_str().unwrap_or_default().to_owned();
            let verb = text(&entry["verb"]);
            let is_write = !["get", "list", "watch"].contains(&verb.as_str());
            if is_write && text(&entry["user"]["username"]).starts_with(&agents) {
                let (resource, part) =
                    (text(&entry["objectRef"]["resource"]), text(&entry["objectRef"]["subresource"]));
                *counts.entry(format!("{verb} {resource}/{part}").trim_end_matches('/').to_owned()).or_default() += 1;
            }
        }
        Self(counts)
    }

    fn since(&self, before: &Self) -> Self {
        let counts = self.0.iter().map(|(what, count)| (what.clone(), count - before.0.get(what).unwrap_or(&0)));
        Self(counts.filter(|(_, count)| *count > 0).collect())
    }

    fn count(&self, is_counted: impl Fn(&str) -> bool) -> usize {
        self.0.iter().filter(|(what, _)| is_counted(what)).map(|(_, count)| count).sum()
    }

    fn describe(&self) -> String {
        let counts: Vec<_> = self.0.iter().map(|(what, count)| format!("{what} {count}")).collect();
        if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }
    }
}

/// Pods on all nodes but the first fail to pull the image, are nudged, and run.
async fn recover_waiting_pods(nodes: &Nodes, image: &Reference) -> Result<(), BenchError> {
    let kubernetes = &nodes.kubernetes;
    let allow = json!({ "metadata": { "annotations": { "lighterman.dev/allow": "true" } } });
    let namespaces = Api::<Namespace>::all(kubernetes.admin.clone());
    namespaces.patch(&kubernetes.name, &PatchParams::default(), &Patch::Merge(allow)).await?;
    let pods = kubernetes.pods();
    let mut names = Vec::new();
    for node in 1..NODES {
        for number in 0..PODS {
            let name = format!("waits-{node}-{number}");
            let pod = json!({
                "metadata": { "name": name, "annotations": { "lighterman.dev/recover": "true" } },
                "spec": {
                    "nodeName": nodes.agents[node].node,
                    "containers": [{ "name": "main", "image": image.to_string() }],
                },
            });
            create::<Pod>(&pods, pod).await;
            names.push(name);
        }
    }
    let message = format!("failed to pull and unpack image \"{image}\": dial tcp: connect: connection refused");
    let waiting = json!({ "waiting": { "reason": "ErrImagePull", "message": message } });
    for name in &names {
        set_state(&pods, name, &waiting).await?;
    }
    let began = Instant::now();
    for name in &names {
        // After a nudge the kubelet looks for the image and starts the container.
        while !is_nudged(&pods.get(name).await?) {
            if began.elapsed() > WAIT_DEADLINE {
                return Err(format!("{name} is not nudged:\n{}", nodes.agents[1].log_tail()).into());
            }
            sleep(SETTLE / 10).await;
        }
        set_state(&pods, name, &json!({ "running": { "startedAt": "2030-01-01T00:00:00Z" } })).await?;
    }
    Ok(())
}

fn is_nudged(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key("lighterman.dev/nudged-at"))
}

/// Writes the state of the pod's container, as a kubelet does.
async fn set_state(pods: &Api<Pod>, name: &str, state: &Value) -> Result<(), BenchError> {
    let container =
        json!({ "name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state });
    let status = json!({ "status": { "containerStatuses": [container] } });
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

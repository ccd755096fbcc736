//! A stolen token of one agent against running pods: the chart's admission policy denies all
//! patches but the nudge.

use serde_json::{Value, json};

use super::unauthenticated_peers::token;
use super::{agent_pod, agent_restarts, ensure};
use crate::test_bed::{NODES, TestBed, TestError};

/// Runs before `a_terminated_agent_ends_within_its_grace_period`, which replaces a pod.
pub(super) fn stolen_token(bed: &TestBed) -> Result<(), TestError> {
    let [own, other] = [NODES[2].0, NODES[0].0];
    let restarts = || -> Result<_, TestError> { Ok([agent_restarts(bed, own)?, agent_restarts(bed, other)?]) };
    let before = restarts()?;
    let pod = agent_pod(bed, own)?;
    let token = token(bed, "lighterman", "lighterman", "", Some(&pod))?;
    let nudge = json!({"metadata": {"annotations": {"lighterman.dev/nudged-at": "2026-11-30T14:16:51Z"}}});
    let attacks = [
        json!({"metadata": {"labels": {"app.kubernetes.io/name": null}}}),
        json!({"status": {"podIP": "10.9.9.9", "podIPs": [{"ip": "10.9.9.9"}]}}),
        json!({"status": {"phase": "Failed"}}),
    ];
    for (node, nudged) in [(own, "200"), (other, "403")] {
        let pod = agent_pod(bed, node)?;
        for attack in &attacks {
            let code = patch_status(bed, &token, &pod, attack)?;
            ensure(code == "403", format!("{attack} on {node} answers {code}"))?;
        }
        let code = patch_status(bed, &token, &pod, &nudge)?;
        ensure(code == nudged, format!("a nudge on {node} answers {code}"))?;
        ensure(agent_pod(bed, node)?["metadata"]["uid"] == pod["metadata"]["uid"], "the pod was replaced")?;
    }
    ensure(restarts()? == before, "a pod was killed")
}

/// The status code of a patch of `pods/status`, authorized only by this token.
fn patch_status(bed: &TestBed, token: &str, pod: &Value, patch: &Value) -> Result<String, TestError> {
    let server = bed.kubectl(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"])?;
    let field = |name: &str| pod["metadata"][name].as_str().unwrap_or_default();
    let path = format!("api/v1/namespaces/{}/pods/{}/status", field("namespace"), field("name"));
    let (url, bearer) = (format!("{}/{path}", server.trim()), format!("Authorization: Bearer {token}"));
    let kind = "Content-Type: application/merge-patch+json";
    let answer = ["-sk", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PATCH"];
    let request = ["-H", &bearer, "-H", kind, "-d", &patch.to_string(), &url];
    bed.ctl(&[&["in", "hub", "curl"], &answer[..], &request[..]].concat())
}

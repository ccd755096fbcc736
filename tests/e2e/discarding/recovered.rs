//! Every image whose layers all nodes discarded reaches other nodes while the registry is down:
//! images that were pulled while agents ran, and images that were pulled before any agent was
//! installed.

use super::{BACKGROUND_DEADLINE, DiscardedImage, NAMESPACE_BEFORE_AGENTS, collect, install, nodes};
use crate::pods::{TestNamespace, WAIT_DEADLINE, is_running};
use crate::scenarios::{RegistryDown, ensure};
use crate::test_bed::{REGISTRY, TestBed, TestError, wait_for};

/// Versions of containerd whose pulls an agent retains in full.
const EXACT: [&str; 2] = ["2.3", "2.4"];

/// An image that one node has and other nodes need.
struct ProvidedImage {
    provider: &'static str,
    containerd: &'static str,
    /// Prefix of pod names.
    kind: &'static str,
    image: String,
}

pub(super) fn every_image(bed: &TestBed) -> Result<(), TestError> {
    // The bed's registry speaks plain HTTP, which agents use only by this setting.
    install(bed, &[("LIGHTERMAN_INSECURE_REGISTRY", REGISTRY)])?;
    let fresh = TestNamespace { bed, name: NAMESPACE_BEFORE_AGENTS.to_owned() };
    let steady = TestNamespace::new(bed, "e2e-steady")?;
    let mut images = pull_while_agents_run(bed, &steady)?;
    images.extend(nodes().into_iter().map(|(provider, containerd)| {
        let image = format!("{REGISTRY}/fresh/{provider}:v1");
        ProvidedImage { provider, containerd, kind: "fresh", image }
    }));
    let complete = wait_complete(bed);
    for (node, _) in nodes() {
        collect(bed, node)?;
    }
    let _down = RegistryDown::now(bed)?;
    let score = recover(&steady, &images)?;
    drop(fresh);
    let mut failed = complete.err().into_iter().collect::<Vec<_>>();
    for (figure, versions) in [
        ("discarded_layers_recovered", &EXACT[..]),
        ("discarded_layers_recovered_1_7", &["1.7"]),
        ("discarded_layers_recovered_2_0", &["2.0"]),
    ] {
        let of_versions: Vec<_> =
            score.iter().filter(|(provided, ..)| versions.contains(&provided.containerd)).collect();
        let recovered = of_versions.iter().filter(|(.., ran)| *ran).count();
        if !of_versions.is_empty() {
            println!("\nfigure {figure} {recovered}/{}", of_versions.len());
        }
        for (ProvidedImage { provider, kind, image, .. }, node, _) in of_versions.iter().filter(|(.., ran)| !ran) {
            println!("  {kind}: {image} did not come from {provider} to {node}");
        }
        if versions == EXACT && recovered < of_versions.len() {
            failed.push(format!("{recovered} of {} pods run\n{}", of_versions.len(), bed.diagnostics()));
        }
    }
    ensure(failed.is_empty(), failed.join("\n"))
}

/// Lets each node pull an image by tag and one by digest.
fn pull_while_agents_run(bed: &TestBed, space: &TestNamespace) -> Result<Vec<ProvidedImage>, TestError> {
    let mut pulled = Vec::new();
    for (provider, containerd) in nodes() {
        for kind in ["tag", "digest"] {
            let image = DiscardedImage::push(bed, &format!("steady/{kind}-{provider}:v1"))?;
            let name = if kind == "tag" { image.by_tag.clone() } else { image.by_digest.clone() };
            let pod = format!("{kind}-held-by-{provider}");
            space.pod(&pod, provider, &name, true)?;
            pulled.push((pod, image, ProvidedImage { provider, containerd, kind, image: name }));
        }
    }
    for (pod, image, provided) in &pulled {
        space.wait_running(pod)?;
        collect(bed, provided.provider)?;
        let (kept_layers, all) = (image.layers_on(bed, provided.provider)?, image.layers.len());
        println!("  containerd {} kept {kept_layers} of {all} layers of {}", provided.containerd, provided.image);
        ensure(
            kept_layers == all || !EXACT.contains(&provided.containerd),
            format!("{kept_layers} of {all} layers are left of {}", provided.image),
        )?;
    }
    Ok(pulled.into_iter().map(|(.., provided)| provided).collect())
}

/// Waits until no node lacks layers. After the deadline, nodes without a target may still lack
/// layers.
fn wait_complete(bed: &TestBed) -> Result<(), TestError> {
    let mut lacking = Vec::new();
    let waited = wait_for("the nodes to lack no layers", BACKGROUND_DEADLINE, || {
        lacking.clear();
        for (node, containerd) in nodes() {
            if bed.metric(node, "lighterman_images_lacking_layers")? > 0.0 {
                lacking.push((node, containerd));
            }
        }
        Ok(lacking.is_empty().then_some(()))
    });
    let is_exact = lacking.iter().any(|(_, containerd)| EXACT.contains(containerd));
    waited.or_else(|error| ensure(!is_exact, format!("{error}: {lacking:?}")))
}

/// Creates a pod of each image on every other node, and reports which pods run a recovered image.
fn recover<'a>(
    space: &TestNamespace,
    images: &'a [ProvidedImage],
) -> Result<Vec<(&'a ProvidedImage, &'static str, bool)>, TestError> {
    let mut pods = Vec::new();
    for provided in images {
        for (node, _) in nodes().into_iter().filter(|(node, _)| *node != provided.provider) {
            let pod = format!("{}-from-{}-to-{node}", provided.kind, provided.provider);
            space.pod(&pod, node, &provided.image, true)?;
            pods.push((provided, node, pod));
        }
    }
    let mut runs = vec![false; pods.len()];
    // The figures count pods that do not run, so the result of this wait is ignored.
    let _ = wait_for("every pod to run", WAIT_DEADLINE, || {
        for ((_, _, pod), runs) in pods.iter().zip(&mut runs).filter(|(_, runs)| !**runs) {
            *runs = is_running(&space.get_pod(pod)?) && !space.events(pod, "ImageRecovered")?.is_empty();
        }
        Ok(runs.iter().all(|runs| *runs).then_some(()))
    });
    Ok(pods.into_iter().zip(runs).map(|((provided, node, _), ran)| (provided, node, ran)).collect())
}

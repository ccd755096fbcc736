//! Every image whose layers all nodes discarded reaches other nodes while the registry is down:
//! images that were pulled while agents ran, and images that were pulled before any agent was
//! installed.

use super::{FRESH, IN_THE_BACKGROUND, Image, collect, install, nodes};
use crate::bed::{Bed, Failure, REGISTRY, wait_for};
use crate::pods::{PATIENCE, Space, is_running};
use crate::scenarios::{RegistryDown, ensure};

/// Versions of containerd whose pulls an agent retains in full.
const EXACT: [&str; 2] = ["2.3", "2.4"];

/// An image that one node has and other nodes need.
struct Held {
    holder: &'static str,
    containerd: &'static str,
    /// Begins the names of pods.
    kind: &'static str,
    image: String,
}

pub(super) fn every_image(bed: &Bed) -> Result<(), Failure> {
    // The bed's registry speaks plain HTTP, which the agents have to be told.
    install(bed, &[("LIGHTERMAN_INSECURE_REGISTRY", REGISTRY)])?;
    let fresh = Space { bed, name: FRESH.to_owned() };
    let steady = Space::new(bed, "e2e-steady")?;
    let mut held = pull_while_agents_run(bed, &steady)?;
    held.extend(nodes().into_iter().map(|(holder, containerd)| {
        let image = format!("{REGISTRY}/fresh/{holder}:v1");
        Held { holder, containerd, kind: "fresh", image }
    }));
    let complete = wait_complete(bed);
    for (node, _) in nodes() {
        collect(bed, node)?;
    }
    let _down = RegistryDown::now(bed)?;
    let score = recover(&steady, &held)?;
    drop(fresh);
    let mut failed = complete.err().into_iter().collect::<Vec<_>>();
    for (figure, versions) in [
        ("discarded_layers_recovered", &EXACT[..]),
        ("discarded_layers_recovered_1_7", &["1.7"]),
        ("discarded_layers_recovered_2_0", &["2.0"]),
    ] {
        let of_versions: Vec<_> = score.iter().filter(|(held, ..)| versions.contains(&held.containerd)).collect();
        let recovered = of_versions.iter().filter(|(.., ran)| *ran).count();
        if !of_versions.is_empty() {
            println!("\nfigure {figure} {recovered}/{}", of_versions.len());
        }
        for (Held { holder, kind, image, .. }, node, _) in of_versions.iter().filter(|(.., ran)| !ran) {
            println!("  {kind}: {image} did not come from {holder} to {node}");
        }
        if versions == EXACT && recovered < of_versions.len() {
            failed.push(format!("{recovered} of {} pods run\n{}", of_versions.len(), bed.agents_story()));
        }
    }
    ensure(failed.is_empty(), failed.join("\n"))
}

/// Each node pulls an image by tag and one by digest.
fn pull_while_agents_run(bed: &Bed, space: &Space) -> Result<Vec<Held>, Failure> {
    let mut pulled = Vec::new();
    for (holder, containerd) in nodes() {
        for kind in ["tag", "digest"] {
            let image = Image::push(bed, &format!("steady/{kind}-{holder}:v1"))?;
            let name = if kind == "tag" { image.by_tag.clone() } else { image.by_digest.clone() };
            let pod = format!("{kind}-held-by-{holder}");
            space.pod(&pod, holder, &name, true)?;
            pulled.push((pod, image, Held { holder, containerd, kind, image: name }));
        }
    }
    for (pod, image, held) in &pulled {
        space.wait_running(pod)?;
        collect(bed, held.holder)?;
        let (kept, all) = (image.layers_on(bed, held.holder)?, image.layers.len());
        println!("  containerd {} kept {kept} of {all} layers of {}", held.containerd, held.image);
        ensure(
            kept == all || !EXACT.contains(&held.containerd),
            format!("{kept} of {all} layers are left of {}", held.image),
        )?;
    }
    Ok(pulled.into_iter().map(|(.., held)| held).collect())
}

/// Waits until no node lacks layers of images that are to have them. Nodes without a target do not
/// count afterwards.
fn wait_complete(bed: &Bed) -> Result<(), Failure> {
    let mut lacking = Vec::new();
    let waited = wait_for("the nodes to lack no layers", IN_THE_BACKGROUND, || {
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

/// Makes a pod of each image on every other node, and says which of the pods run with an image from
/// peers.
fn recover<'a>(space: &Space, held: &'a [Held]) -> Result<Vec<(&'a Held, &'static str, bool)>, Failure> {
    let mut pods = Vec::new();
    for it in held {
        for (node, _) in nodes().into_iter().filter(|(node, _)| *node != it.holder) {
            let pod = format!("{}-from-{}-to-{node}", it.kind, it.holder);
            space.pod(&pod, node, &it.image, true)?;
            pods.push((it, node, pod));
        }
    }
    let mut runs = vec![false; pods.len()];
    // Figures count what did not come, so this wait may end in vain.
    let _ = wait_for("every pod to run", PATIENCE, || {
        for ((_, _, pod), runs) in pods.iter().zip(&mut runs).filter(|(_, runs)| !**runs) {
            *runs = is_running(&space.get_pod(pod)?) && !space.events(pod, "ImageSalvaged")?.is_empty();
        }
        Ok(runs.iter().all(|runs| *runs).then_some(()))
    });
    Ok(pods.into_iter().zip(runs).map(|((held, node, _), ran)| (held, node, ran)).collect())
}

//! Two nodes provide an image to a third node, and a provider dies or lies.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use lighterman::control::PullProgress;
use lighterman::oci::{Descriptor, PieceLayout, Reference};
use lighterman::testing::image::MadeImage;
use rand::RngCore;
use tokio::sync::oneshot;

use crate::nodes::{Nodes, name_of, pull, spread, with_nodes};
use crate::report::{BenchError, figure, median, note};
use crate::storage::Storage;

const NODES: usize = 3;
const HONEST_PROVIDER: usize = 0;
/// The provider that dies or lies.
const FAULTY_PROVIDER: usize = 1;
const FETCHER: usize = 2;

/// Rate of every link in each direction. The fetcher cannot receive more than a single provider can
/// send.
const MBIT_S: u32 = 200;

const LAYER: u64 = 128 << 20;

/// Fetched share of the image when the provider is killed.
const KILLED_AT: f64 = 0.4;

const ROUNDS: u64 = 3;

/// Space for the image on every node, twice, and for the containerds.
const NEEDED: u64 = 3 << 30;

pub(crate) fn killed() -> Result<(), BenchError> {
    with_nodes(Storage::memory(NEEDED)?, NODES, async |nodes| {
        nodes.limit_rate(MBIT_S)?;
        let (mut added, mut undisturbed) = (Vec::new(), Vec::new());
        // The first round warms up.
        for round in 0..=ROUNDS {
            let quiet = recover(nodes, 2 * round).await?.as_secs_f64();
            let killed = recover_while_a_provider_dies(nodes, 2 * round + 1).await?.as_secs_f64();
            note(&format!("undisturbed {quiet:.2} s, with a killed provider {killed:.2} s"));
            added.extend((round > 0).then_some(killed - quiet));
            undisturbed.extend((round > 0).then_some(quiet));
        }
        let context = format!(
            "SIGKILL to one of two providers at {:.0} % of {} MiB, {MBIT_S} Mbit/s each way, undisturbed {:.2} s; {}",
            100.0 * KILLED_AT,
            LAYER >> 20,
            median(undisturbed),
            spread(&added),
        );
        figure("provider_killed_added_s", median(added), &context);
        Ok(())
    })
}

async fn provide(nodes: &Nodes, seed: u64) -> Result<(Reference, MadeImage), BenchError> {
    let reference = name_of("faults", seed)?;
    nodes.put_image_on(HONEST_PROVIDER, &reference, &[LAYER], seed).await?;
    let image = nodes.put_image_on(FAULTY_PROVIDER, &reference, &[LAYER], seed).await?;
    nodes.wait_providers(&reference, [FETCHER], &[HONEST_PROVIDER, FAULTY_PROVIDER]).await?;
    Ok((reference, image))
}

async fn recover(nodes: &Nodes, seed: u64) -> Result<Duration, BenchError> {
    let (reference, image) = provide(nodes, seed).await?;
    let took = pull(&nodes.agents[FETCHER], &reference, |_| ()).await?;
    nodes.check([FETCHER], &reference, &image)?;
    nodes.remove_images()?;
    Ok(took)
}

async fn recover_while_a_provider_dies(nodes: &mut Nodes, seed: u64) -> Result<Duration, BenchError> {
    let (reference, image) = provide(nodes, seed).await?;
    let (providers, fetchers) = nodes.agents.split_at_mut(FETCHER);
    let (kill_sender, kill_receiver) = oneshot::channel::<()>();
    let mut kill_sender = Some(kill_sender);
    let on_progress = |progress: &PullProgress| match progress {
        // Dropping the sender ends the wait of `killing`.
        PullProgress::Bytes { done, total } if *done as f64 >= KILLED_AT * *total as f64 => drop(kill_sender.take()),
        _ => {}
    };
    let killing = async {
        let _ = kill_receiver.await;
        providers[FAULTY_PROVIDER].kill();
    };
    let (took, ()) = tokio::join!(pull(&fetchers[0], &reference, on_progress), killing);
    let took = took?;
    nodes.agents[FAULTY_PROVIDER].start(&nodes.network);
    nodes.wait_providers(&reference, [FETCHER], &[FAULTY_PROVIDER]).await?;
    nodes.check([FETCHER], &reference, &image)?;
    nodes.remove_images()?;
    Ok(took)
}

pub(crate) fn liar() -> Result<(), BenchError> {
    with_nodes(Storage::memory(NEEDED)?, NODES, async |nodes| {
        nodes.limit_rate(MBIT_S)?;
        let mut pieces = Vec::new();
        for round in 0..ROUNDS {
            pieces.push(recover_beside_a_liar(nodes, 100 + round).await?);
            // The agent's record of faults ends with the process.
            nodes.agents[FETCHER].kill();
            nodes.agents[FETCHER].start(&nodes.network);
            nodes.wait_ready().await?;
        }
        let context = format!(
            "two providers of {} MiB, and one file is overwritten; all pieces of the liar, with those in flight and partial ones; {}",
            LAYER >> 20,
            spread(&pieces)
        );
        figure("liar_found_pieces", median(pieces), &context);
        Ok(())
    })
}

/// Recovers an image while a provider lies. Returns the number of pieces that the liar sent.
async fn recover_beside_a_liar(nodes: &Nodes, seed: u64) -> Result<f64, BenchError> {
    let (reference, image) = provide(nodes, seed).await?;
    let layer = image.blobs.iter().max_by_key(|blob| blob.size).ok_or("an image without blobs")?;
    damage(nodes, layer)?;
    let sent = async || nodes.metric(FAULTY_PROVIDER, "lighterman_served_bytes_total").await;
    let before = sent().await?;
    let took = pull(&nodes.agents[FETCHER], &reference, |_| ()).await?;
    let pieces = (sent().await? - before) / PieceLayout::for_size(layer.size).piece_length(0) as f64;
    nodes.check([FETCHER], &reference, &image)?;
    let faults = nodes.metric(FETCHER, r#"lighterman_peer_faults_total{fault="lied"}"#).await?;
    let seconds = took.as_secs_f64();
    note(&format!("recovered in {seconds:.2} s; the liar sent {pieces:.2} pieces; {faults} faults were recorded"));
    nodes.remove_images()?;
    Ok(pieces)
}

/// Overwrites the whole file, which containerd does not notice.
fn damage(nodes: &Nodes, layer: &Descriptor) -> Result<(), BenchError> {
    let file = std::fs::File::options().write(true).open(nodes.containerds[FAULTY_PROVIDER].file_of(layer.digest))?;
    let mut wrong = vec![0; 1 << 20];
    for offset in (0..layer.size).step_by(wrong.len()) {
        rand::rng().fill_bytes(&mut wrong);
        let length = wrong.len().min(usize::try_from(layer.size - offset)?);
        file.write_all_at(&wrong[..length], offset)?;
    }
    Ok(())
}

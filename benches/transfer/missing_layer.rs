//! The recovery of an image with one of ten layers missing.

use tokio::time::sleep;

use crate::fleet::network::LinkBytes;
use crate::nodes::{Nodes, SETTLE, name_of, pull, spread, with_nodes};
use crate::report::{BenchError, figure, median, note};
use crate::storage::Storage;

const PROVIDER: usize = 0;
const FETCHER: usize = 1;

const LAYERS: [u64; 10] = [32 << 20; 10];

/// Space for the image on both nodes, twice, and for the containerds.
const NEEDED: u64 = 3 << 30;

const ROUNDS: u64 = 3;

/// Smallest headers of a packet, besides QUIC frames: Ethernet 14, IPv4 20, UDP 8, and of QUIC's
/// short header the first byte, a connection ID of 8, one byte of the packet number, and the tag of
/// 16.
const HEADERS: u64 = 14 + 20 + 8 + 1 + 8 + 1 + 16;

pub(crate) fn run() -> Result<(), BenchError> {
    with_nodes(Storage::memory(NEEDED)?, 2, async |nodes| {
        let (mut streams, mut links, mut blobs) = (Vec::new(), Vec::new(), Vec::new());
        for seed in 0..ROUNDS {
            let TransferredBytes { layer, blob, link } = recover_one_layer(nodes, seed).await?;
            let frames = link.sent + link.received - HEADERS * link.packets;
            streams.push(frames as f64 / layer);
            links.push((link.sent + link.received) as f64 / layer);
            blobs.push(blob / layer);
        }
        note(&format!("frames {}; link {}", spread(&streams), spread(&links)));
        let context = format!(
            "10 layers of {} MiB, 9 present; both directions, packets without headers: blobs, hash chains, requests, acknowledgements, gossip; on the link, Ethernet headers included, {:.3}; blobs alone {:.4}",
            LAYERS[0] >> 20,
            median(links),
            median(blobs),
        );
        figure("missing_layer_bytes_ratio", median(streams), &context);
        Ok(())
    })
}

struct TransferredBytes {
    /// Size of the missing layer.
    layer: f64,
    /// Bytes of fetched blobs.
    blob: f64,
    link: LinkBytes,
}

async fn recover_one_layer(nodes: &Nodes, seed: u64) -> Result<TransferredBytes, BenchError> {
    let (wanted, older) = (name_of("ten-layers", seed)?, name_of("nine-layers", seed)?);
    let image = nodes.put_image_on(PROVIDER, &wanted, &LAYERS, seed).await?;
    nodes.put_image_on(FETCHER, &older, &LAYERS[..9], seed).await?;
    nodes.wait_providers(&wanted, [FETCHER], &[PROVIDER]).await?;
    let fetched_bytes = async || nodes.metric(FETCHER, "lighterman_fetched_bytes_total").await;
    let (fetched_before, before) = (fetched_bytes().await?, nodes.network.link_bytes()[FETCHER]);
    pull(&nodes.agents[FETCHER], &wanted, |_| ()).await?;
    // Waits for the last packets and acknowledgements. Gossip that the recovery causes counts too.
    sleep(SETTLE).await;
    let (link, blob) = (nodes.network.link_bytes()[FETCHER].since(before), fetched_bytes().await? - fetched_before);
    nodes.check([FETCHER], &wanted, &image)?;
    nodes.remove_images()?;
    let layer = image.blobs.iter().map(|blob| blob.size).max().ok_or("an image without blobs")? as f64;
    Ok(TransferredBytes { layer, blob, link })
}

//! An image of 10 GiB, and an agent's memory during the recovery.

use crate::cpu::peak_mib;
use crate::nodes::{name_of, pull, with_nodes};
use crate::report::{BenchError, figure, mb_s, note};
use crate::storage::Storage;

const PROVIDER: usize = 0;
const FETCHER: usize = 1;

/// 10 GiB. `put_image` makes the largest layer in memory.
const LAYERS: [u64; 10] = [1 << 30; 10];

/// Space for the image on both nodes, for a layer on its way through the content API, and for the
/// containerds.
const NEEDED: u64 = 23 << 30;

pub(crate) fn run() -> Result<(), BenchError> {
    with_nodes(Storage::disk(NEEDED)?, 2, async |nodes| {
        note("making an image of 10 GiB");
        let reference = name_of("large", 1)?;
        let image = nodes.put_image_on(PROVIDER, &reference, &LAYERS, 1).await?;
        nodes.wait_providers(&reference, [FETCHER], &[PROVIDER]).await?;
        let peak = |node: usize| peak_mib(nodes.agents[node].id().ok_or("the agent does not run")?);
        let (idle, idle_serving) = (peak(FETCHER)?, peak(PROVIDER)?);
        let took = pull(&nodes.agents[FETCHER], &reference, |_| ()).await?.as_secs_f64();
        let (recovering, serving) = (peak(FETCHER)?, peak(PROVIDER)?);
        nodes.check([FETCHER], &reference, &image)?;
        let context = format!(
            "VmHWM of the fetching agent, from {idle:.1} before; the serving agent {serving:.1}, from {idle_serving:.1}; {took:.0} s, {:.0} MB/s, stores on disk",
            mb_s(image.bytes(), took),
        );
        figure("recover_10gib_rss_mib", recovering, &context);
        Ok(())
    })
}

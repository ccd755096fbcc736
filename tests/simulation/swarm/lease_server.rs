//! An API server with one Lease for each zone. The real code decides the claims.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use lighterman::decide::claim::{LeaseStep, lease_step};
use lighterman::model::{LeaseSnapshot, LeaseVersion, NodeName, PeerId, Zone};

#[derive(Default)]
pub(super) struct LeaseServer {
    leases: HashMap<Zone, (usize, LeaseSnapshot)>,
    pub(super) writes: usize,
}

pub(super) fn name(node: usize) -> NodeName {
    format!("n{node}").parse().expect("a name")
}

fn clock(now: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000) + Duration::from_micros(now)
}

impl LeaseServer {
    pub(super) fn read(&self, zone: &Zone, node: usize, now: u64) -> LeaseStep {
        lease_step(self.leases.get(zone).map(|(_, lease)| lease), &name(node), clock(now))
    }

    /// Writes a Lease. False if another node wrote first; the attempt counts as a write too.
    pub(super) fn write(&mut self, zone: &Zone, node: usize, step: &LeaseStep, now: u64) -> bool {
        self.writes += 1;
        let current = self.leases.get(zone).map(|(_, lease)| lease.version.clone());
        let fits = match step {
            LeaseStep::Create => current.is_none(),
            LeaseStep::Update(version) => current.as_ref() == Some(version),
            LeaseStep::Skip => false,
        };
        if fits {
            let version = LeaseVersion(self.writes.to_string());
            let lease = LeaseSnapshot { holder: Some(name(node).to_string()), renewed: Some(clock(now)), version };
            self.leases.insert(zone.clone(), (node, lease));
        }
        fits
    }

    pub(super) fn release(&mut self, zone: &Zone) {
        self.writes += 1;
        self.leases.remove(zone);
    }

    pub(super) fn holder(&self, zone: &Zone, peer: impl Fn(usize) -> PeerId) -> Option<PeerId> {
        self.leases.get(zone).map(|(node, _)| peer(*node))
    }
}

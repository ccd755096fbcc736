//! How much of a node's file systems an image may take: the figures, and the limits.
//!
//! An image takes room twice. Its compressed blobs go to containerd's content store, and its layers
//! are unpacked into a snapshotter. Both are on one file system as a rule, and on two where an
//! operator moved one of them. Not here: asking a file system, and the account of concurrent
//! recoveries ([`super::disk_reservations`]).

use std::fmt;

use super::plan::OverLimit;

/// A file system, as `statvfs` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// Device number of its files. `None` where the figures come from an overlay, which has a
    /// device number of its own.
    pub device: Option<u64>,
    /// Bytes that can be written without privileges. The kubelet counts these as available.
    pub free: u64,
    /// Bytes of the whole file system. The kubelet counts these as its capacity.
    pub total: u64,
}

impl FileSystem {
    /// Two file systems of one size count as one where a device number is unknown: that asks for
    /// more room, never for less.
    fn is_same_as(&self, other: &Self) -> bool {
        match (self.device, other.device) {
            (Some(one), Some(another)) => one == another,
            _ => self.total == other.total,
        }
    }
}

/// The file systems that images are kept on, as far as the agent sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Disks {
    /// The content store's.
    pub content: Option<FileSystem>,
    /// The snapshotter's.
    pub snapshots: Option<FileSystem>,
}

impl Disks {
    /// Nothing is visible, so nothing is checked.
    pub fn are_unknown(&self) -> bool {
        self.content.is_none() && self.snapshots.is_none()
    }
}

/// Bytes that an image takes, or that recoveries were promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskNeed {
    /// In the content store.
    pub download: u64,
    /// In the snapshotter.
    pub unpack: u64,
}

impl DiskNeed {
    /// Of an image that misses so many compressed bytes. A manifest does not give the size of
    /// unpacked layers, so this counts the least: a layer takes as much again. The real size is
    /// read from the layer and checked before it is unpacked.
    pub fn of_missing(bytes: u64) -> Self {
        Self { download: bytes, unpack: bytes }
    }

    pub(super) fn is_zero(self) -> bool {
        self == Self::default()
    }

    /// Sizes come from manifests, so sums are saturating.
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            download: self.download.saturating_add(other.download),
            unpack: self.unpack.saturating_add(other.unpack),
        }
    }
}

/// Bytes and percentages that a file system keeps free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskFloors {
    /// In bytes, whatever the percentages say.
    pub min_free_bytes: u64,
    /// Percent in use from which the kubelet collects images (`imageGCHighThresholdPercent`).
    pub image_gc_percent: u8,
    /// Percent free below which the kubelet evicts pods (`evictionHard`, `imagefs.available`).
    pub eviction_percent: u8,
}

impl DiskFloors {
    /// Bytes that a download leaves free on a file system of `total` bytes: it crosses neither
    /// line.
    pub fn download_floor(&self, total: u64) -> u64 {
        let collection = percent_of(total, 100_u8.saturating_sub(self.image_gc_percent));
        self.unpack_floor(total).max(collection)
    }

    /// Bytes that are free when the layers are unpacked. The layers may cross the collection line:
    /// the kubelet then collects unused images, as after its own pulls. The layers never cross the
    /// eviction line.
    pub fn unpack_floor(&self, total: u64) -> u64 {
        self.min_free_bytes.max(percent_of(total, self.eviction_percent))
    }
}

/// Rounded up. The kubelet's line is exact, and one byte below it evicts.
fn percent_of(total: u64, percent: u8) -> u64 {
    let exact = (u128::from(total) * u128::from(percent)).div_ceil(100);
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// The file system that lacks room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Volume {
    /// Of containerd's content store and its snapshotter.
    Both,
    /// Of the content store alone.
    Content,
    /// Of the snapshotter alone.
    Snapshots,
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "the file system of containerd's content store and snapshotter",
            Self::Content => "the file system of containerd's content store",
            Self::Snapshots => "the file system of containerd's snapshotter",
        })
    }
}

/// Whether `need` fits beside what other recoveries were promised and have not written yet.
///
/// # Errors
/// [`OverLimit::Disk`] with the figures of the file system that lacks room.
pub fn check(need: DiskNeed, reserved: DiskNeed, disks: Disks, lines: DiskFloors) -> Result<(), OverLimit> {
    if need.is_zero() {
        return Ok(());
    }
    let (content, snapshots) = match disks {
        Disks { content: None, snapshots: None } => return Ok(()),
        // containerd keeps both below one root unless it is told otherwise.
        Disks { content: Some(one), snapshots: None } | Disks { content: None, snapshots: Some(one) } => (one, None),
        Disks { content: Some(content), snapshots: Some(snapshots) } => {
            (content, Some(snapshots).filter(|snapshots| !snapshots.is_same_as(&content)))
        }
    };
    let (floor_of, volume) =
        (DiskFloors::download_floor, if snapshots.is_none() { Volume::Both } else { Volume::Content });
    fits(volume, content, need.download, reserved.download, floor_of(&lines, content.total))?;
    match snapshots {
        Some(snapshots) => {
            let floor = lines.unpack_floor(snapshots.total);
            fits(Volume::Snapshots, snapshots, need.unpack, reserved.unpack, floor)
        }
        None => {
            let sum = |need: DiskNeed| need.download.saturating_add(need.unpack);
            fits(Volume::Both, content, sum(need), sum(reserved), lines.unpack_floor(content.total))
        }
    }
}

fn fits(volume: Volume, disk: FileSystem, need: u64, reserved: u64, floor: u64) -> Result<(), OverLimit> {
    let free = disk.free;
    match need > 0 && need.saturating_add(reserved).saturating_add(floor) > free {
        true => Err(OverLimit::Disk { volume, need, reserved, free, floor }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;

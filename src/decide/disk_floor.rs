//! The room of a node's file systems for an image: figures and limits.
//!
//! An image needs room twice. Its compressed blobs go to containerd's content store, and its layers
//! are unpacked into a snapshotter. Both are usually on one file system, and on two where an
//! operator moved one of them. Not here: the calls of `statvfs`, and the account of concurrent
//! recoveries ([`super::disk_reservations`]).

use std::fmt;

/// A file system, as `statvfs` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// Device number of the files. `None` for figures of an overlay, which has its own device
    /// number.
    pub device: Option<u64>,
    /// Bytes that an unprivileged process can write. The kubelet counts these as available.
    pub free: u64,
    /// Bytes of the whole file system. The kubelet counts these as its capacity.
    pub total: u64,
}

impl FileSystem {
    /// Two file systems of one size count as one where a device number is unknown. This can only
    /// require more room, never less.
    fn is_same_as(&self, other: &Self) -> bool {
        match (self.device, other.device) {
            (Some(one), Some(another)) => one == another,
            _ => self.total == other.total,
        }
    }
}

/// The file systems of images, as far as the agent sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Disks {
    /// The content store's file system.
    pub content: Option<FileSystem>,
    /// The snapshotter's file system.
    pub snapshots: Option<FileSystem>,
}

impl Disks {
    /// Whether no file system is visible. Nothing is checked then.
    pub fn are_unknown(&self) -> bool {
        self.content.is_none() && self.snapshots.is_none()
    }
}

/// Bytes that an image needs, or that recoveries have reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskNeed {
    /// Bytes in the content store.
    pub download: u64,
    /// Bytes in the snapshotter.
    pub unpack: u64,
}

impl DiskNeed {
    /// The need of an image that lacks so many compressed bytes. A manifest does not give the size
    /// of unpacked layers, so this counts the least: each layer needs its compressed size again.
    /// The real size is read from the layer and checked before the layer is unpacked.
    pub fn of_missing(bytes: u64) -> Self {
        Self { download: bytes, unpack: bytes }
    }

    pub(super) fn is_zero(self) -> bool {
        self == Self::default()
    }

    /// Saturating, because sizes come from manifests.
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
    /// Bytes, whatever the percentages say.
    pub min_free_bytes: u64,
    /// Percent in use from which the kubelet collects images (`imageGCHighThresholdPercent`).
    pub image_gc_percent: u8,
    /// Percent free below which the kubelet evicts pods (`evictionHard`, `imagefs.available`).
    pub eviction_percent: u8,
}

impl DiskFloors {
    /// Bytes that stay free during a download on a file system of `total` bytes. A download crosses
    /// neither threshold.
    pub fn download_floor(&self, total: u64) -> u64 {
        let collection = percent_of(total, 100_u8.saturating_sub(self.image_gc_percent));
        self.unpack_floor(total).max(collection)
    }

    /// Bytes that stay free during unpacking. The layers may cross the threshold of image
    /// collection: the kubelet then collects unused images, as after its own pulls. The layers
    /// never cross the threshold of eviction.
    pub fn unpack_floor(&self, total: u64) -> u64 {
        self.min_free_bytes.max(percent_of(total, self.eviction_percent))
    }
}

/// Rounded up. The kubelet's threshold is exact: one byte below the threshold, the kubelet evicts.
fn percent_of(total: u64, percent: u8) -> u64 {
    let exact = (u128::from(total) * u128::from(percent)).div_ceil(100);
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// The file system without enough room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Volume {
    /// Shared by containerd's content store and its snapshotter.
    Both,
    /// The content store's own file system.
    Content,
    /// The snapshotter's own file system.
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

/// Checks that `need` fits beside the bytes that other recoveries have reserved and not written
/// yet.
///
/// # Errors
/// [`OverLimit::Disk`] with the figures of the file system without enough room.
pub fn check(need: DiskNeed, reserved: DiskNeed, disks: Disks, floors: DiskFloors) -> Result<(), OverLimit> {
    if need.is_zero() {
        return Ok(());
    }
    let (content, snapshots) = match disks {
        Disks { content: None, snapshots: None } => return Ok(()),
        // containerd keeps both below one root by default.
        Disks { content: Some(one), snapshots: None } | Disks { content: None, snapshots: Some(one) } => (one, None),
        Disks { content: Some(content), snapshots: Some(snapshots) } => {
            (content, Some(snapshots).filter(|snapshots| !snapshots.is_same_as(&content)))
        }
    };
    let (floor_of, volume) =
        (DiskFloors::download_floor, if snapshots.is_none() { Volume::Both } else { Volume::Content });
    fits(volume, content, need.download, reserved.download, floor_of(&floors, content.total))?;
    match snapshots {
        Some(snapshots) => {
            let floor = floors.unpack_floor(snapshots.total);
            fits(Volume::Snapshots, snapshots, need.unpack, reserved.unpack, floor)
        }
        None => {
            let sum = |need: DiskNeed| need.download.saturating_add(need.unpack);
            fits(Volume::Both, content, sum(need), sum(reserved), floors.unpack_floor(content.total))
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

/// The limit that an image exceeds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverLimit {
    /// The size limit of one image.
    #[error("the image lacks {missing} bytes on this node; --max-image-bytes or the policy file allows {limit}")]
    Size {
        /// Bytes to fetch.
        missing: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The free space of a file system.
    #[error(
        "{volume} has {free} bytes free; the image needs {need}, other recoveries have reserved {reserved}, and \
         {floor} must stay free (--min-free-bytes, --image-gc-percent, --eviction-percent or the policy file)"
    )]
    Disk {
        /// The file system without enough room.
        volume: Volume,
        /// Bytes that the image needs there.
        need: u64,
        /// Bytes reserved by other recoveries and not written yet.
        reserved: u64,
        /// Free bytes now.
        free: u64,
        /// Bytes that must stay free.
        floor: u64,
    },
}

#[cfg(test)]
mod tests;

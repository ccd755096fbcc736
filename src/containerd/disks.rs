//! The file systems of containerd's content and of its snapshots.

use std::io;
use std::path::{Path, PathBuf};

use super::ContainerdStore;
use super::content::blocking;
use crate::decide::disk_floor::{Disks, FileSystem};
use crate::files::{file_system, file_system_below_overlay};
use crate::ports::StoreError;

impl ContainerdStore {
    /// Looks for both folders on each call: an operator may mount a disk there while the agent
    /// runs.
    pub(super) async fn measure_disks(&self) -> Result<Disks, StoreError> {
        let content = self.named_content_root().await?.map(|root| root.to_path_buf());
        let snapshots = self.snapshot_folder().await?;
        let measured = blocking(move || measure(content, snapshots)).await?;
        measured
            .map_err(|error| StoreError::Other(format!("free space for containerd's content and snapshots: {error}")))
    }

    /// The folder of CRI's snapshotter, which CRI calls the image file system's mountpoint.
    async fn snapshot_folder(&self) -> Result<Option<PathBuf>, StoreError> {
        match self.has_cri().await? {
            true => Ok(self
                .cri_image_file_system()
                .await?
                .map(|folder| self.state.introspection.host_path(Path::new(&folder)))),
            false => Ok(None),
        }
    }
}

/// Without a mount of the snapshotter's folder the figures come from the agent's own root file
/// system: in a pod that is an overlay on a snapshot. devmapper and blockfile snapshots are file
/// systems of their own, and yield no figures.
fn measure(content: Option<PathBuf>, snapshots: Option<PathBuf>) -> io::Result<Disks> {
    let visible = |folder: Option<PathBuf>| -> io::Result<Option<FileSystem>> {
        folder.filter(|folder| folder.is_dir()).map(|folder| file_system(&folder)).transpose()
    };
    let snapshots = match (visible(snapshots.clone())?, snapshots) {
        (None, Some(_)) => file_system_below_overlay(Path::new("/"))?,
        (visible, _) => visible,
    };
    Ok(Disks { content: visible(content)?, snapshots })
}

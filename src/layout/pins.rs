//! Pins: one file each. The first line has the pin's end, every other line a digest.
//!
//! Except for renewals a file only grows, so a kill costs at most the last line, whose blob was not
//! begun yet. Pins are not synced: a pin serves a running process, which a power cut ends too.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::{Folder, PINS, io_error};
use crate::oci::Digest;
use crate::ports::{Pin, StoreError};
use crate::util::clock::unix_time;

impl Folder {
    pub(super) fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        let pin = Pin(format!("{:032x}", rand::random::<u128>()));
        let until = unix_time().saturating_add(life).as_secs();
        let path = self.path(PINS).join(&pin.0);
        // Under the lock: a collector that read an empty file would remove the pin as ended.
        let _folder_guard = self.lock();
        fs::write(&path, format!("{until}\n")).map_err(|error| io_error(&path, &error))?;
        Ok(pin)
    }

    /// Writes a later end into the pin's file. The rename is atomic, so a kill leaves no half pin.
    /// A kill before the rename leaves a second pin, which expires.
    pub(super) fn renew(
        &self,
        _folder_guard: &MutexGuard<'_, ()>,
        pin: &Pin,
        life: Duration,
    ) -> Result<(), StoreError> {
        let unknown_pin = || StoreError::Other(format!("the pin {} is gone", pin.0));
        let path = self.pin_path(pin).ok_or_else(unknown_pin)?;
        let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => unknown_pin(),
            _ => io_error(&path, &error),
        })?;
        let held = text.split_once('\n').map_or("", |(_, held)| held);
        let until = unix_time().saturating_add(life).as_secs();
        let staged = self.path(PINS).join(format!("{:032x}", rand::random::<u128>()));
        fs::write(&staged, format!("{until}\n{held}")).map_err(|error| io_error(&staged, &error))?;
        fs::rename(&staged, &path).map_err(|error| io_error(&path, &error))
    }

    /// Adds a present or future blob to the pin.
    pub(super) fn add_to_pin(
        &self,
        _folder_guard: &MutexGuard<'_, ()>,
        pin: &Pin,
        digest: Digest,
    ) -> Result<(), StoreError> {
        let unknown_pin = || StoreError::Other(format!("the pin {} is gone", pin.0));
        let path = self.pin_path(pin).ok_or_else(unknown_pin)?;
        let appended = OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{digest}\n").as_bytes()));
        appended.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => unknown_pin(),
            _ => io_error(&path, &error),
        })
    }

    pub(super) fn release(&self, _folder_guard: &MutexGuard<'_, ()>, pin: &Pin) -> Result<(), StoreError> {
        let Some(path) = self.pin_path(pin) else { return Ok(()) };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&path, &error)),
            _ => Ok(()),
        }
    }

    /// Digests of all live pins. Removes ended pins.
    pub(super) fn pinned_digests(&self, _folder_guard: &MutexGuard<'_, ()>) -> Result<Vec<Digest>, StoreError> {
        let folder = self.path(PINS);
        let now = unix_time().as_secs();
        let mut digests = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|error| io_error(&folder, &error))? {
            let path = entry.map_err(|error| io_error(&folder, &error))?.path();
            let text = fs::read_to_string(&path).map_err(|error| io_error(&path, &error))?;
            let mut lines = text.lines();
            let until = lines.next().and_then(|line| line.parse::<u64>().ok());
            if until.is_some_and(|until| until > now) {
                digests.extend(lines.filter_map(|line| line.parse::<Digest>().ok()));
            } else {
                fs::remove_file(&path).map_err(|error| io_error(&path, &error))?;
            }
        }
        Ok(digests)
    }

    /// `None` for a name that [`Folder::pin`] did not create; such a name must not become a path.
    fn pin_path(&self, pin: &Pin) -> Option<PathBuf> {
        let is_valid = pin.0.len() == 32 && pin.0.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_valid.then(|| self.path(PINS).join(&pin.0))
    }
}

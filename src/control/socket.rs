//! The socket's file: private to its owner, replaced after an agent's crash, removed at the end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Type};
use tokio::net::{UnixListener, UnixStream};

/// As many connections may wait as are served at a time.
const BACKLOG: i32 = super::MAX_CONNECTIONS as i32;

/// The socket cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another agent of this node answers on the socket.
    #[error("another agent answers at {0}; two agents must not share a data folder")]
    InUse(PathBuf),
    /// The path is another kind of file, which stays.
    #[error("{0} exists and is no socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("the control socket {path}: {source}")]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// The error of the call.
        source: io::Error,
    },
}

/// A listening socket that removes its file when it is dropped.
pub(super) struct ControlSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode: the drop removes no file that another process has created at the path.
    file: (u64, u64),
}

impl ControlSocket {
    pub(super) async fn bind(path: PathBuf) -> Result<Self, BindError> {
        remove_stale(&path).await?;
        let bound = bind_owner_only(&path);
        let (listener, file) = bound.map_err(|source| BindError::Io { path: path.clone(), source })?;
        Ok(Self { listener, path, file })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|file| file == self.file) {
            // A socket that stays behind is replaced by the next agent.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket without a listener.
async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Io { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(file) if !file.file_type().is_socket() => return Err(BindError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
    }
}

/// No client can connect before `listen`, and the mode is set before.
fn bind_owner_only(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    let listener = StdListener::from(OwnedFd::from(socket));
    Ok((UnixListener::from_std(listener)?, inode(path)?))
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

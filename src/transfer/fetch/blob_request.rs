//! The subject of a fetch, and the errors of a fetch.

use quinn::{ConnectionError, ReadError, ReadExactError};

use crate::model::PeerId;
use crate::oci::{Digest, VerifyError};
use crate::ports::FetchError;
use crate::transfer::close_codes::{BLOB_REMOVED, OTHER_MAJOR, REJECTED, STORE_FAILED, TOO_SLOW};
use crate::transfer::peers::SharedConnection;
use crate::transfer::printable;
use crate::wire::{Answer, WireError};

/// The peer and the blob that every error below names.
#[derive(Clone, Copy)]
pub(super) struct BlobRequest {
    pub(super) peer: PeerId,
    pub(super) digest: Digest,
    pub(super) size: u64,
}

impl BlobRequest {
    pub(super) fn size_mismatch(self, actual_size: u64) -> FetchError {
        let source = VerifyError::Size { expected: self.digest, expected_size: self.size, actual_size };
        FetchError::Corrupt { peer: self.peer, source }
    }

    pub(super) fn stalled(self, seconds: u64) -> FetchError {
        FetchError::Stalled { peer: self.peer, digest: self.digest, seconds }
    }

    pub(super) fn connection_lost(self, error: &ConnectionError) -> FetchError {
        match error {
            ConnectionError::ApplicationClosed(close) if close.error_code == REJECTED => {
                FetchError::NotAdmitted { peer: self.peer, reason: printable(&String::from_utf8_lossy(&close.reason)) }
            }
            other => {
                let silent = *other == ConnectionError::TimedOut;
                FetchError::Unreachable { peer: self.peer, silent, reason: other.to_string() }
            }
        }
    }

    /// The stream ended with an error.
    pub(super) fn read_failed(self, error: &ReadError) -> FetchError {
        let unreachable =
            |reason: &str| FetchError::Unreachable { peer: self.peer, silent: false, reason: reason.into() };
        match error {
            ReadError::ConnectionLost(error) => self.connection_lost(error),
            ReadError::Reset(BLOB_REMOVED) => FetchError::Absent { peer: self.peer, digest: self.digest },
            ReadError::Reset(OTHER_MAJOR) => FetchError::OtherMajor { peer: self.peer },
            ReadError::Reset(STORE_FAILED) => FetchError::StoreFailed { peer: self.peer },
            ReadError::Reset(TOO_SLOW) => unreachable("the peer reports that this agent reads too slowly"),
            other => FetchError::Protocol { peer: self.peer, reason: other.to_string() },
        }
    }

    /// No answer could be read. The decoder's error wraps the error of the stream.
    pub(super) fn answer_failed(self, connection: &SharedConnection, error: WireError) -> FetchError {
        if let WireError::Io(io) = &error {
            if let Some(read) = io.get_ref().and_then(|inner| inner.downcast_ref::<ReadError>()) {
                return self.read_failed(read);
            }
            if let Some(ended) = connection.close_reason() {
                return self.connection_lost(&ended);
            }
        }
        FetchError::Protocol { peer: self.peer, reason: error.to_string() }
    }

    /// The stream ended, with or without an error, before all expected bytes arrived.
    pub(super) fn too_short(self, error: ReadExactError) -> FetchError {
        match error {
            ReadExactError::FinishedEarly(_) => self.protocol_error("the stream ends too early".into()),
            ReadExactError::ReadError(error) => self.read_failed(&error),
        }
    }

    pub(super) fn protocol_error(self, reason: String) -> FetchError {
        FetchError::Protocol { peer: self.peer, reason }
    }

    /// Checks that the peer has at least a part of the blob. `true` when the peer has the whole
    /// blob.
    ///
    /// # Errors
    /// The peer has nothing of the blob, has another size, or cannot answer now.
    pub(super) fn check_answer(self, answer: &Answer) -> Result<bool, FetchError> {
        match *answer {
            Answer::Blob { size } if size == self.size => Ok(true),
            Answer::Partial { size } if size == self.size => Ok(false),
            Answer::Blob { size } | Answer::Partial { size } => Err(self.size_mismatch(size)),
            // The size here or the peer's size is wrong, and the wrong size may be the manifest's.
            Answer::Invalid { size } if size != self.size => Err(self.size_mismatch(size)),
            Answer::Invalid { size } => {
                Err(self
                    .protocol_error(format!("denies the requested pieces of {}, which has {size} bytes", self.digest)))
            }
            Answer::Absent => Err(FetchError::Absent { peer: self.peer, digest: self.digest }),
            Answer::Busy => Err(FetchError::Busy { peer: self.peer }),
            Answer::Failed => Err(FetchError::StoreFailed { peer: self.peer }),
        }
    }
}

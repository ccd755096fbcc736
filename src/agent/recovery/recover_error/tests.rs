use super::*;
use crate::decide::disk_floor::Volume;

fn digest() -> Digest {
    Digest::of(b"blob")
}

fn reference() -> Reference {
    "r.test/shop/checkout:v1".parse().unwrap()
}

fn disk_full() -> OverLimit {
    OverLimit::Disk { volume: Volume::Both, need: 2, reserved: 0, free: 1, floor: 0 }
}

/// One failure of each row of the table.
fn failures() -> Vec<RecoverError> {
    let (reference, digest) = (reference(), digest());
    let platform = Platform::of_this_node();
    let busy = FetchError::Busy { peer: PeerId::from_public_key([1; 32]) };
    vec![
        RecoverError::NoProvider { reference: reference.clone() },
        RecoverError::OtherPlatforms { reference: reference.clone(), platform: Box::new(platform.clone()), digest },
        RecoverError::TagDisagreement { reference: reference.clone(), digests: vec![(digest, 1)] },
        RecoverError::BlobsWithoutProvider { reference: reference.clone(), blobs: vec![digest] },
        RecoverError::NotDistributable { reference: reference.clone(), layer: digest },
        RecoverError::ImportsRefused { reason: "verifiers".into() },
        RecoverError::Document { digest, source: DocumentError::UnknownShape },
        RecoverError::NestedIndex { digest },
        RecoverError::NoPlatform { digest, platform },
        RecoverError::OverLimit(OverLimit::Size { missing: 2, limit: 1 }),
        RecoverError::OverLimit(disk_full()),
        RecoverError::NeedsUdp { reference, source: Box::new(TooLarge::Image { size: 1 }) },
        RecoverError::NoRoomToUnpack(disk_full()),
        RecoverError::Fetch { digest, attempts: Vec::new() },
        RecoverError::Fetch { digest, attempts: vec![busy] },
        RecoverError::Store { doing: "writing", source: StoreError::Full(digest) },
        RecoverError::Abandoned,
    ]
}

/// Row in [`failures`], and label, Event, `retryable` of `lighterman pull`, and reuse of content. A
/// new variant does not compile without a row.
fn expected(error: &RecoverError) -> (usize, RecoveryEnd, &'static str, &'static str, bool, bool) {
    let (no_provider, failed, final_end) = (RecoveryEnd::NoProvider, RecoveryEnd::Failed, RecoveryEnd::Final);
    match error {
        RecoverError::NoProvider { .. } => (0, no_provider, "no_provider", "ImageNoProvider", true, false),
        RecoverError::OtherPlatforms { .. } => (1, no_provider, "no_provider", "ImageNoProvider", true, false),
        RecoverError::TagDisagreement { .. } => (2, no_provider, "unusable", "ImageNotRecoverable", false, false),
        RecoverError::BlobsWithoutProvider { .. } => (3, no_provider, "not_held", "ImageNoProvider", true, false),
        RecoverError::NotDistributable { .. } => (4, final_end, "unusable", "ImageNotRecoverable", false, false),
        RecoverError::ImportsRefused { .. } => (5, final_end, "closed", "ImageNotRecoverable", false, false),
        RecoverError::Document { .. } => (6, final_end, "unusable", "ImageNotRecoverable", false, false),
        RecoverError::NestedIndex { .. } => (7, final_end, "unusable", "ImageNotRecoverable", false, false),
        RecoverError::NoPlatform { .. } => (8, final_end, "unusable", "ImageNotRecoverable", false, false),
        RecoverError::OverLimit(OverLimit::Size { .. }) => {
            (9, final_end, "over_limit", "ImageNotRecoverable", false, false)
        }
        RecoverError::OverLimit(OverLimit::Disk { .. }) => {
            (10, failed, "over_limit", "ImageRecoveryFailed", false, false)
        }
        RecoverError::NeedsUdp { .. } => (11, failed, "fetch_failed", "ImageRecoveryFailed", true, false),
        RecoverError::NoRoomToUnpack(_) => (12, failed, "over_limit", "ImageRecoveryFailed", false, true),
        RecoverError::Fetch { attempts, .. } if attempts.is_empty() => {
            (13, no_provider, "fetch_failed", "ImageNoProvider", true, true)
        }
        RecoverError::Fetch { .. } => (14, failed, "fetch_failed", "ImageRecoveryFailed", true, true),
        RecoverError::Store { .. } => (15, failed, "store_failed", "ImageRecoveryFailed", true, true),
        RecoverError::Abandoned => (16, RecoveryEnd::Abandoned, "abandoned", "ImageRecoveryFailed", true, false),
    }
}

#[test]
fn every_failure_has_its_retry_label_event_and_answer_to_a_manual_pull() {
    for (row, error) in failures().iter().enumerate() {
        let FailureClass { queue_end, outcome, report_kind, pull_failure, is_content_reusable } = error.class();
        let retryable = pull_failure.is_retryable();
        let class = (row, queue_end, outcome.label(), report_kind.reason(), retryable, is_content_reusable);
        assert_eq!(class, expected(error), "{error}");
    }
}

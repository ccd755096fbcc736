//! The hash chain against plain SHA-256.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn chain_of(blob: &[u8], piece: u64) -> HashChain {
    let mut builder = HashChainBuilder::new(PieceLayout::new(blob.len() as u64, piece).unwrap());
    builder.update(blob);
    builder.finish().unwrap()
}

fn piece_of(blob: &[u8], layout: PieceLayout, piece: usize) -> &[u8] {
    &blob[layout.offset(piece) as usize..][..layout.piece_length(piece) as usize]
}

#[test]
fn every_length_gives_the_plain_sha_256_digest_and_valid_pieces() {
    for piece in [64, 128, 192] {
        for length in 0..=3 * piece as usize + 1 {
            let blob = bytes(length, 1);
            let chain = chain_of(&blob, piece);
            assert_eq!(chain.digest(), Digest::of(&blob), "{length} bytes in pieces of {piece}");
            let pieces = chain.layout().piece_count();
            assert!((0..pieces).rev().all(|n| chain.is_valid_piece(n, piece_of(&blob, chain.layout(), n))));
            assert!(!chain.is_valid_piece(pieces, &[]), "there is no such piece");
        }
    }
}

#[test]
fn a_changed_misplaced_or_short_piece_is_invalid() {
    let blob = bytes(64 * 10 + 7, 3);
    let chain = chain_of(&blob, 128);
    for piece in 0..chain.layout().piece_count() {
        let right = piece_of(&blob, chain.layout(), piece);
        for bit in (0..right.len() * 8).step_by(61) {
            let mut wrong = right.to_vec();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!chain.is_valid_piece(piece, &wrong), "piece {piece}, bit {bit}");
        }
        assert!(!chain.is_valid_piece(piece, &right[..right.len() - 1]));
        assert!(!chain.is_valid_piece((piece + 1) % chain.layout().piece_count(), right));
    }
}

#[test]
fn a_forged_hash_chain_fails_at_both_links_of_the_changed_state() {
    let blob = bytes(64 * 9, 5);
    let honest = chain_of(&blob, 64);
    for index in 0..honest.states().len() {
        let mut states = honest.states().to_vec();
        states[index].0[3] ^= 1;
        let forged = HashChain::unverified(honest.digest(), honest.layout(), states).unwrap();
        let broken: Vec<_> =
            (0..9).filter(|piece| !forged.is_valid_piece(*piece, piece_of(&blob, forged.layout(), *piece))).collect();
        assert_eq!(broken, [index, index + 1], "the links on both sides of the state");
    }
}

#[test]
fn a_single_piece_identifies_the_forged_hash_chain() {
    let blob = bytes(64 * 9 + 5, 7);
    let honest = chain_of(&blob, 64);
    let mut states = honest.states().to_vec();
    (states[2].0[0], states[6].0[0]) = (1, 1);
    let forged = HashChain::unverified(honest.digest(), honest.layout(), states).unwrap();
    let conflict = ChainConflict::between(&honest, &forged).unwrap();
    assert_eq!(conflict.piece(), 7);
    let piece = piece_of(&blob, honest.layout(), 7);
    assert_eq!(conflict.resolve(&honest, &forged, piece), ConflictOutcome::First);
    assert_eq!(
        ChainConflict::between(&forged, &honest).unwrap().resolve(&forged, &honest, piece),
        ConflictOutcome::Second
    );
    assert_eq!(conflict.resolve(&honest, &forged, &[0; 64]), ConflictOutcome::Neither);
    assert_eq!(ChainConflict::between(&honest, &honest.clone()), None);
}

#[test]
fn a_hash_chain_of_another_length_is_rejected() {
    let chain = chain_of(&bytes(300, 1), 64);
    let states = chain.states()[1..].to_vec();
    let error = HashChain::unverified(chain.digest(), chain.layout(), states).unwrap_err();
    assert_eq!(error, ChainLengthError { found: 3, expected: 4 });
}

#[test]
fn a_wrong_blob_length_fails_at_the_last_piece() {
    // The length is part of the padding. A chain that claims a longer blob does not end at the
    // digest, also when the last piece of the longer blob begins alike.
    let blob = bytes(200, 1);
    let chain = chain_of(&blob, 64);
    let longer = PieceLayout::new(201, 64).unwrap();
    let claimed = HashChain::unverified(chain.digest(), longer, chain.states().to_vec()).unwrap();
    assert!(!claimed.is_valid_piece(3, &bytes(201, 1)[192..]));
}

#[test]
fn the_piece_size_grows_with_the_blob_size() {
    const MIB: u64 = 1 << 20;
    for (size, piece) in [
        (0, 256 << 10),
        (1, 256 << 10),
        (128 * MIB - 1, 256 << 10),
        (128 * MIB, 512 << 10),
        (257 * MIB, MIB),
        (1024 * MIB, 4 * MIB),
        (2048 * MIB - 1, 4 * MIB),
        (10_240 * MIB, 8 * MIB),
        (u64::from(u32::MAX) * MIB, (u64::from(u32::MAX) * MIB).div_ceil(MAX_PIECES).next_multiple_of(64)),
    ] {
        let layout = PieceLayout::for_size(size);
        assert_eq!(layout.piece_size, piece, "of {size} bytes");
        assert_eq!(PieceLayout::new(layout.size, layout.piece_size), Ok(layout));
    }
}

#[test]
fn an_unaligned_or_too_fine_piece_layout_is_rejected() {
    assert_eq!(PieceLayout::new(10, 0), Err(PieceLayoutError::Unaligned(0)));
    assert_eq!(PieceLayout::new(10, 100), Err(PieceLayoutError::Unaligned(100)));
    assert_eq!(PieceLayout::new(u64::MAX, 64), Err(PieceLayoutError::TooMany { pieces: u64::MAX.div_ceil(64) }));
}

#[test]
fn a_blob_of_another_length_than_its_layout_has_no_hash_chain() {
    for length in [63, 65] {
        let mut builder = HashChainBuilder::new(PieceLayout::new(64, 64).unwrap());
        builder.update(&bytes(length, 1));
        assert_eq!(builder.finish(), None);
    }
}

proptest! {
    #[test]
    fn chunk_boundaries_change_neither_hash_chain_nor_digest(
        blob in prop::collection::vec(any::<u8>(), 0..2000),
        blocks in 1u64..6,
        parts in prop::collection::vec(1usize..150, 1..40),
    ) {
        let layout = PieceLayout::new(blob.len() as u64, blocks * 64).unwrap();
        let mut builder = HashChainBuilder::new(layout);
        let mut rest = &blob[..];
        for part in parts.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*part));
            builder.update(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        let chain = builder.finish().unwrap();
        prop_assert_eq!(chain.digest(), Digest::of(&blob));
        prop_assert_eq!(&chain, &chain_of(&blob, blocks * 64));
        for piece in 0..layout.piece_count() {
            prop_assert!(chain.is_valid_piece(piece, piece_of(&blob, layout, piece)));
        }
    }
}

#[test]
fn valid_pieces_in_any_order_prove_the_blob_and_duplicates_count_once() {
    let blob = bytes(1000, 3);
    let layout = PieceLayout::new(1000, 192).unwrap();
    let chain = Arc::new(chain_of(&blob, 192));
    let mut verifier = PieceVerifier::new(Arc::clone(&chain));
    for piece in [5, 0, 3, 3, 1, 4] {
        let mut hasher = chain.hasher(piece);
        piece_of(&blob, layout, piece).chunks(7).for_each(|part| hasher.update(part));
        assert!(verifier.record(hasher) && verifier.has_piece(piece));
        assert!(verifier.proof().is_none());
    }
    let mut wrong = chain.hasher(2);
    wrong.update(piece_of(&blob, layout, 1));
    assert!(!verifier.record(wrong) && !verifier.has_piece(2));
    let mut right = chain.hasher(2);
    right.update(piece_of(&blob, layout, 2));
    assert!(verifier.record(right));
    let proof = verifier.proof().unwrap();
    assert_eq!((proof.digest(), proof.size()), (Digest::of(&blob), 1000));
}

#[test]
fn a_byte_range_contains_only_whole_pieces() {
    let layout = PieceLayout::new(1000, 192).unwrap();
    assert_eq!(layout.pieces_within(0..1000), 0..6);
    assert_eq!(layout.pieces_within(1..960), 1..5);
    assert_eq!(layout.pieces_within(960..1000), 5..6);
    assert_eq!(layout.pieces_within(960..999), 5..5);
    assert!(layout.pieces_within(5000..6000).is_empty());
}

#[test]
fn a_state_reads_back_from_its_bytes() {
    let chain = chain_of(&bytes(300, 1), 64);
    assert!(chain.states().iter().all(|state| HashState::from_bytes(state.to_bytes()) == *state));
}

#[test]
fn a_chain_prefix_verifies_exactly_the_pieces_that_the_prefix_covers() {
    let blob = bytes(64 * 10 + 7, 3);
    let chain = chain_of(&blob, 128);
    let layout = chain.layout();
    let mut prefix = ChainPrefix::new(layout);
    assert!(prefix.hasher(0).is_none());
    let hashed = |prefix: &ChainPrefix, piece: usize, bytes: &[u8]| {
        let mut hasher = prefix.hasher(piece)?;
        hasher.update(bytes);
        Some(prefix.is_valid_piece(&hasher))
    };
    for (index, state) in chain.states().iter().enumerate() {
        prefix.extend(&[*state]);
        for piece in 0..=index {
            let right = piece_of(&blob, layout, piece);
            let mut wrong = right.to_vec();
            wrong[piece] ^= 1;
            assert_eq!(hashed(&prefix, piece, right), Some(true));
            assert_eq!(hashed(&prefix, piece, &wrong), Some(false));
            assert_eq!(hashed(&prefix, piece, &right[1..]), Some(false));
        }
        assert!(prefix.hasher(index + 1).is_none(), "the state after the piece is missing");
    }
    prefix.extend(&[HashState::INITIAL; 10]);
    assert!(prefix.hasher(layout.piece_count() - 1).is_none(), "the last piece has no state after it");
}

//! The chain against plain SHA-256.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn chain_of(blob: &[u8], piece: u64) -> Chain {
    let mut builder = ChainBuilder::new(Cut::new(blob.len() as u64, piece).unwrap());
    builder.update(blob);
    builder.finish().unwrap()
}

fn piece_of(blob: &[u8], cut: Cut, piece: usize) -> &[u8] {
    &blob[cut.offset(piece) as usize..][..cut.length(piece) as usize]
}

#[test]
fn of_every_length_up_to_some_pieces_the_digest_is_plain_sha_256_and_every_piece_fits_alone() {
    for piece in [64, 128, 192] {
        for length in 0..=3 * piece as usize + 1 {
            let blob = bytes(length, 1);
            let chain = chain_of(&blob, piece);
            assert_eq!(chain.digest(), Digest::of(&blob), "{length} bytes in pieces of {piece}");
            let pieces = chain.cut().pieces();
            assert!((0..pieces).rev().all(|n| chain.fits(n, piece_of(&blob, chain.cut(), n))));
            assert!(!chain.fits(pieces, &[]), "there is no such piece");
        }
    }
}

#[test]
fn a_piece_with_one_bit_changed_or_in_another_place_or_too_short_does_not_fit() {
    let blob = bytes(64 * 10 + 7, 3);
    let chain = chain_of(&blob, 128);
    for piece in 0..chain.cut().pieces() {
        let right = piece_of(&blob, chain.cut(), piece);
        for bit in (0..right.len() * 8).step_by(61) {
            let mut wrong = right.to_vec();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!chain.fits(piece, &wrong), "piece {piece}, bit {bit}");
        }
        assert!(!chain.fits(piece, &right[..right.len() - 1]));
        assert!(!chain.fits((piece + 1) % chain.cut().pieces(), right));
    }
}

#[test]
fn a_forged_list_breaks_at_a_link_wherever_it_was_changed() {
    let blob = bytes(64 * 9, 5);
    let honest = chain_of(&blob, 64);
    for place in 0..honest.states().len() {
        let mut states = honest.states().to_vec();
        states[place].0[3] ^= 1;
        let forged = Chain::claimed(honest.digest(), honest.cut(), states).unwrap();
        let broken: Vec<_> =
            (0..9).filter(|piece| !forged.fits(*piece, piece_of(&blob, forged.cut(), *piece))).collect();
        assert_eq!(broken, [place, place + 1], "the links on both sides of the state");
    }
}

#[test]
fn of_two_lists_the_forged_one_is_named_by_one_piece() {
    let blob = bytes(64 * 9 + 5, 7);
    let honest = chain_of(&blob, 64);
    let mut states = honest.states().to_vec();
    (states[2].0[0], states[6].0[0]) = (1, 1);
    let forged = Chain::claimed(honest.digest(), honest.cut(), states).unwrap();
    let dispute = Dispute::between(&honest, &forged).unwrap();
    assert_eq!(dispute.piece(), 7);
    let piece = piece_of(&blob, honest.cut(), 7);
    assert_eq!(dispute.settle(&honest, &forged, piece), Ruling::First);
    assert_eq!(Dispute::between(&forged, &honest).unwrap().settle(&forged, &honest, piece), Ruling::Second);
    assert_eq!(dispute.settle(&honest, &forged, &[0; 64]), Ruling::Neither);
    assert_eq!(Dispute::between(&honest, &honest.clone()), None);
}

#[test]
fn a_list_for_another_number_of_pieces_is_refused() {
    let chain = chain_of(&bytes(300, 1), 64);
    let states = chain.states()[1..].to_vec();
    let error = Chain::claimed(chain.digest(), chain.cut(), states).unwrap_err();
    assert_eq!(error, LengthError { found: 3, expected: 4 });
}

#[test]
fn another_length_is_not_proved_even_by_the_same_bytes() {
    // The length is part of the padding: a list that claims a longer blob whose last piece begins alike does not end at the digest.
    let blob = bytes(200, 1);
    let chain = chain_of(&blob, 64);
    let longer = Cut::new(201, 64).unwrap();
    let claimed = Chain::claimed(chain.digest(), longer, chain.states().to_vec()).unwrap();
    assert!(!claimed.fits(3, &bytes(201, 1)[192..]));
}

#[test]
fn pieces_are_as_large_as_the_blob_asks_for() {
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
        let cut = Cut::usual(size);
        assert_eq!(cut.piece, piece, "of {size} bytes");
        assert_eq!(Cut::new(cut.size, cut.piece), Ok(cut));
    }
}

#[test]
fn a_cut_that_makes_no_sense_is_refused() {
    assert_eq!(Cut::new(10, 0), Err(CutError::Unaligned(0)));
    assert_eq!(Cut::new(10, 100), Err(CutError::Unaligned(100)));
    assert_eq!(Cut::new(u64::MAX, 64), Err(CutError::TooMany { pieces: u64::MAX.div_ceil(64) }));
}

#[test]
fn what_is_shorter_or_longer_than_was_said_makes_no_list() {
    for length in [63, 65] {
        let mut builder = ChainBuilder::new(Cut::new(64, 64).unwrap());
        builder.update(&bytes(length, 1));
        assert_eq!(builder.finish(), None);
    }
}

proptest! {
    #[test]
    fn however_the_bytes_come_the_list_and_the_digest_are_the_same(
        blob in prop::collection::vec(any::<u8>(), 0..2000),
        blocks in 1u64..6,
        parts in prop::collection::vec(1usize..150, 1..40),
    ) {
        let cut = Cut::new(blob.len() as u64, blocks * 64).unwrap();
        let mut builder = ChainBuilder::new(cut);
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
        for piece in 0..cut.pieces() {
            prop_assert!(chain.fits(piece, piece_of(&blob, cut, piece)));
        }
    }
}

#[test]
fn pieces_in_any_order_add_up_to_the_proof_and_none_counts_twice() {
    let blob = bytes(1000, 3);
    let cut = Cut::new(1000, 192).unwrap();
    let chain = Arc::new(chain_of(&blob, 192));
    let mut proving = Proving::new(Arc::clone(&chain));
    for piece in [5, 0, 3, 3, 1, 4] {
        let mut hasher = chain.hasher(piece);
        piece_of(&blob, cut, piece).chunks(7).for_each(|part| hasher.update(part));
        assert!(proving.take(hasher) && proving.has(piece));
        assert!(proving.verified().is_none());
    }
    let mut wrong = chain.hasher(2);
    wrong.update(piece_of(&blob, cut, 1));
    assert!(!proving.take(wrong) && !proving.has(2));
    let mut right = chain.hasher(2);
    right.update(piece_of(&blob, cut, 2));
    assert!(proving.take(right));
    let proof = proving.verified().unwrap();
    assert_eq!((proof.digest(), proof.size()), (Digest::of(&blob), 1000));
}

#[test]
fn the_pieces_within_some_bytes_are_those_that_are_whole_there() {
    let cut = Cut::new(1000, 192).unwrap();
    assert_eq!(cut.within(0..1000), 0..6);
    assert_eq!(cut.within(1..960), 1..5);
    assert_eq!(cut.within(960..1000), 5..6);
    assert_eq!(cut.within(960..999), 5..5);
    assert!(cut.within(5000..6000).is_empty());
}

#[test]
fn a_state_reads_back_from_its_bytes() {
    let chain = chain_of(&bytes(300, 1), 64);
    assert!(chain.states().iter().all(|state| State::from_bytes(state.to_bytes()) == *state));
}

#[test]
fn the_beginning_of_a_list_tells_of_the_pieces_that_it_reaches() {
    let blob = bytes(64 * 10 + 7, 3);
    let chain = chain_of(&blob, 128);
    let cut = chain.cut();
    let mut beginning = Beginning::new(cut);
    assert!(beginning.hasher(0).is_none());
    let hashed = |beginning: &Beginning, piece: usize, bytes: &[u8]| {
        let mut hasher = beginning.hasher(piece)?;
        hasher.update(bytes);
        Some(beginning.fits(&hasher))
    };
    for (place, state) in chain.states().iter().enumerate() {
        beginning.extend(&[*state]);
        for piece in 0..=place {
            let right = piece_of(&blob, cut, piece);
            let mut wrong = right.to_vec();
            wrong[piece] ^= 1;
            assert_eq!(hashed(&beginning, piece, right), Some(true));
            assert_eq!(hashed(&beginning, piece, &wrong), Some(false));
            assert_eq!(hashed(&beginning, piece, &right[1..]), Some(false));
        }
        assert!(beginning.hasher(place + 1).is_none(), "its end is not there");
    }
    beginning.extend(&[State::INITIAL; 10]);
    assert!(beginning.hasher(cut.pieces() - 1).is_none(), "there are no such states");
}

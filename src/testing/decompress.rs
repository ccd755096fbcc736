//! Decompression of the layers that [`crate::simulated::image`] makes: blocks without compression.

/// Length of the header that the maker writes: no flags, no name.
const GZIP_HEADER: usize = 10;

/// Magic number, descriptor, and a size of four bytes.
const ZSTD_HEADER: usize = 9;

/// The content of a layer; `None` for input that the maker of images never produces.
pub(crate) fn decompress(packed: &[u8]) -> Option<Vec<u8>> {
    match packed {
        [0x1f, 0x8b, ..] => gunzip(packed),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => unzstd(packed),
        plain => Some(plain.to_vec()),
    }
}

fn gunzip(packed: &[u8]) -> Option<Vec<u8>> {
    let (mut content, mut rest) = (Vec::new(), packed.get(GZIP_HEADER..)?);
    loop {
        let (header, blocks) = rest.split_first_chunk::<5>()?;
        let (block, after) = blocks.split_at_checked(u16::from_le_bytes([header[1], header[2]]).into())?;
        content.extend_from_slice(block);
        rest = after;
        if header[0] == 1 {
            return Some(content);
        }
    }
}

fn unzstd(packed: &[u8]) -> Option<Vec<u8>> {
    let (mut content, mut rest) = (Vec::new(), packed.get(ZSTD_HEADER..)?);
    loop {
        let (header, blocks) = rest.split_first_chunk::<3>()?;
        let header = u32::from_le_bytes([header[0], header[1], header[2], 0]);
        let (block, after) = blocks.split_at_checked((header >> 3) as usize)?;
        content.extend_from_slice(block);
        rest = after;
        if header & 1 == 1 {
            return Some(content);
        }
    }
}

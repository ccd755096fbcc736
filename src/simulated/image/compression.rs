//! Compressed layers without a compressor: gzip and zstd both permit stored blocks.

use bytes::Bytes;

/// Compression of a layer's archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// No compression.
    #[default]
    Plain,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

impl Compression {
    /// Media type of a layer. Docker defines none for zstd; tools use OCI's.
    pub(super) fn layer_type(self, docker: bool) -> &'static str {
        match (docker, self) {
            (true, Self::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (true, Self::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (false, Self::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (false, Self::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (_, Self::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    pub(super) fn compress(self, archive: Bytes) -> Bytes {
        match self {
            Self::Plain => archive,
            Self::Gzip => gzip(&archive).into(),
            Self::Zstd => zstd(&archive).into(),
        }
    }
}

/// The longest stored block of RFC 1951.
const GZIP_BLOCK: usize = 0xffff;

fn gzip(content: &[u8]) -> Vec<u8> {
    // Deflate, no flags, no time, an unknown system.
    let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    let mut blocks = content.chunks(GZIP_BLOCK).peekable();
    while let Some(block) = blocks.next() {
        let length = u16::try_from(block.len()).expect("a block's length");
        packed.push(u8::from(blocks.peek().is_none()));
        packed.extend(length.to_le_bytes());
        packed.extend((!length).to_le_bytes());
        packed.extend(block);
    }
    packed.extend(crc32(content).to_le_bytes());
    packed.extend((content.len() as u32).to_le_bytes());
    packed
}

fn crc32(bytes: &[u8]) -> u32 {
    let shifted = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    let table: Vec<u32> = (0..256).map(|byte| (0..8).fold(byte, |crc, _| shifted(crc))).collect();
    !bytes.iter().fold(!0, |crc, byte| table[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

/// The longest block of RFC 8878.
const ZSTD_BLOCK: usize = 128 << 10;

fn zstd(content: &[u8]) -> Vec<u8> {
    // Magic number; one segment, its size in four bytes, no checksum.
    let mut packed = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    packed.extend((content.len() as u32).to_le_bytes());
    let mut blocks = content.chunks(ZSTD_BLOCK).peekable();
    while let Some(block) = blocks.next() {
        let header = (block.len() as u32) << 3 | u32::from(blocks.peek().is_none());
        packed.extend(&header.to_le_bytes()[..3]);
        packed.extend(block);
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_archives_decompress_to_themselves() {
        for size in [1, GZIP_BLOCK, GZIP_BLOCK + 1, ZSTD_BLOCK, ZSTD_BLOCK + 1] {
            let archive = Bytes::from((0..size).map(|n| (n % 251) as u8).collect::<Vec<_>>());
            for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
                let packed = compression.compress(archive.clone());
                assert_eq!(
                    crate::testing::decompress::decompress(&packed).as_deref(),
                    Some(&archive[..]),
                    "{compression:?} of {size}"
                );
                if compression != Compression::Plain {
                    assert_eq!(
                        crate::testing::decompress::decompress(&packed[..size / 2 + 4]),
                        None,
                        "{compression:?} of {size}, cut off"
                    );
                }
            }
        }
    }
}

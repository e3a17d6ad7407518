//! Reads frames from a byte slice as a receiver does from a stream.

use tandem_proto::{
    frame::{Frame, FrameError, FrameType, Header, MetaBuf, decode},
    limits::HEADER_BYTES,
};

/// One frame that fills `bytes`. A short slice is a length error, as on a stream that ends early.
pub(crate) fn read(bytes: &[u8]) -> Result<Frame, FrameError> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(FrameError::BadMagic(0));
    };
    let header = Header::parse(head)?;
    let split = header.meta_len.min(rest.len());
    let mut meta = MetaBuf::with_capacity(split);
    meta.extend_from_slice(&rest[..split]);
    decode(&header, &meta, rest[split..].to_vec().into())
}

/// Writes the right checksum into a changed frame, as a malicious peer would.
pub(crate) fn seal(bytes: &mut [u8]) {
    let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = Header::parse(head) else {
        return;
    };
    let end = if header.frame_type == FrameType::KvBlock {
        (HEADER_BYTES + header.meta_len).min(bytes.len())
    } else {
        bytes.len()
    };
    bytes[24..28].fill(0);
    let crc = crc32c::crc32c(&bytes[..end]);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
}

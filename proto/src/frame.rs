//! Frames: a 32-byte little-endian header parsed by hand, a validated rkyv meta, a raw payload.
//!
//! ```text
//! 0  magic u32        16 seq u64
//! 4  version u8       24 crc32c u32
//! 5  type u8          28 reserved u32 (0)
//! 6  flags u16 (0)    32 meta … payload …
//! 8  meta_len u32
//! 12 payload_len u32
//! ```
//!
//! The checksum covers the header (with its own field zero), the meta and the payload, except for
//! the payload of a [`KvBlock`], which carries a BLAKE3 digest of its own that the receiver checks
//! before publishing: hashing megabytes twice would buy nothing.
//!
//! A receiver parses the header first, so an unknown type or an oversize length is an error before
//! a byte is allocated. Lengths inside the meta are checked against [`crate::limits`] on the
//! archived form, before anything is copied out of it.

mod bounds;

use alloc::string::String;
use core::fmt;

use bytes::Bytes;
use rkyv::{rancor::Failure, util::AlignedVec};

use self::bounds::Bounded;
use crate::{
    ids::Digest,
    limits::{HEADER_BYTES, META_BYTES_MAX, PAYLOAD_BYTES_MAX, SESSION_TOKENS_MAX},
    message::{
        Close, Draft, End, Generate, Hello, KvAck, KvBlock, KvOffer, KvPull, KvWant, Open, Opened, Progress, Refuse,
        Token, Verdict,
    },
};

/// First four bytes of every frame: `TNDM`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"TNDM");
/// Version of the header and of every message struct; one struct per (type, version).
pub const FRAME_VERSION: u8 = 1;
/// Counter of the message schema. Raise it with every change of a wire struct: the golden files
/// under `tests/goldens/` are named after it and refuse a silent change.
pub const SCHEMA_VERSION: u32 = 4;
/// Alignment a meta buffer must have, bytes.
pub const META_ALIGN: usize = 16;

/// A buffer for one frame's meta, aligned as [`decode_meta`] needs it.
pub type MetaBuf = AlignedVec<META_ALIGN>;

/// Why bytes are not a frame, or a message cannot become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream does not carry Tandem frames, or lost its place.
    #[error("not a frame: magic {0:#010x}; the peer does not speak Tandem or the stream is out of step")]
    BadMagic(u32),
    /// A header version this build does not know.
    #[error("frame version {0} is unknown; update the older of the two peers")]
    UnknownVersion(u8),
    /// A frame type this build does not know.
    #[error("frame type {0} is unknown; update the older of the two peers")]
    UnknownType(u8),
    /// A flag bit this build does not know.
    #[error("frame flags {0:#06x} are unknown; update the older of the two peers")]
    UnknownFlags(u16),
    /// The reserved word must be zero.
    #[error("reserved header word is {0:#010x}, must be 0")]
    ReservedNotZero(u32),
    /// The meta would pass its bound.
    #[error("meta of {len} bytes, at most {max} are allowed")]
    MetaTooLarge {
        /// Announced length, bytes.
        len: usize,
        /// Bound, bytes.
        max: usize,
    },
    /// The payload would pass the bound of its type (0 for types without payload).
    #[error("payload of {len} bytes in a {frame} frame, at most {max} are allowed")]
    PayloadTooLarge {
        /// Type of the frame.
        frame: FrameType,
        /// Announced length, bytes.
        len: usize,
        /// Bound, bytes.
        max: usize,
    },
    /// Header, meta or payload were changed on the way.
    #[error("checksum of a {frame} frame is {found:#010x}, expected {expected:#010x}: the frame is corrupt")]
    BadChecksum {
        /// Type of the frame.
        frame: FrameType,
        /// Checksum of what arrived.
        found: u32,
        /// Checksum in the header.
        expected: u32,
    },
    /// A part has another length than the header says.
    #[error("{part} of a {frame} frame has {found} bytes, the header says {expected}")]
    LengthMismatch {
        /// Type of the frame.
        frame: FrameType,
        /// `meta` or `payload`.
        part: &'static str,
        /// Bytes at hand.
        found: usize,
        /// Bytes announced.
        expected: usize,
    },
    /// The meta buffer is not aligned to [`META_ALIGN`]: a fault of the caller, not of the peer.
    #[error("meta buffer is not aligned to {META_ALIGN} bytes; read it into a MetaBuf")]
    Misaligned,
    /// The meta is not a valid archive of its type.
    #[error("meta of a {frame} frame is malformed")]
    MalformedMeta {
        /// Type of the frame.
        frame: FrameType,
    },
    /// A field of the message passes its bound.
    #[error("{field} is {value}, at most {max} is allowed")]
    LimitExceeded {
        /// Field, as `Message.field`.
        field: &'static str,
        /// Its length or value.
        value: usize,
        /// Bound from [`crate::limits`].
        max: usize,
    },
    /// Frames of a stream count up from 0 without a gap.
    #[error("frame has sequence number {found}, expected {expected}")]
    OutOfSequence {
        /// Number in the header.
        found: u64,
        /// Number expected.
        expected: u64,
    },
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $id:literal, payload $max:expr;)*) => {
        /// Type byte of a frame.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum FrameType { $($(#[$doc])* $name = $id,)* }

        impl FrameType {
            /// Every type, in ascending order of its byte.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Name, as in [`Message`].
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Largest payload of this type, bytes; 0 if it has none.
            #[must_use]
            pub const fn payload_bytes_max(self) -> usize {
                match self { $(Self::$name => $max,)* }
            }
        }

        impl TryFrom<u8> for FrameType {
            type Error = FrameError;
            fn try_from(byte: u8) -> Result<Self, FrameError> {
                match byte {
                    $($id => Ok(Self::$name),)*
                    other => Err(FrameError::UnknownType(other)),
                }
            }
        }

        /// What a frame says; see the struct of the same name in [`crate::message`].
        #[derive(Debug, Clone, PartialEq)]
        pub enum Message { $($(#[$doc])* $name($name),)* }

        impl Message {
            /// Type byte of this message.
            #[must_use]
            pub const fn frame_type(&self) -> FrameType {
                match self { $(Self::$name(_) => FrameType::$name,)* }
            }

            fn append(&self, buf: MetaBuf) -> Result<MetaBuf, FrameError> {
                match self { $(Self::$name(m) => append(m, buf, FrameType::$name),)* }
            }
        }

        $(impl From<$name> for Message {
            fn from(message: $name) -> Self { Self::$name(message) }
        })*

        /// Validates the archive in `meta`, checks every length in it, then copies it out.
        ///
        /// `meta` must be aligned to [`META_ALIGN`] (use a [`MetaBuf`]). The checksum is checked by
        /// [`Header::check`]; [`decode`] does both.
        ///
        /// # Errors
        /// [`FrameError::LengthMismatch`], [`FrameError::Misaligned`], [`FrameError::MalformedMeta`],
        /// [`FrameError::LimitExceeded`].
        pub fn decode_meta(header: &Header, meta: &[u8]) -> Result<Message, FrameError> {
            header.expect_len("meta", meta.len(), header.meta_len)?;
            if !meta.as_ptr().addr().is_multiple_of(META_ALIGN) {
                return Err(FrameError::Misaligned);
            }
            let malformed = FrameError::MalformedMeta { frame: header.frame_type };
            Ok(match header.frame_type {
                $(FrameType::$name => {
                    let archived = rkyv::access::<rkyv::Archived<$name>, Failure>(meta)
                        .map_err(|_| malformed)?;
                    archived.check()?;
                    Message::$name(
                        rkyv::deserialize::<$name, Failure>(archived).map_err(|_| malformed)?,
                    )
                })*
            })
        }

        const TYPE_LIST: &str = concat!($(stringify!($name), "=", $id, ";",)*);
    };
}

messages! {
    /// First frame of the control stream.
    Hello = 1, payload 0;
    /// Opens or resumes a session; payload: token ids, u32 each.
    Open = 2, payload 4 * SESSION_TOKENS_MAX;
    /// Answer to `Open`.
    Opened = 3, payload 0;
    /// Draft tokens; payload: trunk hidden states.
    Draft = 4, payload PAYLOAD_BYTES_MAX;
    /// The cloud shall decode by itself.
    Generate = 5, payload 0;
    /// Decision over drafts.
    Verdict = 6, payload 0;
    /// A token the cloud decoded.
    Token = 7, payload 0;
    /// End of what `Generate` asked for.
    End = 8, payload 0;
    /// A refusal.
    Refuse = 9, payload 0;
    /// The session is over.
    Close = 10, payload 0;
    /// How far the cloud is.
    Progress = 11, payload 0;
    /// A side has KV blocks.
    KvOffer = 16, payload 0;
    /// The blocks of an offer that are wanted.
    KvWant = 17, payload 0;
    /// Asks for an offer.
    KvPull = 18, payload 0;
    /// One block; payload: its numbers.
    KvBlock = 19, payload PAYLOAD_BYTES_MAX;
    /// Blocks were checked and published.
    KvAck = 20, payload 0;
}

impl fmt::Display for FrameType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn append<T>(message: &T, buf: MetaBuf, frame: FrameType) -> Result<MetaBuf, FrameError>
where
    T: rkyv::Archive
        + for<'a> rkyv::Serialize<
            rkyv::api::high::HighSerializer<MetaBuf, rkyv::ser::allocator::ArenaHandle<'a>, Failure>,
        >,
    T::Archived: Bounded + for<'a> rkyv::bytecheck::CheckBytes<rkyv::api::high::HighValidator<'a, Failure>>,
{
    let malformed = FrameError::MalformedMeta { frame };
    let buf = rkyv::api::high::to_bytes_in::<_, Failure>(message, buf).map_err(|_| malformed)?;
    let len = buf.len() - HEADER_BYTES;
    if len > META_BYTES_MAX {
        return Err(FrameError::MetaTooLarge { len, max: META_BYTES_MAX });
    }
    // The sender holds itself to the receiver's bounds, by the same code.
    rkyv::access::<T::Archived, Failure>(&buf[HEADER_BYTES..]).map_err(|_| malformed)?.check()?;
    Ok(buf)
}

/// One message with its place in the stream and its payload.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Place in the stream, from 0.
    pub seq: u64,
    /// What it says.
    pub message: Message,
    /// Raw bytes that the message describes; empty for most types.
    pub payload: Bytes,
}

/// A parsed frame header: every length is within its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type of the message.
    pub frame_type: FrameType,
    /// Bytes of the meta, at most [`META_BYTES_MAX`].
    pub meta_len: usize,
    /// Bytes of the payload, at most [`FrameType::payload_bytes_max`].
    pub payload_len: usize,
    /// Place in the stream, from 0.
    pub seq: u64,
    /// Checksum; see the module's page for what it covers.
    pub crc32c: u32,
}

impl Header {
    /// Parses and bounds a header. Needs no memory.
    ///
    /// # Errors
    /// Any of [`FrameError`]'s header variants; magic is looked at first, then version, type, flags,
    /// the reserved word and the lengths.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(0) != MAGIC {
            return Err(FrameError::BadMagic(word(0)));
        }
        if bytes[4] != FRAME_VERSION {
            return Err(FrameError::UnknownVersion(bytes[4]));
        }
        let frame_type = FrameType::try_from(bytes[5])?;
        let flags = u16::from_le_bytes([bytes[6], bytes[7]]);
        if flags != 0 {
            return Err(FrameError::UnknownFlags(flags));
        }
        if word(28) != 0 {
            return Err(FrameError::ReservedNotZero(word(28)));
        }
        let (meta_len, payload_len) = (word(8) as usize, word(12) as usize);
        if meta_len > META_BYTES_MAX {
            return Err(FrameError::MetaTooLarge { len: meta_len, max: META_BYTES_MAX });
        }
        check_payload(frame_type, payload_len)?;
        let seq = u64::from(word(16)) | u64::from(word(20)) << 32;
        Ok(Self { frame_type, meta_len, payload_len, seq, crc32c: word(24) })
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = FRAME_VERSION;
        out[5] = self.frame_type as u8;
        // Both lengths are bounded far below u32::MAX.
        out[8..12].copy_from_slice(&(self.meta_len as u32).to_le_bytes());
        out[12..16].copy_from_slice(&(self.payload_len as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.seq.to_le_bytes());
        out[24..28].copy_from_slice(&self.crc32c.to_le_bytes());
        out
    }

    fn checksum(self, meta: &[u8], payload: &[u8]) -> u32 {
        let crc = crc32c::crc32c(&Self { crc32c: 0, ..self }.to_bytes());
        let crc = crc32c::crc32c_append(crc, meta);
        if self.frame_type == FrameType::KvBlock {
            return crc;
        }
        crc32c::crc32c_append(crc, payload)
    }

    fn expect_len(&self, part: &'static str, found: usize, expected: usize) -> Result<(), FrameError> {
        if found == expected {
            return Ok(());
        }
        Err(FrameError::LengthMismatch { frame: self.frame_type, part, found, expected })
    }

    /// Checks the lengths and the checksum of a frame's parts.
    ///
    /// # Errors
    /// [`FrameError::LengthMismatch`] or [`FrameError::BadChecksum`].
    pub fn check(&self, meta: &[u8], payload: &[u8]) -> Result<(), FrameError> {
        self.expect_len("meta", meta.len(), self.meta_len)?;
        self.expect_len("payload", payload.len(), self.payload_len)?;
        let found = self.checksum(meta, payload);
        if found != self.crc32c {
            let (frame, expected) = (self.frame_type, self.crc32c);
            return Err(FrameError::BadChecksum { frame, found, expected });
        }
        Ok(())
    }
}

fn check_payload(frame: FrameType, len: usize) -> Result<(), FrameError> {
    let max = frame.payload_bytes_max();
    if len > max {
        return Err(FrameError::PayloadTooLarge { frame, len, max });
    }
    Ok(())
}

/// Header and meta as one buffer, to be followed on the wire by the payload, which is not copied.
///
/// # Errors
/// [`FrameError::PayloadTooLarge`], [`FrameError::MetaTooLarge`] or [`FrameError::LimitExceeded`] if
/// the message is past a bound; nothing may be sent then.
pub fn encode(frame: &Frame) -> Result<(Bytes, Bytes), FrameError> {
    Ok((encode_head(frame.seq, &frame.message, &frame.payload)?, frame.payload.clone()))
}

/// As [`encode`], without needing a [`Frame`]: the header and meta of `message`.
///
/// # Errors
/// As [`encode`].
pub fn encode_head(seq: u64, message: &Message, payload: &[u8]) -> Result<Bytes, FrameError> {
    let frame_type = message.frame_type();
    check_payload(frame_type, payload.len())?;
    let mut buf = MetaBuf::with_capacity(HEADER_BYTES + 256);
    // A multiple of META_ALIGN, so the meta stays aligned behind it.
    buf.extend_from_slice(&[0; HEADER_BYTES]);
    let mut buf = message.append(buf)?;
    let (head, meta) = buf.split_at_mut(HEADER_BYTES);
    let mut header = Header { frame_type, meta_len: meta.len(), payload_len: payload.len(), seq, crc32c: 0 };
    header.crc32c = header.checksum(meta, payload);
    head.copy_from_slice(&header.to_bytes());
    Ok(Bytes::from_owner(buf))
}

/// Checks and decodes a frame whose parts have arrived.
///
/// # Errors
/// As [`Header::check`] and [`decode_meta`].
pub fn decode(header: &Header, meta: &[u8], payload: Bytes) -> Result<Frame, FrameError> {
    header.check(meta, &payload)?;
    Ok(Frame { seq: header.seq, message: decode_meta(header, meta)?, payload })
}

/// Names the message schema: equal on two peers if they read each other's frames. Covers the frame
/// version, [`SCHEMA_VERSION`] and the list of types; the golden files pin the bytes behind them.
#[must_use]
pub fn schema_digest() -> Digest {
    let text: String = alloc::format!("tandem-schema {FRAME_VERSION} {SCHEMA_VERSION} {TYPE_LIST}");
    Digest::of(text.as_bytes())
}

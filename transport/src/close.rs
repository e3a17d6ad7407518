//! Codes with which a node closes a link or resets a stream.

/// Why a side closes. On the wire: the QUIC application error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CloseCode {
    /// Nothing more to do.
    Done = 0,
    /// No room for this connection now.
    Busy = 1,
    /// HELLOs do not fit.
    Incompatible = 2,
    /// The peer sent bytes that are no frame, or a frame past a limit.
    Malformed = 3,
    /// The process stops.
    ShuttingDown = 4,
    /// The peer was too slow (first frame, or progress of a frame).
    TooSlow = 5,
    /// The peer's identity is not, or no longer, allowed.
    Unauthorised = 6,
    /// Severed by a person's switch.
    Cut = 7,
    /// The sender gave up the stream.
    Abandoned = 8,
    /// As many links as one name may have are up: other processes use the peer's name.
    NameInUse = 9,
    /// The peer did not answer while it was waited for.
    Silent = 10,
    /// A code of a newer build.
    Unknown = 255,
}

impl CloseCode {
    /// Reads a code from the wire.
    #[must_use]
    pub const fn from_wire(code: u64) -> Self {
        match code {
            0 => Self::Done,
            1 => Self::Busy,
            2 => Self::Incompatible,
            3 => Self::Malformed,
            4 => Self::ShuttingDown,
            5 => Self::TooSlow,
            6 => Self::Unauthorised,
            7 => Self::Cut,
            8 => Self::Abandoned,
            9 => Self::NameInUse,
            10 => Self::Silent,
            _ => Self::Unknown,
        }
    }

    pub(crate) const fn to_wire(self) -> quinn::VarInt {
        quinn::VarInt::from_u32(self as u32)
    }
}

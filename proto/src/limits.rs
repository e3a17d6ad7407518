//! Every bound of the wire and of the sessions, in one place.
//! A peer that passes one of these gets a typed error; nothing is allocated past it.

/// ALPN protocol name; carries the major version.
pub const ALPN: &[u8] = b"tandem/1";
/// Oldest minor version of the protocol that this build supports.
pub const MINOR_MIN: u16 = 0;
/// Newest minor version of the protocol that this build supports.
pub const MINOR_MAX: u16 = 0;

/// Bytes of the fixed frame header.
pub const HEADER_BYTES: usize = 32;
/// Largest rkyv meta part of a frame, bytes.
pub const META_BYTES_MAX: usize = 64 * 1024;
/// Largest raw payload of a frame, bytes.
pub const PAYLOAD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Alignment of a payload in memory, bytes.
pub const PAYLOAD_ALIGN: usize = 64;

/// Longest prompt plus answer of a session, tokens.
pub const SESSION_TOKENS_MAX: usize = 128 * 1024;
/// Most tokens of one draft frame (context tail plus judged tokens).
pub const DRAFT_TOKENS_MAX: usize = 1024;
/// Most draft frames a session may have in flight.
pub const DRAFTS_IN_FLIGHT_MAX: usize = 64;
/// Most tokens the edge may hold beyond the last verdict.
pub const UNVERIFIED_TOKENS_MAX: usize = 1024;
/// Most decoder layers a peer may announce.
pub const LAYERS_MAX: usize = 256;
/// Most numbers that a peer may tell of a model's vocabulary.
pub const TOKENIZER_MARKS_MAX: usize = 384;
/// Most models a peer may announce.
pub const MODELS_MAX: usize = 16;
/// Longest name (model, node, request id), bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest human-readable message in a frame, bytes.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Most stop-token ids of a session.
pub const STOP_TOKENS_MAX: usize = 32;
/// Most logit-bias entries of a session (as in the OpenAI API).
pub const LOGIT_BIAS_MAX: usize = 300;
/// Longest grammar of a session, bytes. It travels in the meta of its opening frame.
pub const GRAMMAR_BYTES_MAX: usize = 48 * 1024;
/// Most alternatives reported per token.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// How often a cloud says how far it is with what an edge waits for, milliseconds.
pub const PROGRESS_MS: u64 = 250;

/// Tokens of one KV block.
pub const KV_BLOCK_TOKENS: usize = 32;
/// Most block ids of one offer or want.
pub const KV_OFFER_BLOCKS_MAX: usize = 1024;
/// Most bytes of all blocks of one exchange: both ends hold them until the last one is there.
pub const KV_EXCHANGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Time from connect to the first frame, milliseconds.
pub const HANDSHAKE_MS_MAX: u64 = 5_000;
/// Time a started frame may take to arrive, milliseconds.
pub const FRAME_PROGRESS_MS_MAX: u64 = 10_000;
/// Longest wait of an edge that could go on alone, for a node that works on its question.
pub const WORK_US_MAX: u64 = 30_000_000;

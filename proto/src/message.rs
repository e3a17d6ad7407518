//! The messages of a session, one struct per frame type. Tensors are never inside rkyv: a message
//! describes its payload, which follows it as raw little-endian bytes.
//!
//! Positions count tokens from the start of the sequence (prompt included): position `p` is the
//! token at index `p`. A draft token at position `p` is judged by the target's logits at `p − 1`.

use alloc::{string::String, vec::Vec};

use rkyv::{Archive, Deserialize, Serialize};

use crate::frame::schema_digest;
use crate::ids::{Digest, Epoch, Round, SessionId};
use crate::limits::{MINOR_MAX, MINOR_MIN, PAYLOAD_BYTES_MAX};

/// Sampling parameters, equal on both sides so that both draw the same noise.
/// `temperature == 0` is greedy.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Softmax temperature; 0 means greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 switches it off.
    pub top_p: f32,
    /// Keep the k largest logits; 0 switches it off.
    pub top_k: u32,
    /// Keep tokens with p ≥ min_p · p_max; 0 switches it off.
    pub min_p: f32,
    /// OpenAI presence penalty, −2 … 2.
    pub presence_penalty: f32,
    /// OpenAI frequency penalty, −2 … 2.
    pub frequency_penalty: f32,
    /// Multiplicative repetition penalty (CTRL, arXiv:1909.05858); 1 switches it off.
    pub repetition_penalty: f32,
    /// Added to single logits before anything else: (token, bias).
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the request's noise.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// What a grammar is written in.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rkyv(derive(Debug))]
#[repr(u8)]
pub enum GrammarSyntax {
    /// A JSON schema; the order of its properties is the order of the keys.
    JsonSchema = 1,
    /// A context-free grammar in llguidance's Lark dialect.
    Lark = 2,
}

/// The form that an answer must have. Which tokens it leaves at a position is a function of the
/// grammar and the answer's tokens before it, so both sides mask alike.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grammar {
    /// Language of `text`.
    pub syntax: GrammarSyntax,
    /// The grammar.
    pub text: String,
}

/// What a peer says about one model it has.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ModelCard {
    /// Name that sessions use.
    pub name: String,
    /// Digest of the whole model (configuration and weights).
    pub digest: Digest,
    /// Digest of the tokenizer; token ids mean the same only if it is equal.
    pub tokenizer: Digest,
    /// Sums over blocks of the vocabulary, by which a peer with another tokenizer finds out where it differs.
    pub tokenizer_marks: Vec<u64>,
    /// Cumulative digests: entry `i` covers the embedding and the layers `0..=i` with the configuration
    /// that shapes them, of the layers that the peer shares. The longest common prefix of two lists is the shared
    /// trunk.
    pub layers: Vec<Digest>,
    /// Names the arithmetic (kernel set and instruction set) that hidden states and KV come from.
    /// Bits agree between two peers only if it is equal.
    pub numerics: String,
    /// Width of the hidden state, numbers.
    pub hidden_size: u32,
    /// Context length, tokens.
    pub context_tokens: u32,
    /// What its choices may be relied upon for.
    pub exactness: Exactness,
}

/// How far a model's choices for one sequence are always the same.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rkyv(derive(Debug))]
#[repr(u8)]
pub enum Exactness {
    /// Bit for bit, whatever is computed beside it.
    Bitwise,
    /// But for ties: two tokens of almost equal probability may change places with the batch that the position
    /// is computed in.
    UpToTies,
}

impl Exactness {
    /// Name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bitwise => "bitwise",
            Self::UpToTies => "up_to_ties",
        }
    }
}

/// First frame of the control stream in both directions.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Hello {
    /// Oldest minor version spoken.
    pub minor_min: u16,
    /// Newest minor version spoken.
    pub minor_max: u16,
    /// Digest of the message schema ([`crate::frame::schema_digest`]).
    pub schema: Digest,
    /// Largest payload accepted, bytes.
    pub payload_bytes_max: u32,
    /// Grows with every start of the peer's process.
    pub boot_epoch: u64,
    /// Name of the node.
    pub node: String,
    /// Models the peer has.
    pub models: Vec<ModelCard>,
}

impl Hello {
    /// What a node of this build says of itself.
    #[must_use]
    pub fn new(node: &str, boot_epoch: u64, models: Vec<ModelCard>) -> Self {
        Self {
            minor_min: MINOR_MIN,
            minor_max: MINOR_MAX,
            schema: schema_digest(),
            payload_bytes_max: PAYLOAD_BYTES_MAX as u32,
            boot_epoch,
            node: node.into(),
            models,
        }
    }
}

/// Opens (or, after a broken link, resumes) a session. Payload: `prompt_tokens + committed_tokens`
/// token ids, u32 each.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Open {
    /// The session; a resumed one keeps its id.
    pub session: SessionId,
    /// Fencing epoch from the placement ticket.
    pub epoch: Epoch,
    /// Model that must judge.
    pub model: String,
    /// Request id of the client, for logs on both sides.
    pub request_id: String,
    /// Prompt tokens at the start of the payload.
    pub prompt_tokens: u32,
    /// Tokens of the answer that are already final, after the prompt in the payload.
    pub committed_tokens: u32,
    /// Sampling parameters of the request.
    pub sampling: SamplingParams,
    /// Token ids that end the answer.
    pub stop_tokens: Vec<u32>,
    /// Most tokens of the whole answer.
    pub answer_tokens_max: u32,
    /// Layers of the trunk: above them the edge may send hidden states; 0 for none.
    pub trunk_layers: u32,
    /// Ask the cloud to ship the trunk's state of the prompt to the edge.
    pub want_prompt_state: bool,
    /// Alternatives to report per decided token.
    pub top_logprobs: u32,
    /// The form that the answer must have, if any.
    pub grammar: Option<Grammar>,
}

/// Answer to [`Open`].
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Opened {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Tokens of the sequence whose state the cloud still holds (resume, prefix hit).
    pub held_tokens: u32,
    /// Layers of the trunk for which the cloud takes the edge's hidden states; 0 if it recomputes.
    pub trunk_layers: u32,
}

/// Tokens of the edge: a context tail and, from `judge_from` on, drafts to be judged.
/// Payload: hidden states above the trunk, f32 `[tokens, hidden_size]`, if `hidden` is set, for the
/// positions `hidden_from .. hidden_from + rows`.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Draft {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Draft path.
    pub round: Round,
    /// Position of the first token.
    pub start: u32,
    /// Position of the first token to be judged; `start + tokens.len()` when the position after
    /// the last token is the only question.
    pub judge_from: u32,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// First position whose trunk hidden state is in the payload.
    pub hidden_from: u32,
    /// Rows in the payload.
    pub hidden_rows: u32,
}

/// Asks the cloud to decode by itself from `start` on.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Generate {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Draft path.
    pub round: Round,
    /// Position of the first token wanted.
    pub start: u32,
    /// Final tokens before `start` that the cloud has not seen yet.
    pub tail: Vec<u32>,
    /// Most tokens to produce before stopping.
    pub tokens_max: u32,
}

/// One alternative at a position.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Alternative {
    /// Token id.
    pub id: u32,
    /// Natural log of its probability under the target model.
    pub logprob: f32,
}

/// The target's decision over the drafts `from ..`.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Draft path the verdict belongs to.
    pub round: Round,
    /// First judged position.
    pub from: u32,
    /// Drafts accepted from `from` on.
    pub accepted: u32,
    /// Token at `from + accepted`: the correction after a rejection, else the bonus token; none
    /// when the last accepted token ends the answer.
    pub next: Option<u32>,
    /// True if a draft was rejected (then `next` is a correction).
    pub rejected: bool,
    /// Of the context tail in the same frame, how many tokens the target would have chosen too.
    pub tail_agreed: u32,
    /// Length of that tail.
    pub tail_tokens: u32,
    /// Log-probabilities of the accepted tokens and of `next`.
    pub logprobs: Vec<f32>,
    /// Alternatives per decided token, in the same order, if asked for.
    pub alternatives: Vec<Vec<Alternative>>,
    /// Time the cloud spent computing, microseconds.
    pub compute_us: u32,
    /// Time the work waited in the cloud's queue, microseconds.
    pub queue_us: u32,
}

/// One token the cloud decoded by itself.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Token {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Draft path.
    pub round: Round,
    /// Position of the token.
    pub position: u32,
    /// Token id.
    pub id: u32,
    /// Natural log of its probability.
    pub logprob: f32,
    /// Alternatives, if asked for.
    pub alternatives: Vec<Alternative>,
}

/// End of what [`Generate`] asked for. Its absence at the end of a stream is a fault.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct End {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Draft path.
    pub round: Round,
    /// Tokens sent.
    pub count: u32,
    /// BLAKE3 over the token ids sent, little-endian u32 each.
    pub hash: Digest,
}

/// Why a peer refuses.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rkyv(derive(Debug))]
#[repr(u8)]
pub enum RefuseCode {
    /// The node has no room now; try again after `retry_after_ms`.
    Busy = 1,
    /// No model of that name.
    UnknownModel = 2,
    /// The epoch is older than the newest the node has seen.
    StaleEpoch = 3,
    /// The frame does not fit the session's state.
    OutOfOrder = 4,
    /// The frame is malformed or past a limit.
    Malformed = 5,
    /// The sequence does not fit the model's context.
    TooLong = 6,
    /// What is asked for is beyond what the node's target can do; the message says what.
    Incompatible = 7,
    /// The node shuts down.
    ShuttingDown = 8,
    /// Something failed inside the node.
    Internal = 9,
    /// KV state was corrupt or unknown.
    BadState = 10,
    /// The grammar cannot be used; the message says what is wrong with it.
    BadGrammar = 11,
    /// The node's engine hangs or is gone; go to another node.
    Stalled = 12,
}

/// A refusal; ends the session it is sent on.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Refuse {
    /// Kind of refusal.
    pub code: RefuseCode,
    /// What is wrong and what to do.
    pub message: String,
    /// When to try again, milliseconds; 0 for never.
    pub retry_after_ms: u32,
}

/// How far the cloud is with what the edge waits for: sent every [`PROGRESS_MS`](crate::limits::PROGRESS_MS)
/// while there is such work, so that an edge can tell a long prefill from a node that hangs.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Progress {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Tokens that the session's job still feeds to the model.
    pub rows_left: u32,
    /// True while the session's work is being done; false while it queues.
    pub working: bool,
    /// How long the engine has made no progress, if it hangs, milliseconds; else 0.
    pub stalled_ms: u32,
}

/// The edge is done with the session; the cloud may drop its state.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Close {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// True if the client went away before the answer was complete.
    pub cancelled: bool,
}

/// What a run of KV state is: enough to know that two peers mean the same numbers.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// First layer.
    pub layer_from: u32,
    /// One past the last layer.
    pub layer_to: u32,
    /// Numbers per token and layer.
    pub width: u32,
    /// Numbers per token of the hidden state that follows the layers' state; 0 for none.
    pub hidden: u32,
}

/// A side has blocks.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KvOffer {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Exchange within the session.
    pub exchange: u32,
    /// Shape of every block.
    pub shape: KvShape,
    /// Ids in order; block `i` covers the tokens `i·KV_BLOCK_TOKENS ..`.
    pub ids: Vec<Digest>,
    /// Tokens covered; the last block may be partial.
    pub tokens: u32,
}

/// The blocks of an offer that the other side wants; none declines.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KvWant {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Exchange within the session.
    pub exchange: u32,
    /// Indices into the offer's ids, ascending.
    pub indices: Vec<u32>,
}

/// Asks the other side to offer the state of the sequence's first `tokens` tokens.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KvPull {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Exchange within the session.
    pub exchange: u32,
    /// First and one past the last layer.
    pub layer_from: u32,
    /// One past the last layer.
    pub layer_to: u32,
    /// Tokens wanted from the start of the sequence.
    pub tokens: u32,
}

/// One block; payload: f32 `[layer][token][width]`, then hidden `[token][hidden]`.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KvBlock {
    /// Session the block belongs to.
    pub session: SessionId,
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Exchange within the session.
    pub exchange: u32,
    /// Index in the offer.
    pub index: u32,
    /// Recipe of the block ([`crate::block::BlockKey`]).
    pub id: Digest,
    /// Digest of the payload.
    pub payload_digest: Digest,
    /// Tokens in the block.
    pub tokens: u32,
    /// Shape of the payload.
    pub shape: KvShape,
}

/// The receiver has checked and published the blocks (or says how many failed).
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KvAck {
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Exchange within the session.
    pub exchange: u32,
    /// Blocks published.
    pub published: u32,
    /// Blocks refused by a check.
    pub refused: u32,
}

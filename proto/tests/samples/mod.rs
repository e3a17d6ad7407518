//! Random but valid messages of every type, from a seed alone.

use bytes::Bytes;
use tandem_proto::{
    frame::{Frame, FrameType, Message, schema_digest},
    ids::{Digest, Epoch, Round, SessionId},
    message::*,
};

/// xorshift64*: small, seeded, the same on every machine.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn u32(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    /// Uniform in `0..n`; 0 for `n == 0`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) as usize) % n.max(1)
    }

    pub(crate) fn bool(&mut self) -> bool {
        self.next() >> 63 == 1
    }

    fn f32(&mut self) -> f32 {
        self.below(4096) as f32 / 256.0 - 8.0
    }

    fn many<T>(&mut self, max: usize, mut f: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(max + 1)).map(|_| f(self)).collect()
    }

    fn text(&mut self, max: usize) -> String {
        self.many(max, |r| char::from(b' ' + r.below(95) as u8)).into_iter().collect()
    }

    fn digest(&mut self) -> Digest {
        Digest::of(&self.next().to_le_bytes())
    }

    fn session(&mut self) -> SessionId {
        let (a, b) = (self.next().to_le_bytes(), self.next().to_le_bytes());
        SessionId(core::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] }))
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Bytes {
        (0..len).map(|_| self.u32() as u8).collect::<Vec<_>>().into()
    }
}

fn alternatives(r: &mut Rng) -> Vec<Alternative> {
    r.many(20, |r| Alternative { id: r.u32(), logprob: r.f32() })
}

fn shape(r: &mut Rng) -> KvShape {
    KvShape { layer_from: r.u32(), layer_to: r.u32(), width: r.u32(), hidden: r.u32() }
}

fn model(r: &mut Rng) -> ModelCard {
    ModelCard {
        name: r.text(64),
        digest: r.digest(),
        tokenizer: r.digest(),
        tokenizer_marks: r.many(384, Rng::next),
        layers: r.many(24, Rng::digest),
        numerics: r.text(32),
        hidden_size: r.u32(),
        exactness: if r.bool() { Exactness::Bitwise } else { Exactness::UpToTies },
        context_tokens: r.u32(),
    }
}

fn sampling(r: &mut Rng) -> SamplingParams {
    SamplingParams {
        temperature: r.f32(),
        top_p: r.f32(),
        top_k: r.u32(),
        min_p: r.f32(),
        presence_penalty: r.f32(),
        frequency_penalty: r.f32(),
        repetition_penalty: r.f32(),
        logit_bias: r.many(300, |r| (r.u32(), r.f32())),
        seed: r.next(),
    }
}

/// A message of type `frame`, every field drawn from `r`, every length within its bound.
pub(crate) fn message(frame: FrameType, r: &mut Rng) -> Message {
    let (epoch, round, exchange) = (Epoch(r.next()), Round(r.u32()), r.u32());
    match frame {
        FrameType::Hello => Hello {
            minor_min: r.u32() as u16,
            minor_max: r.u32() as u16,
            schema: schema_digest(),
            payload_bytes_max: r.u32(),
            boot_epoch: r.next(),
            node: r.text(256),
            models: r.many(4, model),
        }
        .into(),
        FrameType::Open => Open {
            session: r.session(),
            epoch,
            model: r.text(256),
            request_id: r.text(256),
            prompt_tokens: r.below(64 * 1024) as u32,
            committed_tokens: r.below(64 * 1024) as u32,
            sampling: sampling(r),
            stop_tokens: r.many(32, Rng::u32),
            answer_tokens_max: r.u32(),
            trunk_layers: r.u32(),
            want_prompt_state: r.bool(),
            top_logprobs: r.below(21) as u32,
            grammar: r.bool().then(|| Grammar {
                syntax: [GrammarSyntax::JsonSchema, GrammarSyntax::Lark][r.below(2)],
                text: r.text(4096),
            }),
        }
        .into(),
        FrameType::Opened => Opened { epoch, held_tokens: r.u32(), trunk_layers: r.u32() }.into(),
        FrameType::Draft => Draft {
            epoch,
            round,
            start: r.u32(),
            judge_from: r.u32(),
            tokens: r.many(1024, Rng::u32),
            hidden_from: r.u32(),
            hidden_rows: r.u32(),
        }
        .into(),
        FrameType::Generate => {
            Generate { epoch, round, start: r.u32(), tail: r.many(1024, Rng::u32), tokens_max: r.u32() }.into()
        }
        FrameType::Verdict => Verdict {
            epoch,
            round,
            from: r.u32(),
            accepted: r.u32(),
            next: r.bool().then(|| r.u32()),
            rejected: r.bool(),
            tail_agreed: r.u32(),
            tail_tokens: r.u32(),
            logprobs: r.many(64, Rng::f32),
            alternatives: r.many(64, alternatives),
            compute_us: r.u32(),
            queue_us: r.u32(),
        }
        .into(),
        FrameType::Token => {
            Token { epoch, round, position: r.u32(), id: r.u32(), logprob: r.f32(), alternatives: alternatives(r) }
                .into()
        }
        FrameType::End => End { epoch, round, count: r.u32(), hash: r.digest() }.into(),
        FrameType::Refuse => Refuse {
            code: [RefuseCode::Busy, RefuseCode::StaleEpoch, RefuseCode::BadState, RefuseCode::BadGrammar][r.below(4)],
            message: r.text(1024),
            retry_after_ms: r.u32(),
        }
        .into(),
        FrameType::Close => Close { epoch, cancelled: r.bool() }.into(),
        FrameType::Progress => Progress { epoch, rows_left: r.u32(), working: r.bool(), stalled_ms: r.u32() }.into(),
        FrameType::KvOffer => {
            KvOffer { epoch, exchange, shape: shape(r), ids: r.many(1024, Rng::digest), tokens: r.u32() }.into()
        }
        FrameType::KvWant => KvWant { epoch, exchange, indices: r.many(1024, Rng::u32) }.into(),
        FrameType::KvPull => KvPull { epoch, exchange, layer_from: r.u32(), layer_to: r.u32(), tokens: r.u32() }.into(),
        FrameType::KvBlock => KvBlock {
            session: r.session(),
            epoch,
            exchange,
            index: r.u32(),
            id: r.digest(),
            payload_digest: r.digest(),
            tokens: r.u32(),
            shape: shape(r),
        }
        .into(),
        FrameType::KvAck => KvAck { epoch, exchange, published: r.u32(), refused: r.u32() }.into(),
    }
}

/// A frame of type `frame` with a payload of at most 1 KiB, if the type has one.
pub(crate) fn frame(frame: FrameType, r: &mut Rng) -> Frame {
    let len = r.below(frame.payload_bytes_max().min(1024) + 1);
    Frame { seq: r.next(), message: message(frame, r), payload: r.bytes(len) }
}

/// The frame's bytes as they stand on the wire.
pub(crate) fn wire(frame: &Frame) -> Vec<u8> {
    let (head, payload) = tandem_proto::frame::encode(frame).expect("a valid frame encodes");
    [&head[..], &payload[..]].concat()
}

//! What a decoder is made of, as data: parsed from a Hugging Face `config.json` (`hf`) or from GGUF
//! metadata (`gguf`), checked field by field. A new family is a function here that says how it
//! differs from the plain decoder, names in `names`, and a golden test.

mod canonical;
mod deepseek;
mod fields;
mod gemma;
mod gguf;
mod hf;
mod llama;
mod minicpm;
mod moe;
mod qwen;
mod rope;
mod shaping;
#[cfg(test)]
mod tests;

use crate::error::EngineError;

pub(crate) use gguf::from_gguf;
pub use rope::{Rope, RopeScaling};

/// Most decoder layers.
pub const LAYERS_MAX: usize = tandem_proto::limits::LAYERS_MAX;
/// Largest hidden, intermediate or projection width.
pub const WIDTH_MAX: usize = 1 << 18;
/// Largest vocabulary.
pub const VOCAB_MAX: usize = 1 << 20;
/// Longest context, tokens.
pub const CONTEXT_MAX: usize = 1 << 20;
/// Most routed experts of a layer.
pub const EXPERTS_MAX: usize = 1024;

/// Most query heads that share one key and value head.
pub const HEADS_PER_GROUP_MAX: usize = 64;

/// Which model family's tensor names apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1–3 and what is named like it: SmolLM2, MiniCPM, Qwen2 and Qwen3, OLMoE, Qwen3-MoE.
    Llama,
    /// DeepSeek-V2/V3/R1 and MiniCPM3: latent attention.
    Deepseek,
    /// Gemma 2 and 3: two more norms.
    Gemma,
    /// Mixtral: experts with names of their own.
    Mixtral,
    /// gpt-oss: experts stacked and transposed, sinks.
    GptOss,
    /// Qwen2-MoE: one shared expert with a gate.
    Qwen2Moe,
}

/// Shape of a decoder. Everything in it has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Family the weights are named after.
    pub family: Family,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the hidden state, numbers.
    pub hidden_size: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence, tokens.
    pub context_tokens: usize,
    /// The RMS norms.
    pub norms: Norms,
    /// Heads of every layer's attention.
    pub attention: Attention,
    /// How every layer's attention computes.
    pub rules: AttentionRules,
    /// Rotary position embeddings; a layer names one by its index.
    pub ropes: Vec<Rope>,
    /// What differs between the attention of layers, one per layer.
    pub reach: Vec<Reach>,
    /// Feed-forward part, one per layer.
    pub feed_forward: Vec<FeedForward>,
    /// What stands between the gate and the product with `up`.
    pub activation: Activation,
    /// Dense MLPs and experts have biases.
    pub mlp_bias: bool,
    /// Factors on embeddings, residual branches and logits.
    pub scales: Scales,
    /// Logits pass through `cap · tanh(x / cap)`.
    pub logit_softcap: Option<f32>,
    /// The head is the embedding matrix.
    pub tied_head: bool,
    /// Token that starts a text, if the model wants one.
    pub bos_token: Option<u32>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// What every family's configuration says.
struct Basics {
    family: Family,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    context_tokens: usize,
    /// Epsilon of the norms.
    eps: f32,
    attention: Attention,
    rope: Rope,
    /// Inner width of the MLPs.
    width: usize,
    tied_head: bool,
    bos_token: Option<u32>,
    eos_tokens: Vec<u32>,
}

/// RMS norms of a decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norms {
    /// Epsilon.
    pub eps: f32,
    /// Weights are stored minus one (Gemma in Hugging Face's files).
    pub minus_one: bool,
    /// The outputs of attention and feed-forward are normed too, before they are added (Gemma).
    pub sandwich: bool,
}

/// Factors on the residual stream (MiniCPM, Gemma); 1 elsewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Of embeddings.
    pub embedding: f32,
    /// Of what attention and feed-forward add.
    pub residual: f32,
    /// Of logits, before any cap.
    pub logits: f32,
}

/// Kind of attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attention {
    /// Multi-head, grouped-query or multi-query attention. Cache: keys then values.
    Grouped {
        /// Query heads.
        heads: usize,
        /// Key and value heads; divides `heads`.
        kv_heads: usize,
        /// Numbers per head.
        head_dim: usize,
    },
    /// Multi-head latent attention (DeepSeek, MiniCPM3). Cache: latent, then rotated shared key.
    Latent {
        /// Query heads.
        heads: usize,
        /// Width of the query's low-rank bottleneck, if there is one.
        q_rank: Option<usize>,
        /// Width of the cached latent.
        kv_rank: usize,
        /// Unrotated numbers per query head.
        nope_dim: usize,
        /// Rotated numbers per query head, and of the shared key.
        rope_dim: usize,
        /// Numbers per value head.
        v_dim: usize,
        /// Epsilon of the norms of the two bottlenecks.
        eps: f32,
    },
}

impl Attention {
    /// Numbers cached per token and layer.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        match *self {
            Self::Grouped { kv_heads, head_dim, .. } => 2 * kv_heads * head_dim,
            Self::Latent { kv_rank, rope_dim, .. } => kv_rank + rope_dim,
        }
    }

    /// Rotated numbers per head.
    #[must_use]
    pub fn rope_dim(&self) -> usize {
        match *self {
            Self::Grouped { head_dim, .. } => head_dim,
            Self::Latent { rope_dim, .. } => rope_dim,
        }
    }

    /// Query heads.
    #[must_use]
    pub fn heads(&self) -> usize {
        match *self {
            Self::Grouped { heads, .. } | Self::Latent { heads, .. } => heads,
        }
    }

    /// `1 / √(numbers per query head)`, the usual factor of scores.
    fn usual_scale(&self) -> f32 {
        let dim = match *self {
            Self::Grouped { head_dim, .. } => head_dim,
            Self::Latent { nope_dim, rope_dim, .. } => nope_dim + rope_dim,
        };
        1.0 / (dim as f32).sqrt()
    }
}

/// How attention computes, the same in every layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionRules {
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Scores pass through `cap · tanh(x / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// Norm of queries and keys before rotation.
    pub head_norm: HeadNorm,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// Every head has a logit that takes weight but gives no value (gpt-oss).
    pub sinks: bool,
}

/// Norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNorm {
    /// None.
    No,
    /// Each head by itself (Qwen3, Gemma 3).
    PerHead,
    /// All heads of a row together (OLMoE).
    Whole,
}

/// What a layer's attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Tokens seen, its own included; all if none.
    pub window: Option<usize>,
    /// Index into [`DecoderSpec::ropes`].
    pub rope: usize,
}

/// Between gate and up of an MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
    /// `gelu(gate) · up`, the tanh form (Gemma).
    GeluTanh,
    /// `g · σ(alpha·g) · (u + 1)` with `g = min(gate, limit)` and `u = up` within `±limit` (gpt-oss).
    ClampedSwiglu {
        /// Steepness of the logistic.
        alpha: f32,
        /// Clamp.
        limit: f32,
    },
}

/// Feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FeedForward {
    /// Gated MLP.
    Dense {
        /// Inner width.
        width: usize,
    },
    /// Mixture of experts.
    Experts(ExpertsSpec),
}

/// How router scores become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Logistic of each score (DeepSeek-V3).
    Sigmoid,
    /// Softmax over all experts, then the best (Mixtral, Qwen, OLMoE, DeepSeek-V2).
    Softmax,
    /// The best, then softmax over them (gpt-oss).
    SoftmaxOfChosen,
}

/// What a group of experts is worth when groups are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupWorth {
    /// Its best expert (DeepSeek-V2).
    Best,
    /// The sum of its two best (DeepSeek-V3).
    TwoBest,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsSpec {
    /// Routed experts.
    pub experts: usize,
    /// Experts chosen per token.
    pub chosen: usize,
    /// Inner width of one routed expert.
    pub width: usize,
    /// Inner width of the shared expert; 0 for none.
    pub shared_width: usize,
    /// The shared expert's output is multiplied by the logistic of a score (Qwen2-MoE).
    pub shared_gated: bool,
    /// From scores to weights.
    pub gate: Gate,
    /// The router's product has a bias (gpt-oss).
    pub router_bias: bool,
    /// A bias decides who is chosen but not the weights (DeepSeek-V3).
    pub correction: bool,
    /// Groups of experts; the best groups are chosen first.
    pub groups: usize,
    /// Groups that stay.
    pub groups_chosen: usize,
    /// What a group is worth.
    pub group_worth: GroupWorth,
    /// Chosen weights are divided by their sum.
    pub normalise: bool,
    /// Chosen weights are multiplied by this afterwards.
    pub scale: f32,
}

impl ExpertsSpec {
    /// `chosen` of `experts` by softmax, without groups, biases or a shared expert.
    pub(crate) fn plain(experts: usize, chosen: usize, width: usize) -> Self {
        Self {
            experts,
            chosen,
            width,
            shared_width: 0,
            shared_gated: false,
            gate: Gate::Softmax,
            router_bias: false,
            correction: false,
            groups: 1,
            groups_chosen: 1,
            group_worth: GroupWorth::Best,
            normalise: true,
            scale: 1.0,
        }
    }

    /// Checks numbers against each other; `fields` are the names of the counts of groups, of chosen
    /// groups and of chosen experts.
    pub(crate) fn checked(self, fields: [&str; 3]) -> Result<Self, EngineError> {
        let [group_field, groups_chosen_field, chosen_field] = fields;
        if !self.experts.is_multiple_of(self.groups) {
            let problem = format!("{} does not divide {} experts", self.groups, self.experts);
            return Err(EngineError::spec(group_field, problem));
        }
        if self.groups_chosen > self.groups {
            let problem = format!("{} of {} groups", self.groups_chosen, self.groups);
            return Err(EngineError::spec(groups_chosen_field, problem));
        }
        let reachable = self.experts / self.groups * self.groups_chosen;
        if self.chosen > reachable {
            let problem = format!("{} experts chosen of {reachable} that can be", self.chosen);
            return Err(EngineError::spec(chosen_field, problem));
        }
        Ok(self)
    }
}

impl DecoderSpec {
    /// Parses a Hugging Face `config.json`.
    ///
    /// # Errors
    /// The field that is missing, absurd or not supported.
    pub fn from_hf(config: &[u8]) -> Result<Self, EngineError> {
        hf::from_hf(config)
    }

    /// The plain decoder: pre-norms, SiLU, one rope, no biases, no windows, no experts.
    fn plain(b: Basics) -> Self {
        Self {
            family: b.family,
            layers: b.layers,
            hidden_size: b.hidden_size,
            vocab_size: b.vocab_size,
            context_tokens: b.context_tokens,
            norms: Norms { eps: b.eps, minus_one: false, sandwich: false },
            attention: b.attention,
            rules: AttentionRules {
                scale: b.attention.usual_scale(),
                softcap: None,
                head_norm: HeadNorm::No,
                qkv_bias: false,
                output_bias: false,
                sinks: false,
            },
            ropes: vec![b.rope],
            reach: vec![Reach { window: None, rope: 0 }; b.layers],
            feed_forward: vec![FeedForward::Dense { width: b.width }; b.layers],
            activation: Activation::Silu,
            mlp_bias: false,
            scales: Scales { embedding: 1.0, residual: 1.0, logits: 1.0 },
            logit_softcap: None,
            tied_head: b.tied_head,
            bos_token: b.bos_token,
            eos_tokens: b.eos_tokens,
        }
    }

    /// Checks relations between fields that no single field shows.
    pub(crate) fn checked(mut self) -> Result<Self, EngineError> {
        if self.feed_forward.len() != self.layers || self.reach.len() != self.layers {
            return Err(EngineError::spec("num_hidden_layers", "differs from the number of layers described"));
        }
        let rope_dim = self.attention.rope_dim();
        if !rope_dim.is_multiple_of(2) {
            return Err(EngineError::spec("head_dim", format!("{rope_dim} is odd, rotary embedding needs pairs")));
        }
        for rope in &self.ropes {
            rope.scaling.check(rope_dim)?;
        }
        if let Attention::Grouped { heads, kv_heads, .. } = self.attention
            && (!heads.is_multiple_of(kv_heads) || heads / kv_heads > HEADS_PER_GROUP_MAX)
        {
            return Err(EngineError::spec(
                "num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads = {heads} into at most {HEADS_PER_GROUP_MAX}"),
            ));
        }
        // Small models of a family keep the ids of the large vocabulary; no such token can come up.
        let is_there = |id: &u32| (*id as usize) < self.vocab_size;
        self.bos_token = self.bos_token.filter(is_there);
        self.eos_tokens.retain(is_there);
        Ok(self)
    }

    /// Numbers cached per token and layer.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.attention.kv_width()
    }

    /// KV state of one token over all layers, bytes.
    #[must_use]
    pub fn kv_token_bytes(&self) -> u64 {
        (self.kv_width() * self.layers * size_of::<f32>()) as u64
    }

    /// Rope of a layer.
    pub(crate) fn rope_of(&self, layer: usize) -> &Rope {
        &self.ropes[self.reach[layer].rope]
    }
}

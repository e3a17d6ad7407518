//! What a decoder is made of, as data: parsed from a Hugging Face `config.json` or from GGUF
//! metadata, checked field by field. A new family is a spec here, a name map in `names`, a golden test.

use serde_json::Value;

use crate::error::EngineError;

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

/// Which model family's names and defaults apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1–3 and what is built like it (SmolLM2).
    Llama,
    /// DeepSeek-V3: latent attention, sigmoid-gated experts.
    DeepseekV3,
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
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Attention of every layer.
    pub attention: Attention,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Feed-forward part, one per layer.
    pub feed_forward: Vec<FeedForward>,
    /// The head is the embedding matrix.
    pub tied_head: bool,
    /// Token that starts a text, if the model wants one.
    pub bos_token: Option<u32>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Kind of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Multi-head latent attention (DeepSeek-V2/V3). Cache: latent, then rotated shared key.
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
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Pairs are neighbours (GGUF Llama, DeepSeek); otherwise halves are paired.
    pub interleaved: bool,
    /// Stretching of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths longer than `original / low` are divided.
        low: f32,
        /// Wavelengths shorter than `original / high` are kept.
        high: f32,
        /// Context length of the original training.
        original: f32,
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

/// A sigmoid-gated mixture of experts (DeepSeek-V3).
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
    /// Groups of experts; the best groups are chosen first.
    pub groups: usize,
    /// Groups that stay.
    pub groups_chosen: usize,
    /// Chosen weights are divided by their sum.
    pub normalise: bool,
    /// Chosen weights are multiplied by this afterwards.
    pub scale: f32,
}

impl DecoderSpec {
    /// Parses a Hugging Face `config.json`.
    ///
    /// # Errors
    /// The field that is missing, absurd or not supported.
    pub fn from_hf(config: &[u8]) -> Result<Self, EngineError> {
        let value: Value = serde_json::from_slice(config)
            .map_err(|e| EngineError::Json { file: "config.json", problem: e.to_string() })?;
        let c = Fields { value: &value };
        match c.text("model_type")? {
            "deepseek_v3" => deepseek(&c),
            "llama" => llama(&c),
            other => Err(EngineError::spec(
                "model_type",
                format!("`{other}` is not supported; supported: deepseek_v3, llama"),
            )),
        }
        .and_then(Self::checked)
    }

    /// Checks relations between fields that no single field shows.
    pub(crate) fn checked(self) -> Result<Self, EngineError> {
        if self.feed_forward.len() != self.layers {
            return Err(EngineError::spec("num_hidden_layers", "differs from the number of feed-forward parts"));
        }
        let rope_dim = self.attention.rope_dim();
        if !rope_dim.is_multiple_of(2) {
            return Err(EngineError::spec("head_dim", format!("{rope_dim} is odd, rotary embedding needs pairs")));
        }
        if let Attention::Grouped { heads, kv_heads, .. } = self.attention
            && (!heads.is_multiple_of(kv_heads) || heads / kv_heads > HEADS_PER_GROUP_MAX)
        {
            return Err(EngineError::spec(
                "num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads = {heads} into at most {HEADS_PER_GROUP_MAX}"),
            ));
        }
        let vocab = self.vocab_size;
        if let Some(id) = self.bos_token.iter().chain(&self.eos_tokens).find(|&&id| id as usize >= vocab) {
            return Err(EngineError::spec("eos_token_id", format!("token {id} is outside the vocabulary of {vocab}")));
        }
        Ok(self)
    }

    /// Numbers cached per token and layer.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.attention.kv_width()
    }

    /// The configuration that shapes layer `layer`'s numbers, for fingerprints: independent of how
    /// many layers lie above and of how long the context may be.
    pub(crate) fn shaping(&self, layer: usize) -> String {
        format!(
            "hidden {} vocab {} eps {:?} attention {:?} rope {:?} feed-forward {:?}",
            self.hidden_size, self.vocab_size, self.rms_eps, self.attention, self.rope, self.feed_forward[layer]
        )
    }
}

fn deepseek(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    c.expect("scoring_func", "sigmoid")?;
    c.expect("topk_method", "noaux_tc")?;
    c.refuse_true("attention_bias")?;
    if c.value.get("quantization_config").is_some_and(|v| !v.is_null()) {
        return Err(EngineError::spec("quantization_config", "block-scaled FP8 weights are not supported yet"));
    }
    let layers = c.count("num_hidden_layers", LAYERS_MAX)?;
    let dense_layers = c.count_or("first_k_dense_replace", 0, 0, LAYERS_MAX)?;
    let every = c.count_or("moe_layer_freq", 1, 1, LAYERS_MAX)?;
    let dense = FeedForward::Dense { width: c.count("intermediate_size", WIDTH_MAX)? };
    let mut feed_forward = vec![dense; layers];
    if dense_layers < layers {
        let experts = experts(c)?;
        for (i, f) in feed_forward.iter_mut().enumerate().skip(dense_layers) {
            if i.is_multiple_of(every) {
                *f = FeedForward::Experts(experts);
            }
        }
    }
    let q_rank = match c.value.get("q_lora_rank") {
        None | Some(Value::Null) => None,
        Some(_) => Some(c.count("q_lora_rank", WIDTH_MAX)?),
    };
    let interleaved = c.flag_or("rope_interleave", true)?;
    Ok(DecoderSpec {
        family: Family::DeepseekV3,
        layers,
        hidden_size: c.count("hidden_size", WIDTH_MAX)?,
        vocab_size: c.count("vocab_size", VOCAB_MAX)?,
        context_tokens: c.count("max_position_embeddings", CONTEXT_MAX)?,
        rms_eps: c.positive("rms_norm_eps")?,
        attention: Attention::Latent {
            heads: c.count("num_attention_heads", WIDTH_MAX)?,
            q_rank,
            kv_rank: c.count("kv_lora_rank", WIDTH_MAX)?,
            nope_dim: c.count("qk_nope_head_dim", WIDTH_MAX)?,
            rope_dim: c.count("qk_rope_head_dim", WIDTH_MAX)?,
            v_dim: c.count("v_head_dim", WIDTH_MAX)?,
        },
        rope: Rope { theta: rope_theta(c)?, interleaved, scaling: rope_scaling(c)? },
        feed_forward,
        tied_head: c.flag_or("tie_word_embeddings", false)?,
        bos_token: c.tokens("bos_token_id")?.first().copied(),
        eos_tokens: c.tokens("eos_token_id")?,
    })
}

fn experts(c: &Fields<'_>) -> Result<ExpertsSpec, EngineError> {
    let width = c.count("moe_intermediate_size", WIDTH_MAX)?;
    let spec = ExpertsSpec {
        experts: c.count("n_routed_experts", EXPERTS_MAX)?,
        chosen: c.count("num_experts_per_tok", EXPERTS_MAX)?,
        width,
        shared_width: width * c.count_or("n_shared_experts", 0, 0, EXPERTS_MAX)?,
        groups: c.count_or("n_group", 1, 1, EXPERTS_MAX)?,
        groups_chosen: c.count_or("topk_group", 1, 1, EXPERTS_MAX)?,
        normalise: c.flag_or("norm_topk_prob", true)?,
        scale: c.positive("routed_scaling_factor")?,
    };
    if !spec.experts.is_multiple_of(spec.groups) {
        return Err(EngineError::spec("n_group", format!("{} does not divide {} experts", spec.groups, spec.experts)));
    }
    if spec.groups_chosen > spec.groups {
        return Err(EngineError::spec("topk_group", format!("{} of {} groups", spec.groups_chosen, spec.groups)));
    }
    let reachable = spec.experts / spec.groups * spec.groups_chosen;
    if spec.chosen > reachable {
        return Err(EngineError::spec(
            "num_experts_per_tok",
            format!("{} experts chosen of {reachable} that can be", spec.chosen),
        ));
    }
    Ok(spec)
}

fn llama(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    c.refuse_true("attention_bias")?;
    c.refuse_true("mlp_bias")?;
    let layers = c.count("num_hidden_layers", LAYERS_MAX)?;
    let hidden_size = c.count("hidden_size", WIDTH_MAX)?;
    let heads = c.count("num_attention_heads", WIDTH_MAX)?;
    let has_theta = c.value.get("rope_theta").is_some() || c.value.get("rope_parameters").is_some();
    let theta = if has_theta { rope_theta(c)? } else { 10_000.0 };
    Ok(DecoderSpec {
        family: Family::Llama,
        layers,
        hidden_size,
        vocab_size: c.count("vocab_size", VOCAB_MAX)?,
        context_tokens: c.count("max_position_embeddings", CONTEXT_MAX)?,
        rms_eps: c.positive("rms_norm_eps")?,
        attention: Attention::Grouped {
            heads,
            kv_heads: c.count_or("num_key_value_heads", heads, 1, WIDTH_MAX)?,
            head_dim: c.count_or("head_dim", hidden_size / heads, 1, WIDTH_MAX)?,
        },
        rope: Rope { theta, interleaved: false, scaling: rope_scaling(c)? },
        feed_forward: vec![FeedForward::Dense { width: c.count("intermediate_size", WIDTH_MAX)? }; layers],
        tied_head: c.flag_or("tie_word_embeddings", false)?,
        bos_token: c.tokens("bos_token_id")?.first().copied(),
        eos_tokens: c.tokens("eos_token_id")?,
    })
}

/// Base of the rotary frequencies: at the top, or where newer configurations keep it.
fn rope_theta(c: &Fields<'_>) -> Result<f32, EngineError> {
    match c.value.get("rope_parameters") {
        Some(value) if c.value.get("rope_theta").is_none() => Fields { value }.positive("rope_theta"),
        _ => c.positive("rope_theta"),
    }
}

fn rope_scaling(c: &Fields<'_>) -> Result<RopeScaling, EngineError> {
    let value = ["rope_scaling", "rope_parameters"].iter().find_map(|f| c.value.get(f).filter(|v| !v.is_null()));
    let Some(value) = value else { return Ok(RopeScaling::None) };
    let s = Fields { value };
    let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str).unwrap_or("");
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: s.positive("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: s.positive("factor")?,
            low: s.positive("low_freq_factor")?,
            high: s.positive("high_freq_factor")?,
            original: s.positive("original_max_position_embeddings")?,
        }),
        other => Err(EngineError::spec(
            "rope_scaling",
            format!("`{other}` is not supported; supported: default, linear, llama3"),
        )),
    }
}

/// Typed access to the fields of a JSON object.
struct Fields<'a> {
    value: &'a Value,
}

impl Fields<'_> {
    fn get(&self, name: &str) -> Result<&Value, EngineError> {
        self.value.get(name).ok_or_else(|| EngineError::spec(name, "is missing"))
    }

    fn text(&self, name: &str) -> Result<&str, EngineError> {
        self.get(name)?.as_str().ok_or_else(|| EngineError::spec(name, "is not a string"))
    }

    fn expect(&self, name: &str, only: &str) -> Result<(), EngineError> {
        match self.value.get(name).and_then(Value::as_str) {
            Some(v) if v == only => Ok(()),
            None if self.value.get(name).is_none() => Ok(()),
            _ => Err(EngineError::spec(name, format!("only `{only}` is supported"))),
        }
    }

    fn refuse_true(&self, name: &str) -> Result<(), EngineError> {
        if self.flag_or(name, false)? { Err(EngineError::spec(name, "is not supported")) } else { Ok(()) }
    }

    fn flag_or(&self, name: &str, default: bool) -> Result<bool, EngineError> {
        match self.value.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| EngineError::spec(name, "is not true or false")),
        }
    }

    fn count(&self, name: &str, max: usize) -> Result<usize, EngineError> {
        self.get(name)?;
        self.count_or(name, 0, 1, max)
    }

    fn count_or(&self, name: &str, default: usize, min: usize, max: usize) -> Result<usize, EngineError> {
        let n = match self.value.get(name) {
            None | Some(Value::Null) => default as u64,
            Some(v) => v.as_u64().ok_or_else(|| EngineError::spec(name, "is not a whole number"))?,
        };
        usize::try_from(n)
            .ok()
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| EngineError::spec(name, format!("{n} is outside {min}..={max}")))
    }

    fn positive(&self, name: &str) -> Result<f32, EngineError> {
        let n = self.get(name)?.as_f64().ok_or_else(|| EngineError::spec(name, "is not a number"))? as f32;
        if n.is_finite() && n > 0.0 { Ok(n) } else { Err(EngineError::spec(name, format!("{n} is not positive"))) }
    }

    /// A token id, a list of them, or none.
    fn tokens(&self, name: &str) -> Result<Vec<u32>, EngineError> {
        let id = |v: &Value| {
            v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| EngineError::spec(name, "is not a token id"))
        };
        match self.value.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(v) => Ok(vec![id(v)?]),
        }
    }
}

//! GGUF metadata: the parts that architectures share.

use super::rope::yarn_magnitude;
use super::{
    Attention, Basics, CONTEXT_MAX, DecoderSpec, EXPERTS_MAX, ExpertsSpec, Family, LAYERS_MAX, Rope, RopeScaling,
    VOCAB_MAX, WIDTH_MAX, deepseek, gemma, llama, minicpm, moe, qwen,
};
use crate::error::EngineError;
use crate::load::gguf::{Gguf, Value};
use crate::load::{Encoding, RawTensor};

type Parser = fn(&Metadata<'_>) -> Result<DecoderSpec, EngineError>;

/// `general.architecture` and who reads it.
const ARCHITECTURES: &[(&str, Parser)] = &[
    ("deepseek2", deepseek::gguf),
    ("gemma2", gemma::gemma2_gguf),
    ("gemma3", gemma::gemma3_gguf),
    ("gpt-oss", moe::gpt_oss_gguf),
    ("llama", llama::gguf),
    ("minicpm", minicpm::minicpm_gguf),
    ("minicpm3", minicpm::minicpm3_gguf),
    ("olmoe", moe::olmoe_gguf),
    ("qwen2", qwen::qwen2_gguf),
    ("qwen2moe", qwen::qwen2_moe_gguf),
    ("qwen3", qwen::qwen3_gguf),
    ("qwen3moe", qwen::qwen3_moe_gguf),
];

/// The bytes of a tensor by its name, in whichever part of the model it is.
type StoredBytes<'a> = &'a dyn Fn(&str) -> Option<&'a [u8]>;

/// The decoder that a GGUF's metadata describes.
pub(crate) fn from_gguf<'a>(file: &'a Gguf<'_>, stored: StoredBytes<'a>) -> Result<DecoderSpec, EngineError> {
    let architecture = file.text("general.architecture")?;
    let Some((_, parse)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        let problem = format!("`{architecture}` is not supported; supported: {}", known.join(", "));
        return Err(EngineError::spec("general.architecture", problem));
    };
    parse(&Metadata { file, stored, architecture })?.checked()
}

/// The metadata of one architecture: keys are given without its name.
pub(super) struct Metadata<'a> {
    file: &'a Gguf<'a>,
    stored: StoredBytes<'a>,
    architecture: &'a str,
}

impl Metadata<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.file.meta.contains_key(self.key(key).as_str())
    }

    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.file.tensors.contains_key(name)
    }

    pub(super) fn count(&self, key: &str, max: usize) -> Result<usize, EngineError> {
        self.file.count(&self.key(key), max)
    }

    /// A count that may be missing.
    pub(super) fn count_or(&self, key: &str, default: usize, max: usize) -> Result<usize, EngineError> {
        if self.has(key) { self.count(key, max) } else { Ok(default) }
    }

    pub(super) fn positive(&self, key: &str) -> Result<f32, EngineError> {
        self.file.positive(&self.key(key))
    }

    pub(super) fn positive_or(&self, key: &str, default: f32) -> Result<f32, EngineError> {
        if self.has(key) { self.positive(key) } else { Ok(default) }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, EngineError> {
        match self.file.meta.get(self.key(key).as_str()) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => Err(EngineError::spec(self.key(key), format!("is {v:?}, not true or false"))),
        }
    }

    /// Numbers of a small tensor, if the file has it; at most one per rotated pair.
    pub(super) fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, EngineError> {
        let Some(t) = self.file.tensors.get(name) else { return Ok(None) };
        let bytes = (self.stored)(name).filter(|b| b.len() <= 4 * WIDTH_MAX);
        let bytes = bytes.ok_or_else(|| EngineError::tensor(name, "is larger than any list of rope factors"))?;
        let Encoding::Plain(stored) = t.encoding else {
            return Err(EngineError::tensor(name, format!("is stored as {}, numbers are needed", t.encoding.name())));
        };
        let t = RawTensor { name: name.into(), stored, shape: t.shape.clone(), bytes: bytes.into() };
        t.to_f32().map(Some)
    }

    /// A plain decoder with this attention. `interleaved` is how the architecture pairs rotated numbers.
    pub(super) fn plain(
        &self,
        family: Family,
        attention: Attention,
        interleaved: bool,
    ) -> Result<DecoderSpec, EngineError> {
        let layers = self.count("block_count", LAYERS_MAX)?;
        let context_tokens = self.count("context_length", CONTEXT_MAX)?;
        let rope_dim = attention.rope_dim();
        if self.count_or("rope.dimension_count", rope_dim, WIDTH_MAX)? != rope_dim {
            let problem = format!("differs from the {rope_dim} numbers per head; partial rotation is not supported");
            return Err(EngineError::spec(self.key("rope.dimension_count"), problem));
        }
        let rope = Rope {
            theta: self.positive_or("rope.freq_base", 10_000.0)?,
            interleaved,
            scaling: self.rope_scaling(context_tokens)?,
        };
        let width = self.count_or("feed_forward_length", 0, WIDTH_MAX)?;
        if width == 0 && !self.has("expert_count") {
            return Err(EngineError::spec(self.key("feed_forward_length"), "is missing"));
        }
        Ok(DecoderSpec::plain(Basics {
            family,
            layers,
            hidden_size: self.count("embedding_length", WIDTH_MAX)?,
            vocab_size: self.vocab()?,
            context_tokens,
            eps: self.positive("attention.layer_norm_rms_epsilon")?,
            attention,
            rope,
            width,
            tied_head: !self.has_tensor("output.weight"),
            bos_token: self.file.token("tokenizer.ggml.bos_token_id"),
            eos_tokens: self.file.token("tokenizer.ggml.eos_token_id").into_iter().collect(),
        }))
    }

    /// Heads of grouped attention.
    pub(super) fn grouped(&self) -> Result<Attention, EngineError> {
        let heads = self.count("attention.head_count", WIDTH_MAX)?;
        let hidden_size = self.count("embedding_length", WIDTH_MAX)?;
        let head_dim = self.count_or("attention.key_length", hidden_size / heads, WIDTH_MAX)?;
        if self.count_or("attention.value_length", head_dim, WIDTH_MAX)? != head_dim {
            return Err(EngineError::spec(self.key("attention.value_length"), "differs from key_length"));
        }
        let kv_heads = self.count_or("attention.head_count_kv", heads, WIDTH_MAX)?;
        Ok(Attention::Grouped { heads, kv_heads, head_dim })
    }

    /// Experts as `expert_*` keys say, softmax-gated unless `expert_gating_func` says otherwise.
    pub(super) fn experts(&self) -> Result<ExpertsSpec, EngineError> {
        let mut e = ExpertsSpec::plain(
            self.count("expert_count", EXPERTS_MAX)?,
            self.count("expert_used_count", EXPERTS_MAX)?,
            match self.has("expert_feed_forward_length") {
                true => self.count("expert_feed_forward_length", WIDTH_MAX)?,
                false => self.count("feed_forward_length", WIDTH_MAX)?,
            },
        );
        e.groups = self.count_or("expert_group_count", 1, EXPERTS_MAX)?;
        e.groups_chosen = self.count_or("expert_group_used_count", 1, EXPERTS_MAX)?;
        let keys = ["expert_group_count", "expert_group_used_count", "expert_used_count"].map(|k| self.key(k));
        e.checked([&keys[0], &keys[1], &keys[2]])
    }

    fn vocab(&self) -> Result<usize, EngineError> {
        let name = "token_embd.weight";
        let embedding = self.file.tensors.get(name);
        let embedding = embedding.ok_or_else(|| EngineError::tensor(name, "is missing from the file"))?;
        let rows = embedding.shape[0];
        if rows > VOCAB_MAX {
            return Err(EngineError::tensor(name, format!("has {rows} rows, more than {VOCAB_MAX}")));
        }
        Ok(rows)
    }

    /// As llama.cpp reads it: a factor without a type is linear, and divisors per frequency hold wherever
    /// the file has them, whatever the type says (MiniCPM3's files name none).
    fn rope_scaling(&self, context: usize) -> Result<RopeScaling, EngineError> {
        let kind = match self.file.meta.get(self.key("rope.scaling.type").as_str()) {
            None => "linear",
            Some(Value::Text(kind)) => kind,
            Some(v) => return Err(EngineError::spec(self.key("rope.scaling.type"), format!("is {v:?}, not text"))),
        };
        let original = || self.positive_count("rope.scaling.original_context_length", context);
        // What the oldest files call it.
        let old = "rope.scale_linear";
        let factor = match kind {
            "none" => 1.0,
            "linear" | "longrope" if !self.has("rope.scaling.factor") => self.positive_or(old, 1.0)?,
            "linear" | "longrope" => self.positive("rope.scaling.factor")?,
            "yarn" => {
                let factor = self.positive("rope.scaling.factor")?;
                return Ok(RopeScaling::Yarn {
                    factor,
                    fast: self.positive_or("rope.scaling.yarn_beta_fast", 32.0)?,
                    slow: self.positive_or("rope.scaling.yarn_beta_slow", 1.0)?,
                    original: original()?,
                    whole: true,
                    magnitude: yarn_magnitude(factor, 1.0) * self.positive_or("rope.scaling.attn_factor", 1.0)?,
                });
            }
            other => {
                return Err(EngineError::spec(
                    self.key("rope.scaling.type"),
                    format!("`{other}` is not supported; supported: none, linear, yarn, longrope"),
                ));
            }
        };
        let long = context as f32 > original()?;
        let name = if long { "rope_factors_long.weight" } else { "rope_factors_short.weight" };
        match self.floats(name)? {
            Some(mut divisors) => {
                divisors.iter_mut().for_each(|d| *d *= factor);
                Ok(RopeScaling::Factors { divisors, magnitude: self.positive_or("rope.scaling.attn_factor", 1.0)? })
            }
            None if kind == "longrope" => Err(EngineError::tensor(name, "is missing from the file")),
            None if factor == 1.0 => Ok(RopeScaling::None),
            None => Ok(RopeScaling::Linear { factor }),
        }
    }

    fn positive_count(&self, key: &str, default: usize) -> Result<f32, EngineError> {
        Ok(self.count_or(key, default, CONTEXT_MAX)? as f32)
    }
}

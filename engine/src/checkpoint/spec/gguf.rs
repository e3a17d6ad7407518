//! GGUF metadata: the parts that architectures share.

use std::cell::RefCell;
use std::collections::HashSet;

use super::rope::yarn_magnitude;
use super::{
    Attention, Basics, CONTEXT_MAX, DecoderSpec, EXPERTS_MAX, ExpertsSpec, Family, FeedForward, Gate, GroupWorth,
    LAYERS_MAX, Rope, RopeScaling, VOCAB_MAX, WIDTH_MAX, deepseek, gemma, llama, minicpm, moe, qwen,
};
use crate::container::gguf::{Gguf, Value};
use crate::container::{Encoding, RawTensor, StoredBytes};
use crate::error::EngineError;

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

/// The decoder that a GGUF's metadata describes.
pub(crate) fn from_gguf<'a>(file: &'a Gguf<'_>, stored: StoredBytes<'a>) -> Result<DecoderSpec, EngineError> {
    let architecture = file.text("general.architecture")?;
    let Some((_, parse)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        let problem = format!("`{architecture}` is not supported; supported: {}", known.join(", "));
        return Err(EngineError::spec("general.architecture", problem));
    };
    let metadata = Metadata { file, stored, architecture, read: RefCell::default() };
    let spec = parse(&metadata)?.checked()?;
    metadata.check_all_read(&spec)?;
    Ok(spec)
}

/// Keys that shape no number of a text, whatever they say.
const IDLE: &[&str] = &[
    "attention.layer_norm_epsilon", // Of norms with a mean, which no architecture here has.
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "tie_lm_head", // The tensors say it.
    "vocab_size",
];
/// Parts of a model that a text does not use.
const IDLE_PARTS: &[&str] = &["vision.", "audio.", "mm.", "classifier."];
/// Keys that change nothing at this value; all others do nothing at 0, `false` or empty.
const NEUTRAL: &[(&str, f64)] = &[
    ("attention.causal", 1.0),
    ("attention.output_scale", 1.0),
    ("decoder_block_count", 0.0),
    ("embedding_scale", 1.0),
    ("expert_group_count", 1.0),
    ("expert_group_used_count", 1.0),
    ("expert_weights_scale", 1.0),
    ("logit_scale", 1.0),
    ("moe_every_n_layers", 1.0),
    ("residual_scale", 1.0),
    ("rope.scaling.alpha", 1.0),
];

/// The metadata of one architecture: keys are given without its name.
pub(super) struct Metadata<'a> {
    file: &'a Gguf<'a>,
    stored: StoredBytes<'a>,
    architecture: &'a str,
    /// Keys that were read, without the architecture's name.
    read: RefCell<HashSet<String>>,
}

impl Metadata<'_> {
    fn key(&self, key: &str) -> String {
        self.read.borrow_mut().insert(key.to_owned());
        format!("{}.{key}", self.architecture)
    }

    /// Refuses a key of the architecture that was not read and has a value: it shapes
    /// numbers in a way that is not known here.
    fn check_all_read(&self, spec: &DecoderSpec) -> Result<(), EngineError> {
        let read = self.read.borrow();
        let mut left: Vec<&str> = self
            .file
            .meta
            .keys()
            .filter_map(|key| key.strip_prefix(self.architecture)?.strip_prefix('.'))
            .filter(|key| !read.contains(*key) && !IDLE.contains(key))
            .filter(|key| !IDLE_PARTS.iter().any(|part| key.starts_with(part)))
            .collect();
        left.sort_unstable();
        for name in left {
            let key = format!("{}.{name}", self.architecture);
            let neutral = NEUTRAL.iter().find(|(known, _)| *known == name).map_or(0.0, |(_, value)| *value);
            let said = match &self.file.meta[key.as_str()] {
                Value::Unsigned(n) => Some(*n as f64),
                Value::Signed(n) => Some(*n as f64),
                Value::Float(n) => Some(*n),
                Value::Bool(on) => Some(f64::from(u8::from(*on))),
                Value::Numbers { bytes, .. } => bytes.iter().any(|b| *b != 0).then_some(f64::NAN),
                Value::Text(_) | Value::Bytes(_) | Value::Texts(_) | Value::Nested => None,
            };
            // The factor that scores have anyway.
            let usual = name == "attention.scale" && said.is_some_and(|n| n as f32 == spec.rules.scale);
            // Of all switches, this one is usually on.
            let off = if name == "attention.causal" { neutral } else { 0.0 };
            if said.is_some_and(|n| n != off && n != neutral) && !usual {
                let problem = format!("is {:?}, which is not supported here", self.file.meta[key.as_str()]);
                return Err(EngineError::spec(key, problem));
            }
        }
        Ok(())
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

    /// A positive number that may be missing, or 0, which says the same.
    pub(super) fn positive_or(&self, key: &str, default: f32) -> Result<f32, EngineError> {
        match self.file.meta.get(self.key(key).as_str()) {
            None => Ok(default),
            Some(Value::Float(v)) if *v == 0.0 => Ok(default),
            Some(_) => self.positive(key),
        }
    }

    /// A count that may be missing, or 0, which says the same.
    pub(super) fn count_if(&self, key: &str, max: usize) -> Result<Option<usize>, EngineError> {
        if self.file.unsigned(&self.key(key)).is_none_or(|n| n > 0) && self.has(key) {
            self.count(key, max).map(Some)
        } else {
            Ok(None)
        }
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
        let context_tokens = self.count("context_length", usize::MAX)?;
        let rope_dim = attention.rope_dim();
        if self.count_or("rope.dimension_count", rope_dim, WIDTH_MAX)? != rope_dim {
            let problem = format!("differs from the {rope_dim} numbers per head; partial rotation is not supported");
            return Err(EngineError::spec(self.key("rope.dimension_count"), problem));
        }
        let rope = Rope {
            theta: if self.has("rope.freq_base") { self.positive("rope.freq_base")? } else { 10_000.0 },
            interleaved,
            scaling: self.rope_scaling(context_tokens, rope_dim)?,
        };
        let widths = self.widths(layers)?;
        if widths.contains(&0) && !self.has_experts()? {
            return Err(EngineError::spec(self.key("feed_forward_length"), "is missing"));
        }
        let mut spec = DecoderSpec::plain(Basics {
            family,
            layers,
            hidden_size: self.count("embedding_length", WIDTH_MAX)?,
            vocab_size: self.vocab()?,
            context_tokens: context_tokens.min(CONTEXT_MAX),
            eps: self.positive("attention.layer_norm_rms_epsilon")?,
            attention,
            rope,
            width: widths[0],
            tied_head: !self.has_tensor("output.weight"),
            bos_token: self.file.token("tokenizer.ggml.bos_token_id"),
            eos_tokens: self.file.token("tokenizer.ggml.eos_token_id").into_iter().collect(),
        });
        for (part, width) in spec.feed_forward.iter_mut().zip(widths) {
            *part = FeedForward::Dense { width };
        }
        spec.rules.softcap = Some(self.positive_or("attn_logit_softcapping", 0.0)?).filter(|cap| *cap > 0.0);
        spec.logit_softcap = Some(self.positive_or("final_logit_softcapping", 0.0)?).filter(|cap| *cap > 0.0);
        Ok(spec)
    }

    /// Whether the file has experts; some converters write that there are none.
    pub(super) fn has_experts(&self) -> Result<bool, EngineError> {
        let some = self.count_if("expert_count", EXPERTS_MAX)?.is_some();
        if !some {
            // Beside no experts, none is chosen.
            self.has("expert_used_count");
        }
        Ok(some)
    }

    /// What is said of experts is said of none.
    pub(super) fn experts_idle(&self) {
        let prefix = self.key("expert_");
        let of = |key: &&str| Some(key.strip_prefix(self.architecture)?.strip_prefix('.')?.to_owned());
        let idle: Vec<String> = self.file.meta.keys().filter(|key| key.starts_with(&prefix)).filter_map(of).collect();
        self.read.borrow_mut().extend(idle);
    }

    /// Inner width of every layer's MLP; 0 where the file does not say.
    fn widths(&self, layers: usize) -> Result<Vec<usize>, EngineError> {
        let key = self.key("feed_forward_length");
        let Some(widths) = self.file.wholes(&key) else {
            return Ok(vec![self.count_if("feed_forward_length", WIDTH_MAX)?.unwrap_or(0); layers]);
        };
        let narrow = |n: &u64| usize::try_from(*n).ok().filter(|n| (1..=WIDTH_MAX).contains(n));
        let widths: Option<Vec<usize>> = widths.iter().take(layers).map(narrow).collect();
        widths
            .filter(|widths| widths.len() == layers)
            .ok_or_else(|| EngineError::spec(key, format!("is not a list of {layers} widths in 1..={WIDTH_MAX}")))
    }

    /// Gives layers the window of `attention.sliding_window`, if there is one: those that
    /// `attention.sliding_window_pattern` names, else all but every `period`th.
    pub(super) fn windows(&self, spec: &mut DecoderSpec, period: usize) -> Result<(), EngineError> {
        let window = self.count_if("attention.sliding_window", usize::MAX)?;
        let pattern = self.key("attention.sliding_window_pattern");
        let Some(window) = window else { return Ok(()) };
        let listed = self.file.wholes(&pattern);
        if listed.as_ref().is_some_and(|list| list.len() < spec.layers) {
            return Err(EngineError::spec(
                pattern,
                format!("has fewer entries than the model's {} layers", spec.layers),
            ));
        }
        let period = match &listed {
            None if self.file.meta.contains_key(pattern.as_str()) => self.file.count(&pattern, LAYERS_MAX)?,
            _ => period,
        };
        let listed = listed.unwrap_or_default();
        for (i, r) in spec.reach.iter_mut().enumerate() {
            let slides = listed.get(i).map_or((i + 1) % period != 0, |on| *on != 0);
            r.window = slides.then_some(window.min(CONTEXT_MAX));
        }
        Ok(())
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

    /// Experts as `expert_*` keys say, softmax-gated unless `expert_gating_func` says otherwise; `normalise`
    /// is what holds unless `expert_weights_norm` says otherwise.
    pub(super) fn experts(&self, normalise: bool) -> Result<ExpertsSpec, EngineError> {
        let mut e = ExpertsSpec::plain(
            self.count("expert_count", EXPERTS_MAX)?,
            self.count("expert_used_count", EXPERTS_MAX)?,
            match self.count_if("expert_feed_forward_length", WIDTH_MAX)? {
                Some(width) => width,
                None => self.count("feed_forward_length", WIDTH_MAX)?,
            },
        );
        e.groups = self.count_if("expert_group_count", EXPERTS_MAX)?.unwrap_or(1);
        e.groups_chosen = self.count_if("expert_group_used_count", EXPERTS_MAX)?.unwrap_or(1);
        e.scale = self.positive_or("expert_weights_scale", 1.0)?;
        match self.count_if("expert_gating_func", 3)? {
            None | Some(1) => {}
            Some(2) => (e.gate, e.group_worth) = (Gate::Sigmoid, GroupWorth::TwoBest),
            Some(_) => e.gate = Gate::SoftmaxOfChosen,
        }
        e.normalise = self.flag_or("expert_weights_norm", normalise)?;
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

    /// As llama.cpp reads it: a factor without a type is linear; divisors per frequency hold wherever the
    /// file has them, before what the type says (MiniCPM3's files name none); so does the factor on the
    /// rotation.
    fn rope_scaling(&self, context: usize, rope_dim: usize) -> Result<RopeScaling, EngineError> {
        let kind = match self.file.meta.get(self.key("rope.scaling.type").as_str()) {
            None => "linear",
            Some(Value::Text(kind)) => kind,
            Some(v) => return Err(EngineError::spec(self.key("rope.scaling.type"), format!("is {v:?}, not text"))),
        };
        let original = self.count_if("rope.scaling.original_context_length", usize::MAX)?.unwrap_or(context) as f32;
        // What the oldest files call it.
        let old = self.positive_or("rope.scale_linear", 1.0)?;
        let said = self.positive_or("rope.scaling.factor", old)?;
        let factor = match kind {
            "none" => 1.0,
            "linear" | "longrope" | "yarn" => said,
            other => {
                return Err(EngineError::spec(
                    self.key("rope.scaling.type"),
                    format!("`{other}` is not supported; supported: none, linear, yarn, longrope"),
                ));
            }
        };
        let magnitude = self.positive_or("rope.scaling.attn_factor", 1.0)?
            * self.positive_or("rope.scaling.yarn_attn_factor", 1.0)?;
        let long = context as f32 > original;
        let name = if long { "rope_factors_long.weight" } else { "rope_factors_short.weight" };
        let divisors = match self.floats("rope_freqs.weight")? {
            // Llama 3's scaling, written out by the converter.
            Some(divisors) => Some(divisors),
            None => self.floats(name)?,
        };
        if divisors.is_none() && kind == "longrope" {
            return Err(EngineError::tensor(name, "is missing from the file"));
        }
        if kind == "yarn" && self.ramps()? {
            let yarn = RopeScaling::Yarn {
                factor,
                fast: self.positive_or("rope.scaling.yarn_beta_fast", 32.0)?,
                slow: self.positive_or("rope.scaling.yarn_beta_slow", 1.0)?,
                original,
                whole: true,
                magnitude: yarn_magnitude(factor, 1.0) * magnitude,
            };
            return Ok(match divisors {
                None => yarn,
                Some(divisors) => RopeScaling::Divided { divisors, then: Box::new(yarn) },
            });
        }
        // Nothing is ramped, so how does not matter.
        for idle in ["beta_fast", "beta_slow"] {
            self.key(&format!("rope.scaling.yarn_{idle}"));
        }
        Ok(match divisors {
            Some(mut divisors) => {
                divisors.iter_mut().for_each(|d| *d *= factor);
                RopeScaling::Factors { divisors, magnitude }
            }
            None if magnitude != 1.0 => RopeScaling::Factors { divisors: vec![factor; rope_dim / 2], magnitude },
            None if factor == 1.0 => RopeScaling::None,
            None => RopeScaling::Linear { factor },
        })
    }

    /// Whether YaRN's ramp is on; switched off, all frequencies are divided alike.
    fn ramps(&self) -> Result<bool, EngineError> {
        let key = self.key("rope.scaling.yarn_ext_factor");
        match self.file.meta.get(key.as_str()) {
            None => Ok(true),
            // Below 0, the type decides.
            Some(Value::Float(v)) if *v < 0.0 || *v == 1.0 => Ok(true),
            Some(Value::Float(0.0)) => Ok(false),
            Some(v) => Err(EngineError::spec(key, format!("is {v:?}; supported: 0 and 1"))),
        }
    }
}

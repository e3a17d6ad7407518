//! `config.json` of Hugging Face: the parts that families share.

use serde_json::Value;

use super::fields::Fields;
use super::rope::yarn_magnitude;
use super::{
    Attention, Basics, CONTEXT_MAX, DecoderSpec, Family, LAYERS_MAX, Rope, RopeScaling, VOCAB_MAX, WIDTH_MAX, deepseek,
    gemma, llama, minicpm, moe, qwen, shaping,
};
use crate::error::EngineError;

type Parser = fn(&Fields<'_>) -> Result<DecoderSpec, EngineError>;

const GEMMA3: &str = "gemma3_text";

/// `model_type` and who reads it.
const FAMILIES: &[(&str, Parser)] = &[
    ("deepseek_v2", deepseek::v2),
    ("deepseek_v3", deepseek::v3),
    ("gemma2", gemma::gemma2),
    (GEMMA3, gemma::gemma3),
    ("gpt_oss", moe::gpt_oss),
    ("llama", llama::llama),
    ("minicpm", minicpm::minicpm),
    ("minicpm3", minicpm::minicpm3),
    ("mistral", llama::llama),
    ("mixtral", moe::mixtral),
    ("olmoe", moe::olmoe),
    ("qwen2", qwen::qwen2),
    ("qwen2_moe", qwen::qwen2_moe),
    ("qwen3", qwen::qwen3),
    ("qwen3_moe", qwen::qwen3_moe),
];

pub(super) fn from_hf(config: &[u8]) -> Result<DecoderSpec, EngineError> {
    let value: Value = serde_json::from_slice(config)
        .map_err(|e| EngineError::Json { file: "config.json", problem: e.to_string() })?;
    let c = Fields::new(&value);
    let kind = c.text("model_type")?;
    let Some((_, parse)) = FAMILIES.iter().find(|(name, _)| *name == kind) else {
        let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
        let problem = format!("`{kind}` is not supported; supported: {}", known.join(", "));
        return Err(EngineError::spec("model_type", problem));
    };
    check_quantization(&c)?;
    let mut spec = parse(&c)?;
    shorten(&c, &mut spec)?;
    let spec = spec.checked()?;
    shaping::check(&c, &spec)?;
    Ok(spec)
}

/// Attention that is sparse for long texts only is computed densely, so texts end where it would begin.
fn shorten(c: &Fields<'_>, spec: &mut DecoderSpec) -> Result<(), EngineError> {
    // MiniCPM 4.1, and Qwen2.5 for a million tokens.
    for (field, from) in [("sparse_config", "dense_len"), ("dual_chunk_attention_config", "chunk_size")] {
        if let Some(sparse) = c.object(field)? {
            spec.context_tokens = spec.context_tokens.min(sparse.count(from, usize::MAX)?);
        }
    }
    Ok(())
}

/// Weights may be FP8 in blocks of 128 × 128 (DeepSeek-V3).
fn check_quantization(c: &Fields<'_>) -> Result<(), EngineError> {
    let field = "quantization_config";
    let Some(q) = c.object(field)? else { return Ok(()) };
    let method = q.text("quant_method")?;
    match method {
        "fp8" => {}
        // gpt-oss: the names of its tensors say which they are.
        "mxfp4" => return Ok(()),
        _ => return Err(EngineError::spec(field, format!("`{method}` is not supported; supported: fp8, mxfp4"))),
    }
    match q.raw("weight_block_size").and_then(Value::as_array) {
        Some(size) if size.iter().all(|v| v.as_u64() == Some(128)) && size.len() == 2 => Ok(()),
        size => {
            Err(EngineError::spec(field, format!("weight_block_size {size:?} is not supported; supported: [128, 128]")))
        }
    }
}

/// Fields of the counts of expert groups, of groups chosen and of experts chosen.
pub(super) const EXPERT_FIELDS: [&str; 3] = ["n_group", "topk_group", "num_experts_per_tok"];

/// A plain decoder with this attention. `interleaved` is how the family's files pair rotated numbers.
pub(super) fn plain(
    c: &Fields<'_>,
    family: Family,
    attention: Attention,
    interleaved: bool,
) -> Result<DecoderSpec, EngineError> {
    let layers = c.count("num_hidden_layers", LAYERS_MAX)?;
    let context_tokens = c.count("max_position_embeddings", usize::MAX)?;
    Ok(DecoderSpec::plain(Basics {
        family,
        layers,
        hidden_size: c.count("hidden_size", WIDTH_MAX)?,
        vocab_size: c.count("vocab_size", VOCAB_MAX)?,
        context_tokens: context_tokens.min(CONTEXT_MAX),
        eps: c.positive("rms_norm_eps")?,
        attention,
        rope: Rope { theta: rope_theta(c)?, interleaved, scaling: rope_scaling(c, context_tokens)? },
        width: c.count("intermediate_size", WIDTH_MAX)?,
        tied_head: c.flag_or("tie_word_embeddings", false)?,
        bos_token: c.tokens("bos_token_id")?.first().copied(),
        eos_tokens: c.tokens("eos_token_id")?,
    }))
}

/// Heads of grouped attention.
pub(super) fn grouped(c: &Fields<'_>) -> Result<Attention, EngineError> {
    let heads = c.count("num_attention_heads", WIDTH_MAX)?;
    let hidden_size = c.count("hidden_size", WIDTH_MAX)?;
    Ok(Attention::Grouped {
        heads,
        kv_heads: c.count_or("num_key_value_heads", heads, 1, WIDTH_MAX)?,
        head_dim: c.count_or("head_dim", hidden_size / heads, 1, WIDTH_MAX)?,
    })
}

/// Gives layers the window of `sliding_window`, if there is one: those that `layer_types` names, or that
/// `default` says.
pub(super) fn windows(
    c: &Fields<'_>,
    spec: &mut DecoderSpec,
    default: impl Fn(usize) -> bool,
) -> Result<(), EngineError> {
    let window = match c.raw("sliding_window") {
        None | Some(Value::Null) => None,
        Some(off) if off.as_i64().is_some_and(|n| n <= 0) => None,
        Some(_) => Some(c.count("sliding_window", usize::MAX)?.min(CONTEXT_MAX)),
    };
    let types = match c.raw("layer_types") {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) if list.len() == spec.layers => Some(list),
        Some(_) => return Err(EngineError::spec("layer_types", format!("is not a list of {} kinds", spec.layers))),
    };
    for (i, r) in spec.reach.iter_mut().enumerate() {
        let slides = match types.map(|t| t[i].as_str()) {
            None => default(i),
            Some(Some("sliding_attention")) => true,
            Some(Some("full_attention")) => false,
            Some(other) => return Err(EngineError::spec("layer_types", format!("{other:?} is not supported"))),
        };
        r.window = if slides { window } else { None };
    }
    Ok(())
}

/// Base of the rotary frequencies: at the top, or where newer configurations keep it; 10 000 if
/// the file has neither.
fn rope_theta(c: &Fields<'_>) -> Result<f32, EngineError> {
    let mut theta = c.positive_if("rope_theta")?;
    for name in ROPE_OBJECTS {
        let Some(inner) = c.object(name)?.map(|p| p.positive_if("rope_theta")).transpose()?.flatten() else { continue };
        if theta.is_some_and(|theta| theta != inner) {
            return Err(EngineError::spec("rope_theta", format!("is not the {inner} that `{name}` has")));
        }
        theta = Some(inner);
    }
    Ok(theta.unwrap_or(10_000.0))
}

/// Where a configuration describes its rope; newer ones use the second name.
const ROPE_OBJECTS: [&str; 2] = ["rope_scaling", "rope_parameters"];

/// Scaling of the model's (only) rope.
fn rope_scaling(c: &Fields<'_>, context: usize) -> Result<RopeScaling, EngineError> {
    check_whole(c)?;
    let mut found = None;
    for name in ROPE_OBJECTS {
        let Some(s) = c.object(name)? else { continue };
        if name == "rope_parameters" && c.text("model_type")? == GEMMA3 && s.has("full_attention") {
            // A rope per kind of layer, which that family reads by itself.
            continue;
        }
        let here = scaling(&s, c, context)?;
        if found.as_ref().is_some_and(|there| *there != here) {
            return Err(EngineError::spec(name, "says something else than `rope_scaling`"));
        }
        found = Some(here);
    }
    Ok(found.unwrap_or(RopeScaling::None))
}

/// Refuses heads that are rotated in part only.
fn check_whole(f: &Fields<'_>) -> Result<(), EngineError> {
    if f.positive_or("partial_rotary_factor", 1.0)? < 1.0 {
        return Err(EngineError::spec("partial_rotary_factor", "partial rotary embedding is not supported"));
    }
    Ok(())
}

/// The scaling that an object describes; `c` is the whole configuration.
pub(super) fn scaling(s: &Fields<'_>, c: &Fields<'_>, context: usize) -> Result<RopeScaling, EngineError> {
    check_whole(s)?;
    let scaling = scaling_of(s, c, context)?;
    shaping::check_rope(s)?;
    Ok(scaling)
}

fn scaling_of(s: &Fields<'_>, c: &Fields<'_>, context: usize) -> Result<RopeScaling, EngineError> {
    let kind = s.raw("rope_type").or_else(|| s.raw("type")).and_then(Value::as_str).unwrap_or("default");
    let original = || match c.has("original_max_position_embeddings") {
        true => c.positive("original_max_position_embeddings"),
        false => s.positive_or("original_max_position_embeddings", context as f32),
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: s.positive("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: s.positive("factor")?,
            low: s.positive("low_freq_factor")?,
            high: s.positive("high_freq_factor")?,
            original: s.positive("original_max_position_embeddings")?,
        }),
        "yarn" => {
            let factor = s.positive("factor")?;
            // Zero says nothing.
            let part = |name: &str| Ok::<_, EngineError>(if s.is_zero(name) { None } else { s.positive_if(name)? });
            let inferred = match (part("mscale")?, part("mscale_all_dim")?) {
                (Some(m), Some(all)) => yarn_magnitude(factor, m) / yarn_magnitude(factor, all),
                _ => yarn_magnitude(factor, 1.0),
            };
            Ok(RopeScaling::Yarn {
                factor,
                fast: s.positive_or("beta_fast", 32.0)?,
                slow: s.positive_or("beta_slow", 1.0)?,
                original: original()?,
                whole: s.flag_or("truncate", true)?,
                magnitude: s.positive_or("attention_factor", inferred)?,
            })
        }
        // Which factors hold is settled by the model's context and not by each text's length, so
        // that cached keys stay valid while a text grows.
        "longrope" | "su" => {
            let original = original()?;
            let stretch = s.positive_or("factor", context as f32 / original)?;
            let inferred = if stretch <= 1.0 { 1.0 } else { (1.0 + libm::logf(stretch) / libm::logf(original)).sqrt() };
            let long = context as f32 > original;
            let (name, idle) = if long { ("long_factor", "short_factor") } else { ("short_factor", "long_factor") };
            // Of texts of another length.
            s.has(idle);
            Ok(RopeScaling::Factors {
                divisors: s.positives(name)?,
                magnitude: s.positive_or("attention_factor", inferred)?,
            })
        }
        other => Err(EngineError::spec(
            "rope_scaling",
            format!("`{other}` is not supported; supported: default, linear, llama3, longrope, yarn"),
        )),
    }
}

/// Factor on the scores of latent attention under YaRN with `mscale_all_dim` (DeepSeek).
pub(super) fn yarn_score_factor(c: &Fields<'_>) -> Result<f32, EngineError> {
    for name in ROPE_OBJECTS {
        let Some(s) = c.object(name)? else { continue };
        let m = match s.raw("mscale_all_dim").and_then(Value::as_f64) {
            Some(m) if m > 0.0 && s.has("factor") => yarn_magnitude(s.positive("factor")?, m as f32),
            _ => 1.0,
        };
        return Ok(m * m);
    }
    Ok(1.0)
}

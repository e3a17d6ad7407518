//! Gemma 2 and 3: norms on both sides, windows, scaled embeddings, GELU, a tied head.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{Activation, Attention, DecoderSpec, Family, HeadNorm, LAYERS_MAX, Rope, RopeScaling, hf};
use crate::error::EngineError;

/// Every how many layers Gemma 3 sees everything.
const GEMMA3_PATTERN: usize = 6;
/// Width of windows where a configuration does not say it.
const WINDOW: usize = 4096;
/// Base of Gemma 3's local ropes.
const LOCAL_THETA: f32 = 10_000.0;
/// Layers of the models that scale scores by the width per head instead of the head's own.
const GEMMA2_27B_LAYERS: usize = 46;
const GEMMA3_27B_LAYERS: usize = 62;

/// Gemma 2: soft caps, every other layer with a window.
pub(super) fn gemma2(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = common(c)?;
    windows(c, &mut spec, |i| i % 2 == 0)?;
    Ok(spec)
}

/// The family's windows: a file without the field means the usual width, one with null means none.
fn windows(c: &Fields<'_>, spec: &mut DecoderSpec, default: impl Fn(usize) -> bool) -> Result<(), EngineError> {
    hf::windows(c, spec, &default)?;
    if c.raw("sliding_window").is_none() {
        spec.reach.iter_mut().enumerate().filter(|(i, _)| default(*i)).for_each(|(_, r)| r.window = Some(WINDOW));
    }
    Ok(())
}

/// Gemma 3 (text): norms on heads; local layers with a window and a rope of their own.
pub(super) fn gemma3(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.refuse_true("use_bidirectional_attention")?;
    let mut spec = common(c)?;
    spec.rules.head_norm = HeadNorm::PerHead;
    let (theta, scaling) = match c.object("rope_parameters")? {
        // Newer files keep a rope per kind of layer.
        Some(p) if p.has("full_attention") => {
            let Some(full) = p.object("full_attention")? else {
                return Err(EngineError::spec("rope_parameters.full_attention", "is missing"));
            };
            spec.ropes[0].theta = full.positive_or("rope_theta", 1e6)?;
            spec.ropes[0].scaling = hf::scaling(&full, c, spec.context_tokens)?;
            match p.object("sliding_attention")? {
                Some(local) => {
                    let scaling = hf::scaling(&local, c, spec.context_tokens)?;
                    (local.positive_or("rope_theta", LOCAL_THETA)?, scaling)
                }
                None => (LOCAL_THETA, RopeScaling::None),
            }
        }
        flat => {
            let inner = flat.map(|p| p.positive_if("rope_theta")).transpose()?.flatten();
            spec.ropes[0].theta = c.positive_if("rope_theta")?.or(inner).unwrap_or(1e6);
            (c.positive_or("rope_local_base_freq", LOCAL_THETA)?, RopeScaling::None)
        }
    };
    let pattern = c.count_or("sliding_window_pattern", GEMMA3_PATTERN, 1, LAYERS_MAX)?;
    windows(c, &mut spec, |i| (i + 1) % pattern != 0)?;
    local_rope(&mut spec, theta, scaling);
    Ok(spec)
}

fn common(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let activation = if c.has("hidden_activation") { "hidden_activation" } else { "hidden_act" };
    c.expect(activation, "gelu_pytorch_tanh")?;
    c.refuse_true("attention_bias")?;
    let mut spec = hf::plain(c, Family::Gemma, hf::grouped(c)?, false)?;
    spec.norms.minus_one = true;
    spec.rules.scale = 1.0 / c.positive("query_pre_attn_scalar")?.sqrt();
    spec.rules.softcap = c.positive_if("attn_logit_softcapping")?;
    spec.logit_softcap = c.positive_if("final_logit_softcapping")?;
    spec.tied_head = c.flag_or("tie_word_embeddings", true)?;
    gemma(&mut spec);
    Ok(spec)
}

/// What holds in every container.
fn gemma(spec: &mut DecoderSpec) {
    spec.norms.sandwich = true;
    spec.activation = Activation::GeluTanh;
    spec.scales.embedding = (spec.hidden_size as f32).sqrt();
}

/// Gives the layers with a window a rope of their own.
fn local_rope(spec: &mut DecoderSpec, theta: f32, scaling: RopeScaling) {
    let interleaved = spec.ropes[0].interleaved;
    spec.ropes.push(Rope { theta, interleaved, scaling });
    for r in &mut spec.reach {
        r.rope = usize::from(r.window.is_some());
    }
}

pub(super) fn gemma2_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = common_gguf(m, GEMMA2_27B_LAYERS)?;
    spec.rules.softcap = Some(m.positive_or("attn_logit_softcapping", 50.0)?);
    spec.logit_softcap = Some(m.positive_or("final_logit_softcapping", 30.0)?);
    m.windows(&mut spec, 2)?;
    Ok(spec)
}

pub(super) fn gemma3_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = common_gguf(m, GEMMA3_27B_LAYERS)?;
    spec.rules.head_norm = HeadNorm::PerHead;
    m.windows(&mut spec, GEMMA3_PATTERN)?;
    local_rope(&mut spec, m.positive_or("rope.freq_base_swa", LOCAL_THETA)?, RopeScaling::None);
    Ok(spec)
}

fn common_gguf(m: &Metadata<'_>, wide_layers: usize) -> Result<DecoderSpec, EngineError> {
    let attention = m.grouped()?;
    let mut spec = m.plain(Family::Gemma, attention, false)?;
    // The files do not say how scores are scaled; one size differs from the others.
    if let Attention::Grouped { heads, .. } = attention
        && spec.layers == wide_layers
    {
        spec.rules.scale = 1.0 / ((spec.hidden_size / heads) as f32).sqrt();
    }
    gemma(&mut spec);
    Ok(spec)
}

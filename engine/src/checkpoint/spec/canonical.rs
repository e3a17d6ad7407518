//! Specs as text for fingerprints: a key and a value per field, floats by their bits. The keys stand here and
//! not in a derive, so that a renamed field keeps its fingerprint; each type is taken apart without `..`,
//! so that a new field does not compile until it is listed as hashed or not.

use std::fmt::Write as _;

use super::rope::{Rope, RopeScaling};
use super::{
    Activation, Attention, AttentionRules, DecoderSpec, ExpertsSpec, Family, FeedForward, Gate, GroupWorth, HeadNorm,
    Norms, Reach, Scales,
};

/// What has a canonical text. No text is a beginning of another one's of the same type.
trait Canonical {
    fn write(&self, to: &mut String);
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Canonical for $number {
            fn write(&self, to: &mut String) {
                let _ = write!(to, "{self};");
            }
        }
    )*};
}
numbers!(usize, u32, bool);

impl Canonical for f32 {
    fn write(&self, to: &mut String) {
        let _ = write!(to, "{:08x};", self.to_bits());
    }
}

impl<T: Canonical> Canonical for Option<T> {
    fn write(&self, to: &mut String) {
        match self {
            None => to.push_str("none;"),
            Some(value) => value.write(to),
        }
    }
}

impl<T: Canonical> Canonical for Vec<T> {
    fn write(&self, to: &mut String) {
        self.len().write(to);
        self.iter().for_each(|value| value.write(to));
    }
}

impl<T: Canonical> Canonical for &T {
    fn write(&self, to: &mut String) {
        (*self).write(to);
    }
}

/// Writes `key=value` pairs between a name and its end.
macro_rules! fields {
    ($to:expr, $name:literal $(, $key:literal = $value:expr)*) => {{
        $to.push_str(concat!($name, "{"));
        $(
            $to.push_str(concat!($key, "="));
            $value.write($to);
        )*
        $to.push('}');
    }};
}

impl Canonical for Family {
    fn write(&self, to: &mut String) {
        to.push_str(match self {
            Self::Llama => "llama;",
            Self::Deepseek => "deepseek;",
            Self::Gemma => "gemma;",
            Self::Mixtral => "mixtral;",
            Self::GptOss => "gpt-oss;",
            Self::Qwen2Moe => "qwen2-moe;",
        });
    }
}

impl Canonical for Norms {
    fn write(&self, to: &mut String) {
        let Self { eps, minus_one, sandwich } = self;
        fields!(to, "norms", "eps" = eps, "minus-one" = minus_one, "sandwich" = sandwich);
    }
}

impl Canonical for Scales {
    fn write(&self, to: &mut String) {
        let Self { embedding, residual, logits } = self;
        fields!(to, "scales", "embedding" = embedding, "residual" = residual, "logits" = logits);
    }
}

impl Canonical for Attention {
    fn write(&self, to: &mut String) {
        match self {
            Self::Grouped { heads, kv_heads, head_dim } => {
                fields!(to, "grouped", "heads" = heads, "kv-heads" = kv_heads, "head-dim" = head_dim);
            }
            Self::Latent { heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, eps } => fields!(
                to,
                "latent",
                "heads" = heads,
                "q-rank" = q_rank,
                "kv-rank" = kv_rank,
                "nope-dim" = nope_dim,
                "rope-dim" = rope_dim,
                "v-dim" = v_dim,
                "eps" = eps
            ),
        }
    }
}

impl Canonical for HeadNorm {
    fn write(&self, to: &mut String) {
        to.push_str(match self {
            Self::No => "none;",
            Self::PerHead => "per-head;",
            Self::Whole => "whole;",
        });
    }
}

impl Canonical for AttentionRules {
    fn write(&self, to: &mut String) {
        let Self { scale, softcap, head_norm, qkv_bias, output_bias, sinks } = self;
        fields!(
            to,
            "rules",
            "scale" = scale,
            "softcap" = softcap,
            "head-norm" = head_norm,
            "qkv-bias" = qkv_bias,
            "output-bias" = output_bias,
            "sinks" = sinks
        );
    }
}

impl Canonical for Rope {
    fn write(&self, to: &mut String) {
        let Self { theta, interleaved, scaling } = self;
        fields!(to, "rope", "theta" = theta, "interleaved" = interleaved, "scaling" = scaling);
    }
}

impl Canonical for RopeScaling {
    fn write(&self, to: &mut String) {
        match self {
            Self::None => to.push_str("none;"),
            Self::Linear { factor } => fields!(to, "linear", "factor" = factor),
            Self::Llama3 { factor, low, high, original } => {
                fields!(to, "llama3", "factor" = factor, "low" = low, "high" = high, "original" = original);
            }
            Self::Yarn { factor, fast, slow, original, whole, magnitude } => fields!(
                to,
                "yarn",
                "factor" = factor,
                "fast" = fast,
                "slow" = slow,
                "original" = original,
                "whole" = whole,
                "magnitude" = magnitude
            ),
            Self::Factors { divisors, magnitude } => {
                fields!(to, "factors", "divisors" = divisors, "magnitude" = magnitude);
            }
            Self::Divided { divisors, then } => fields!(to, "divided", "divisors" = divisors, "then" = then.as_ref()),
        }
    }
}

impl Canonical for Reach {
    fn write(&self, to: &mut String) {
        let Self { window, rope } = self;
        fields!(to, "reach", "window" = window, "rope" = rope);
    }
}

impl Canonical for Activation {
    fn write(&self, to: &mut String) {
        match self {
            Self::Silu => to.push_str("silu;"),
            Self::GeluTanh => to.push_str("gelu-tanh;"),
            Self::ClampedSwiglu { alpha, limit } => fields!(to, "clamped-swiglu", "alpha" = alpha, "limit" = limit),
        }
    }
}

impl Canonical for FeedForward {
    fn write(&self, to: &mut String) {
        match self {
            Self::Dense { width } => fields!(to, "dense", "width" = width),
            Self::Experts(experts) => experts.write(to),
        }
    }
}

impl Canonical for Gate {
    fn write(&self, to: &mut String) {
        to.push_str(match self {
            Self::Sigmoid => "sigmoid;",
            Self::Softmax => "softmax;",
            Self::SoftmaxOfChosen => "softmax-of-chosen;",
        });
    }
}

impl Canonical for GroupWorth {
    fn write(&self, to: &mut String) {
        to.push_str(match self {
            Self::Best => "best;",
            Self::TwoBest => "two-best;",
        });
    }
}

impl Canonical for ExpertsSpec {
    fn write(&self, to: &mut String) {
        let Self {
            experts,
            chosen,
            width,
            shared_width,
            shared_gated,
            gate,
            router_bias,
            correction,
            groups,
            groups_chosen,
            group_worth,
            normalise,
            scale,
        } = self;
        fields!(
            to,
            "experts",
            "experts" = experts,
            "chosen" = chosen,
            "width" = width,
            "shared-width" = shared_width,
            "shared-gated" = shared_gated,
            "gate" = gate,
            "router-bias" = router_bias,
            "correction" = correction,
            "groups" = groups,
            "groups-chosen" = groups_chosen,
            "group-worth" = group_worth,
            "normalise" = normalise,
            "scale" = scale
        );
    }
}

impl DecoderSpec {
    /// The whole configuration, for fingerprints.
    pub(crate) fn canonical(&self) -> String {
        let Self {
            family,
            layers,
            hidden_size,
            vocab_size,
            context_tokens,
            norms,
            attention,
            rules,
            ropes,
            reach,
            feed_forward,
            activation,
            mlp_bias,
            scales,
            logit_softcap,
            tied_head,
            bos_token,
            eos_tokens,
        } = self;
        let mut text = String::new();
        let to = &mut text;
        fields!(
            to,
            "decoder",
            "family" = family,
            "layers" = layers,
            "hidden-size" = hidden_size,
            "vocab-size" = vocab_size,
            "context-tokens" = context_tokens,
            "norms" = norms,
            "attention" = attention,
            "rules" = rules,
            "ropes" = ropes,
            "reach" = reach,
            "feed-forward" = feed_forward,
            "activation" = activation,
            "mlp-bias" = mlp_bias,
            "scales" = scales,
            "logit-softcap" = logit_softcap,
            "tied-head" = tied_head,
            "bos-token" = bos_token,
            "eos-tokens" = eos_tokens
        );
        text
    }

    /// The configuration that shapes layer `layer`'s numbers, for fingerprints: independent of how
    /// many layers lie above and of how long the context may be.
    pub(crate) fn shaping(&self, layer: usize) -> String {
        let Self {
            family: _,
            layers: _,
            hidden_size,
            vocab_size,
            context_tokens: _,
            norms,
            attention,
            rules,
            ropes: _,
            reach,
            feed_forward,
            activation,
            mlp_bias,
            scales: Scales { embedding, residual, logits: _ },
            logit_softcap: _,
            tied_head: _,
            bos_token: _,
            eos_tokens: _,
        } = self;
        let Reach { window, rope: _ } = reach[layer];
        let mut text = String::new();
        let to = &mut text;
        fields!(
            to,
            "layer",
            "hidden-size" = hidden_size,
            "vocab-size" = vocab_size,
            "norms" = norms,
            "attention" = attention,
            "rules" = rules,
            "window" = window,
            "rope" = self.rope_of(layer),
            "feed-forward" = feed_forward[layer],
            "activation" = activation,
            "mlp-bias" = mlp_bias,
            "embedding-scale" = embedding,
            "residual-scale" = residual
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> DecoderSpec {
        DecoderSpec {
            family: Family::Llama,
            layers: 2,
            hidden_size: 8,
            vocab_size: 16,
            context_tokens: 32,
            norms: Norms { eps: 1e-5, minus_one: false, sandwich: false },
            attention: Attention::Grouped { heads: 4, kv_heads: 2, head_dim: 2 },
            rules: AttentionRules {
                scale: 0.5,
                softcap: None,
                head_norm: HeadNorm::No,
                qkv_bias: false,
                output_bias: false,
                sinks: false,
            },
            ropes: vec![Rope { theta: 1e4, interleaved: false, scaling: RopeScaling::None }],
            reach: vec![Reach { window: None, rope: 0 }; 2],
            feed_forward: vec![FeedForward::Experts(ExpertsSpec::plain(4, 2, 8)), FeedForward::Dense { width: 8 }],
            activation: Activation::Silu,
            mlp_bias: false,
            scales: Scales { embedding: 1.0, residual: 1.0, logits: 1.0 },
            logit_softcap: None,
            tied_head: false,
            bos_token: None,
            eos_tokens: vec![1],
        }
    }

    fn experts(change: impl Fn(&mut ExpertsSpec)) -> DecoderSpec {
        let mut spec = spec();
        if let FeedForward::Experts(experts) = &mut spec.feed_forward[0] {
            change(experts);
        }
        spec
    }

    fn with(change: impl Fn(&mut DecoderSpec)) -> DecoderSpec {
        let mut spec = spec();
        change(&mut spec);
        spec
    }

    fn attention(attention: Attention) -> DecoderSpec {
        DecoderSpec { attention, ..spec() }
    }

    fn latent(q_rank: Option<usize>, [heads, kv_rank, nope_dim, rope_dim, v_dim]: [usize; 5], eps: f32) -> DecoderSpec {
        attention(Attention::Latent { heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, eps })
    }

    fn scaling(scaling: RopeScaling) -> DecoderSpec {
        let mut spec = spec();
        spec.ropes[0].scaling = scaling;
        spec
    }

    fn yarn(factor: f32, fast: f32, slow: f32, original: f32, whole: bool, magnitude: f32) -> RopeScaling {
        RopeScaling::Yarn { factor, fast, slow, original, whole, magnitude }
    }

    /// Each differs from the others in something that shapes the first layer's numbers.
    fn of_layer() -> Vec<DecoderSpec> {
        let two = || Box::new(RopeScaling::Linear { factor: 2.0 });
        vec![
            spec(),
            with(|s| s.hidden_size = 9),
            with(|s| s.vocab_size = 17),
            // The next number after it.
            with(|s| s.norms.eps = f32::from_bits(s.norms.eps.to_bits() + 1)),
            with(|s| s.norms.minus_one = true),
            with(|s| s.norms.sandwich = true),
            attention(Attention::Grouped { heads: 2, kv_heads: 2, head_dim: 2 }),
            attention(Attention::Grouped { heads: 4, kv_heads: 4, head_dim: 2 }),
            attention(Attention::Grouped { heads: 4, kv_heads: 2, head_dim: 4 }),
            latent(None, [4, 2, 2, 2, 2], 0.1),
            latent(Some(2), [4, 2, 2, 2, 2], 0.1),
            latent(None, [5, 2, 2, 2, 2], 0.1),
            latent(None, [4, 3, 2, 2, 2], 0.1),
            latent(None, [4, 2, 3, 2, 2], 0.1),
            latent(None, [4, 2, 2, 4, 2], 0.1),
            latent(None, [4, 2, 2, 2, 3], 0.1),
            latent(None, [4, 2, 2, 2, 2], 0.2),
            with(|s| s.rules.scale = 0.25),
            with(|s| s.rules.softcap = Some(30.0)),
            with(|s| s.rules.head_norm = HeadNorm::PerHead),
            with(|s| s.rules.head_norm = HeadNorm::Whole),
            with(|s| s.rules.qkv_bias = true),
            with(|s| s.rules.output_bias = true),
            with(|s| s.rules.sinks = true),
            with(|s| s.ropes[0].theta = 1e5),
            with(|s| s.ropes[0].interleaved = true),
            scaling(RopeScaling::Linear { factor: 2.0 }),
            scaling(RopeScaling::Llama3 { factor: 2.0, low: 1.0, high: 4.0, original: 64.0 }),
            scaling(RopeScaling::Llama3 { factor: 3.0, low: 1.0, high: 4.0, original: 64.0 }),
            scaling(RopeScaling::Llama3 { factor: 2.0, low: 2.0, high: 4.0, original: 64.0 }),
            scaling(RopeScaling::Llama3 { factor: 2.0, low: 1.0, high: 5.0, original: 64.0 }),
            scaling(RopeScaling::Llama3 { factor: 2.0, low: 1.0, high: 4.0, original: 65.0 }),
            scaling(yarn(2.0, 32.0, 1.0, 64.0, true, 1.0)),
            scaling(yarn(3.0, 32.0, 1.0, 64.0, true, 1.0)),
            scaling(yarn(2.0, 33.0, 1.0, 64.0, true, 1.0)),
            scaling(yarn(2.0, 32.0, 2.0, 64.0, true, 1.0)),
            scaling(yarn(2.0, 32.0, 1.0, 65.0, true, 1.0)),
            scaling(yarn(2.0, 32.0, 1.0, 64.0, false, 1.0)),
            scaling(yarn(2.0, 32.0, 1.0, 64.0, true, 1.1)),
            scaling(RopeScaling::Factors { divisors: vec![2.0], magnitude: 1.0 }),
            scaling(RopeScaling::Factors { divisors: vec![3.0], magnitude: 1.0 }),
            scaling(RopeScaling::Factors { divisors: vec![2.0], magnitude: 1.1 }),
            scaling(RopeScaling::Divided { divisors: vec![2.0], then: two() }),
            scaling(RopeScaling::Divided { divisors: vec![3.0], then: two() }),
            scaling(RopeScaling::Divided { divisors: vec![2.0], then: Box::new(RopeScaling::None) }),
            with(|s| s.reach[0].window = Some(8)),
            with(|s| s.feed_forward[0] = FeedForward::Dense { width: 8 }),
            with(|s| s.feed_forward[0] = FeedForward::Dense { width: 9 }),
            experts(|e| e.experts = 5),
            experts(|e| e.chosen = 3),
            experts(|e| e.width = 9),
            experts(|e| e.shared_width = 8),
            experts(|e| e.shared_gated = true),
            experts(|e| e.gate = Gate::Sigmoid),
            experts(|e| e.gate = Gate::SoftmaxOfChosen),
            experts(|e| e.router_bias = true),
            experts(|e| e.correction = true),
            experts(|e| e.groups = 2),
            experts(|e| e.groups_chosen = 2),
            experts(|e| e.group_worth = GroupWorth::TwoBest),
            experts(|e| e.normalise = false),
            experts(|e| e.scale = 2.0),
            with(|s| s.activation = Activation::GeluTanh),
            with(|s| s.activation = Activation::ClampedSwiglu { alpha: 1.0, limit: 7.0 }),
            with(|s| s.activation = Activation::ClampedSwiglu { alpha: 2.0, limit: 7.0 }),
            with(|s| s.activation = Activation::ClampedSwiglu { alpha: 1.0, limit: 8.0 }),
            with(|s| s.mlp_bias = true),
            with(|s| s.scales.embedding = 2.0),
            with(|s| s.scales.residual = 2.0),
        ]
    }

    /// Each differs from the others in something that the first layer's numbers do not depend on.
    fn of_whole() -> Vec<DecoderSpec> {
        vec![
            with(|s| s.family = Family::Gemma),
            with(|s| s.layers = 3),
            with(|s| s.context_tokens = 33),
            with(|s| s.ropes.push(Rope { theta: 1.0, ..s.ropes[0].clone() })),
            with(|s| s.reach[1].window = Some(8)),
            with(|s| s.reach[1].rope = 1),
            with(|s| s.feed_forward[1] = FeedForward::Dense { width: 9 }),
            with(|s| s.scales.logits = 2.0),
            with(|s| s.logit_softcap = Some(30.0)),
            with(|s| s.tied_head = true),
            with(|s| s.bos_token = Some(0)),
            with(|s| s.eos_tokens = vec![]),
            with(|s| s.eos_tokens = vec![1, 2]),
            with(|s| s.eos_tokens = vec![12]),
        ]
    }

    fn assert_all_differ(texts: &[String]) {
        for (i, text) in texts.iter().enumerate() {
            assert_eq!(texts.iter().position(|other| other == text), Some(i), "{text}");
        }
    }

    #[test]
    fn every_field_has_its_place_in_the_text() {
        let (of_layer, of_whole) = (of_layer(), of_whole());
        assert_all_differ(&of_layer.iter().map(|s| s.shaping(0)).collect::<Vec<_>>());
        assert_all_differ(&of_layer.iter().chain(&of_whole).map(DecoderSpec::canonical).collect::<Vec<_>>());
        for spec in &of_whole {
            assert_eq!(spec.shaping(0), of_layer[0].shaping(0), "{spec:?}");
        }
    }
}

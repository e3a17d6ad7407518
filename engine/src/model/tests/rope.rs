//! Scaling of rotary embeddings, as GGUF files say it.

use super::{Random, VOCAB, Writer, llama, numbers};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::spec::{Rope, RopeScaling};
use crate::model::check_gguf;

#[test]
fn rope_scaling_is_read_as_llama_cpp_reads_it() {
    type Change<'a> = &'a dyn Fn(&mut Writer);
    let scaling = |change: &dyn Fn(&mut Writer)| {
        let mut w = llama(0);
        change(&mut w);
        check_gguf(&w.finish()).map(|spec| spec.ropes[0].scaling.clone())
    };
    let float = |w: &mut Writer, key: &str, v: f32| w.key(key, 6, &v.to_le_bytes());
    let short: Vec<f32> = (0..8).map(|i| 1.0 + i as f32).collect();
    let long: Vec<f32> = short.iter().map(|v| v * 10.0).collect();
    let both = |w: &mut Writer| {
        numbers(w, "rope_factors_long.weight", &long);
        numbers(w, "rope_factors_short.weight", &short);
    };
    let factors = |divisors: &[f32]| RopeScaling::Factors { divisors: divisors.to_vec(), magnitude: 1.0 };
    let table: [(Change<'_>, RopeScaling); 8] = [
        (&|_| {}, RopeScaling::None),
        (&|w| float(w, "llama.rope.scaling.factor", 4.0), RopeScaling::Linear { factor: 4.0 }),
        (&|w| float(w, "llama.rope.scale_linear", 2.0), RopeScaling::Linear { factor: 2.0 }),
        (&|w| float(w, "llama.rope.scaling.factor", 1.0), RopeScaling::None),
        (
            &|w| {
                float(w, "llama.rope.scaling.factor", 4.0);
                w.string("llama.rope.scaling.type", "none");
            },
            RopeScaling::None,
        ),
        (&both, factors(&short)),
        (
            &|w| {
                both(w);
                w.number("llama.rope.scaling.original_context_length", 32);
            },
            factors(&long),
        ),
        (
            &|w| {
                both(w);
                float(w, "llama.rope.scaling.factor", 10.0);
            },
            factors(&long),
        ),
    ];
    for (i, (change, expected)) in table.into_iter().enumerate() {
        assert_eq!(scaling(change).unwrap_or_else(|e| panic!("{i}: {e}")), expected, "{i}");
    }
    let missing = scaling(&|w| w.string("llama.rope.scaling.type", "longrope")).expect_err("no factors").to_string();
    assert!(missing.contains("rope_factors_short.weight"), "{missing}");
    // YaRN takes the divided frequencies; a factor on the rotation holds without it too.
    let yarn = |factors: bool, freqs: bool| {
        scaling(&|w| {
            if factors {
                both(w);
            }
            if freqs {
                numbers(w, "rope_freqs.weight", &long);
            }
            w.string("llama.rope.scaling.type", "yarn");
            float(w, "llama.rope.scaling.factor", 4.0);
            float(w, "llama.rope.scaling.attn_factor", 0.5);
        })
        .expect("a spec")
    };
    let plain = yarn(false, false);
    let RopeScaling::Yarn { factor: 4.0, magnitude, .. } = plain else { panic!("{plain:?}") };
    assert!((magnitude - 0.5 * 0.1f32.mul_add(4f32.ln(), 1.0)).abs() < 1e-6, "{magnitude}");
    assert_eq!(yarn(true, false), RopeScaling::Divided { divisors: short.clone(), then: Box::new(plain.clone()) });
    assert_eq!(yarn(true, true), RopeScaling::Divided { divisors: long.clone(), then: Box::new(plain) });
    let linear = scaling(&|w| {
        numbers(w, "rope_freqs.weight", &short);
        float(w, "llama.rope.scaling.factor", 10.0);
        float(w, "llama.rope.scaling.attn_factor", 0.7);
    });
    assert_eq!(linear.expect("a spec"), RopeScaling::Factors { divisors: long, magnitude: 0.7 });
    let alone = scaling(&|w| float(w, "llama.rope.scaling.attn_factor", 0.7)).expect("a spec");
    assert_eq!(alone, RopeScaling::Factors { divisors: vec![1.0; 8], magnitude: 0.7 });
}

/// Divisors come first, then the ramp, whose ends they do not move.
#[test]
fn divided_frequencies_are_ramped() {
    let yarn = RopeScaling::Yarn { factor: 4.0, fast: 32.0, slow: 1.0, original: 64.0, whole: true, magnitude: 0.5 };
    let rope = |scaling| Rope { theta: 10_000.0, interleaved: false, scaling };
    let plain = rope(yarn.clone());
    let divided = rope(RopeScaling::Divided { divisors: vec![3.0; 8], then: Box::new(yarn) });
    for i in 0..8 {
        let (plain, divided) = (plain.frequency(i, 16), divided.frequency(i, 16));
        assert!((plain / 3.0 - divided).abs() <= 1e-12 * plain, "{i}: {plain} {divided}");
    }
    assert_eq!(divided.scaling.magnitude(), 0.5);
}

/// As llama.cpp's converter writes it: factors without a type.
#[test]
fn factors_of_minicpm3_are_used() {
    let sizes = [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("attention.key_length", 24),
        ("attention.q_lora_rank", 8),
        ("attention.kv_lora_rank", 8),
        ("rope.dimension_count", 8),
    ];
    let mut w = Writer::new("minicpm3", &sizes);
    w.tensor(&mut Random(1), "token_embd.weight", &[VOCAB, 32], 0);
    numbers(&mut w, "rope_factors_long.weight", &[4.0; 4]);
    numbers(&mut w, "rope_factors_short.weight", &[2.0; 4]);
    let file = Checkpoint::of_gguf(w.finish()).expect("a spec");
    let expected = RopeScaling::Factors { divisors: vec![2.0; 4], magnitude: 1.0 };
    assert_eq!(file.spec.ropes[0].scaling, expected);
}

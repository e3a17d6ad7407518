use std::collections::HashMap;

use proptest::prelude::*;
use tandem_proto::message::SamplingParams;

use super::{Before, Pick, argmax, gumbel, top_alternatives};
use crate::error::EngineError;

fn pick(logits: &[f32], params: &SamplingParams, answer: &[u32], position: u32) -> Result<Pick, EngineError> {
    super::pick(logits, None, params, Before { prompt: &[], answer }, position)
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() }
}

/// χ² of draws over positions against the softmax; 9 degrees of freedom, 99.99 % quantile 33.7.
fn chi_square(logits: &[f32], temperature: f32, seed: u64) -> f64 {
    const DRAWS: u32 = 20_000;
    let params = SamplingParams { temperature, ..sampled(seed) };
    let mut counts = vec![0f64; logits.len()];
    for position in 0..DRAWS {
        counts[pick(logits, &params, &[], position).expect("finite").token as usize] += 1.0;
    }
    let e: Vec<f64> = logits.iter().map(|v| f64::from(v / temperature).exp()).collect();
    let z: f64 = e.iter().sum();
    counts.iter().zip(&e).map(|(c, e)| (c - e / z * f64::from(DRAWS)).powi(2) / (e / z * f64::from(DRAWS))).sum()
}

#[test]
fn draws_follow_the_softmax() {
    let logits: Vec<f32> = (0..10).map(|i| (i as f32 * 1.7).sin() * 2.0).collect();
    for seed in 0..4 {
        for temperature in [0.5, 1.0, 2.0] {
            let x = chi_square(&logits, temperature, seed);
            assert!(x < 33.7, "seed {seed} temperature {temperature}: χ² = {x}");
        }
    }
}

/// Noise of neighbouring tokens, positions and seeds is uncorrelated and standard Gumbel.
#[test]
fn noise_has_the_right_moments() {
    let n = 40_000u32;
    let x: Vec<f64> = (0..n).map(|i| gumbel(5, i / 200, i % 200)).collect();
    let mean = x.iter().sum::<f64>() / f64::from(n);
    let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(n);
    assert!((mean - 0.577_215_66).abs() < 0.03, "mean {mean}");
    assert!((var - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.06, "variance {var}");
    for (other, what) in [
        ((0..n).map(|i| gumbel(5, i / 200, (i % 200) ^ 1)).collect::<Vec<_>>(), "token"),
        ((0..n).map(|i| gumbel(5, i / 200 + 1, i % 200)).collect(), "position"),
        ((0..n).map(|i| gumbel(6, i / 200, i % 200)).collect(), "seed"),
    ] {
        let r = x.iter().zip(&other).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>() / f64::from(n) / var;
        assert!(r.abs() < 0.03, "neighbouring {what}: correlation {r}");
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_a_tie() {
    let greedy = SamplingParams::default();
    assert_eq!(pick(&[1.0, 3.0, 3.0, 2.0], &greedy, &[], 0).expect("finite").token, 1);
    assert_eq!(argmax(&[0.0, 0.0]), 0);
    let p = pick(&[0.0, 0.0], &greedy, &[], 9).expect("finite");
    assert!((p.logprob - 0.5f32.ln()).abs() < 1e-6);
}

#[test]
fn masks_keep_what_they_say() {
    let logits: Vec<f32> = vec![2.0, 1.0, 0.5, 0.0, -1.0, -3.0];
    let seen = |p: SamplingParams| {
        let mut ids: Vec<u32> = (0..4000).map(|i| pick(&logits, &p, &[], i).expect("finite").token).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    };
    assert_eq!(seen(SamplingParams { top_k: 2, ..sampled(1) }), [0, 1]);
    assert_eq!(seen(SamplingParams { top_k: 1, ..sampled(1) }), [0]);
    // p = 0.54, 0.20, 0.12, 0.07, …: 0.5 is reached by the first token, 0.7 by the second.
    assert_eq!(seen(SamplingParams { top_p: 0.5, ..sampled(1) }), [0]);
    assert_eq!(seen(SamplingParams { top_p: 0.7, ..sampled(1) }), [0, 1]);
    assert_eq!(seen(SamplingParams { min_p: 0.3, ..sampled(1) }), [0, 1]);
    assert_eq!(seen(SamplingParams { min_p: 1.0, ..sampled(1) }), [0]);
    assert_eq!(
        seen(SamplingParams { logit_bias: vec![(0, -1e4), (1, -1e4), (900, 5.0)], top_k: 1, ..sampled(1) }),
        [2]
    );
}

#[test]
fn penalties_lower_what_was_said() {
    let logits = [1.0, 1.5, 0.9];
    let with = |p: SamplingParams| pick(&logits, &p, &[1, 1, 7], 3).expect("finite").token;
    assert_eq!(with(SamplingParams::default()), 1);
    assert_eq!(with(SamplingParams { presence_penalty: 1.0, ..SamplingParams::default() }), 0);
    assert_eq!(with(SamplingParams { frequency_penalty: 0.3, ..SamplingParams::default() }), 0);
    assert_eq!(with(SamplingParams { frequency_penalty: 0.2, ..SamplingParams::default() }), 1);
    assert_eq!(with(SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() }), 0);
}

/// As HF, vLLM and llama.cpp count it; the other two penalties as OpenAI says.
#[test]
fn the_repetition_penalty_counts_the_prompt() {
    let logits = [1.0, 1.5, 0.9, -0.1];
    let with = |prompt: &[u32], answer: &[u32], p: SamplingParams| {
        super::pick(&logits, None, &p, Before { prompt, answer }, 3).expect("finite").token
    };
    let repetition = |penalty| SamplingParams { repetition_penalty: penalty, ..SamplingParams::default() };
    assert_eq!(with(&[1, 1, 99], &[], repetition(2.0)), 0);
    assert_eq!(with(&[1], &[0], repetition(2.0)), 2);
    // Once, however often a token was there.
    assert_eq!(with(&[1, 1, 1], &[1, 1], repetition(1.4)), 1);
    assert_eq!(with(&[0, 1, 2], &[], repetition(100.0)), 1);
    let presence = SamplingParams { presence_penalty: 2.0, frequency_penalty: 2.0, ..SamplingParams::default() };
    assert_eq!(with(&[1, 1], &[], presence.clone()), 1);
    assert_eq!(with(&[1, 1], &[1], presence), 0);
}

#[test]
fn refuses_what_is_not_a_number_or_out_of_range() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let e = pick(&[0.0, bad], &SamplingParams::default(), &[], 0);
        assert!(matches!(e, Err(EngineError::NotFinite { token: 1, .. })), "{e:?}");
        assert!(top_alternatives(&[0.0, bad], 1).is_err());
    }
    assert!(pick(&[], &SamplingParams::default(), &[], 0).is_err());
    let d = SamplingParams::default;
    for p in [
        SamplingParams { temperature: -1.0, ..d() },
        SamplingParams { temperature: f32::NAN, ..d() },
        SamplingParams { top_p: 0.0, ..d() },
        SamplingParams { top_p: 1.5, ..d() },
        SamplingParams { min_p: -0.1, ..d() },
        SamplingParams { presence_penalty: 3.0, ..d() },
        SamplingParams { frequency_penalty: -3.0, ..d() },
        SamplingParams { repetition_penalty: 0.0, ..d() },
        SamplingParams { logit_bias: vec![(0, f32::NAN)], ..d() },
    ] {
        assert!(matches!(pick(&[0.0, 1.0], &p, &[], 0), Err(EngineError::Sampling { .. })), "{p:?}");
    }
}

#[test]
fn alternatives_are_sorted_and_sum_below_one() {
    let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 50) as f32 * 0.1).collect();
    let top = top_alternatives(&logits, 5).expect("finite");
    assert_eq!(top.len(), 5);
    assert!(top.windows(2).all(|w| w[0].logprob > w[1].logprob || (w[0].logprob == w[1].logprob && w[0].id < w[1].id)));
    assert!(top.iter().map(|a| a.logprob.exp()).sum::<f32>() < 1.0);
    assert_eq!(top_alternatives(&logits, 1000).expect("finite").len(), 100);
    assert!(top_alternatives(&logits, 0).expect("finite").is_empty());
}

proptest! {
    /// A draw depends on (logits, parameters, history, position) only, and different positions differ.
    #[test]
    fn draws_are_a_pure_function(seed: u64, position in 0u32..100_000, n in 2usize..300) {
        let logits: Vec<f32> = (0..n).map(|i| ((i * 7919) % 101) as f32 * 0.05).collect();
        let p = sampled(seed);
        let a = pick(&logits, &p, &[], position).expect("finite");
        prop_assert_eq!(a, pick(&logits, &p, &[], position).expect("finite"));
        prop_assert!(a.logprob <= 0.0);
        let top = SamplingParams { top_k: n as u32, top_p: 1.0, ..p };
        prop_assert_eq!(a, pick(&logits, &top, &[], position).expect("finite"));
    }

    /// A mask that leaves the unmasked winner in changes nothing: drafts under other masks still agree.
    #[test]
    fn masks_do_not_move_the_noise(seed: u64, position in 0u32..1000) {
        let logits: Vec<f32> = (0..64).map(|i| ((i * 31) % 64) as f32 * 0.1).collect();
        let free = pick(&logits, &sampled(seed), &[], position).expect("finite").token;
        let p = SamplingParams { top_k: 20, ..sampled(seed) };
        let masked = pick(&logits, &p, &[], position).expect("finite").token;
        let kept: HashMap<u32, ()> = super::largest(&logits, 20).into_iter().map(|v| (v, ())).collect();
        if kept.contains_key(&free) {
            prop_assert_eq!(masked, free);
        } else {
            prop_assert!(kept.contains_key(&masked));
        }
    }
}

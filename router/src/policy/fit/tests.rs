use proptest::prelude::*;

use super::*;
use crate::policy::{Calibrated, Policy};
use std::sync::Arc;

/// Numbers for made-up samples.
struct Draw(u64);

impl Draw {
    fn uniform(&mut self) -> f32 {
        self.0 += 1;
        unit(splitmix64(splitmix64(self.0)))
    }

    /// Roughly normal: the sum of 12 uniforms.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// Samples whose true probability of the label is `truth`.
fn samples(n: usize, hidden: usize, seed: u64, truth: impl Fn(f32, &[f32]) -> f32) -> Vec<Sample> {
    let mut draw = Draw(splitmix64(seed));
    let one = |at: usize| {
        let entropy = draw.uniform() * 3.0;
        let hidden: Vec<f32> = (0..hidden).map(|_| draw.normal()).collect();
        let label = draw.uniform() < truth(entropy, &hidden);
        let top1 = (-entropy).exp();
        let features = Features { entropy, top1, margin: top1 / 2.0, running_acceptance: 1.0, ..Features::default() };
        Sample { features, hidden, label, request: at as u32 / 20 }
    };
    (0..n).map(one).collect()
}

fn provenance() -> Provenance {
    Provenance {
        edge_model: "e".repeat(64),
        cloud_model: "c".repeat(64),
        predicts: Predicts::Divergence,
        fitted_on: "made-up samples".into(),
    }
}

fn no_table() -> Quality {
    Quality { requests: 0, edge_risk: 0.0, points: Vec::new() }
}

#[test]
fn logistic_finds_a_logistic_truth() {
    let truth = |entropy: f32, _: &[f32]| sigmoid(3.0 * entropy - 5.0);
    let config = FitConfig { features: vec![FeatureName::Entropy], epochs: 20, ..FitConfig::default() };
    let fitted = fit(&samples(20_000, 0, 1, truth), &config).unwrap();
    let file = fitted.file(provenance(), Choice::default(), no_table()).unwrap();
    let policy = Calibrated::new(Arc::new(file), None).unwrap();
    for entropy in [0.3, 1.0, 1.7, 2.4] {
        let score = policy.score(&Features { entropy, ..Features::default() });
        assert!((score - truth(entropy, &[])).abs() < 0.06, "entropy {entropy}: {score}");
    }
    let test = samples(20_000, 0, 2, truth);
    let scored: Vec<_> = test.iter().map(|sample| (policy.score(&sample.features), sample.label)).collect();
    assert!(calibration_error(&scored, 15) < 0.02);
    assert!(fitted.report.auc > 0.85);
}

#[test]
fn network_sees_in_the_hidden_state_what_the_scalars_hide() {
    // Not linear: only the product of two numbers tells.
    let truth = |_: f32, hidden: &[f32]| if hidden[0] * hidden[1] > 0.0 { 0.6 } else { 0.02 };
    let data = samples(30_000, 8, 3, truth);
    let linear = FitConfig { hidden: Some(HiddenState::FinalNorm), ..FitConfig::default() };
    let mlp = FitConfig { units: Some(16), epochs: 15, ..linear.clone() };
    let (linear, mlp) = (fit(&data, &linear).unwrap(), fit(&data, &mlp).unwrap());
    assert!(linear.report.auc < 0.6, "{:?}", linear.report);
    assert!(mlp.report.auc > 0.8, "{:?}", mlp.report);
    let file = mlp.file(provenance(), Choice::default(), no_table()).unwrap();
    assert_eq!(file.hidden.as_ref().map(HiddenInput::size), Some(8));
    let again = PolicyFile::parse(&serde_json::to_vec(&file).unwrap()).unwrap();
    assert_eq!(again, file);
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let data = samples(3_000, 4, 5, |entropy, hidden| sigmoid(entropy + hidden[0] - 2.0));
    let config = FitConfig {
        units: Some(8),
        hidden: Some(HiddenState::Raw),
        epochs: 3,
        calibration: CalibrationKind::Platt,
        ..FitConfig::default()
    };
    let (a, b) = (fit(&data, &config).unwrap(), fit(&data, &config).unwrap());
    assert_eq!(a, b);
    let other = fit(&data, &FitConfig { seed: 1, ..config }).unwrap();
    assert_ne!(a.network, other.network);
}

#[test]
fn what_cannot_be_fitted_is_refused_with_the_reason() {
    let good = samples(400, 2, 7, |_, _| 0.5);
    let config = FitConfig { hidden: Some(HiddenState::Raw), ..FitConfig::default() };
    let says = |samples: &[Sample], config: &FitConfig, words: &str| {
        let error = fit(samples, config).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} lacks {words:?}");
    };
    says(&[], &FitConfig::default(), "0 tokens with the label among 0");
    says(&[], &config, "hidden");
    says(&good, &FitConfig { epochs: 0, ..config.clone() }, "epochs");
    says(&good, &FitConfig { learning_rate: f32::NAN, ..config.clone() }, "learning_rate");
    says(&good, &FitConfig { units: Some(0), ..config.clone() }, "units");
    says(&good, &FitConfig { features: vec![FeatureName::Top1; 2], ..FitConfig::default() }, "repeat");
    says(&good, &FitConfig { features: Vec::new(), ..FitConfig::default() }, "features");
    let mut ragged = good.clone();
    ragged[9].hidden.pop();
    says(&ragged, &config, "sample 9 has a hidden state of 1");
    let mut broken = good.clone();
    broken[11].hidden[1] = f32::INFINITY;
    says(&broken, &config, "sample 11");
    let mut one_kind = good;
    one_kind.iter_mut().for_each(|sample| sample.label = false);
    says(&one_kind, &config, "0 tokens with the label");
}

#[test]
fn pooling_by_hand() {
    // Rates of 0, 1, 0, 1, 1: the middle two violate and become one pool.
    let scored = [(0.1, false), (0.2, true), (0.3, false), (0.6, true), (0.9, true)];
    let knots = isotonic(&scored);
    let expected = [[0.1, 0.25], [0.25, 0.5], [0.75, 2.5 / 3.0]];
    assert_eq!(knots.len(), expected.len(), "{knots:?}");
    for (knot, expected) in knots.iter().zip(expected) {
        assert!((knot[0] - expected[0]).abs() < 1e-6 && (knot[1] - expected[1]).abs() < 1e-6, "{knots:?}");
    }
}

#[test]
fn measures_by_hand() {
    let perfect = [(0.1, false), (0.2, false), (0.8, true)];
    assert_eq!((auc(&perfect), auc(&[(0.5, true), (0.5, false)]), auc(&[])), (1.0, 0.5, 0.5));
    assert_eq!(auc(&[(0.9, false), (0.1, true)]), 0.0);
    assert_eq!(brier(&[(1.0, true), (0.5, false)]), 0.125);
    assert_eq!(calibration_error(&[(0.25, false), (0.25, true), (0.75, true), (0.75, true)], 2), 0.25);
}

#[test]
fn the_table_counts_requests_not_tokens() {
    let requests = [
        ScoredRequest { tokens: vec![(0.1, false), (0.9, true)] },
        ScoredRequest { tokens: vec![(0.2, true), (0.6, false)] },
        ScoredRequest { tokens: vec![(0.3, false), (0.3, false)] },
    ];
    let quality = operating_points(&requests, 6);
    let row = |threshold: f32| {
        *quality.points.iter().rfind(|point| point.threshold <= threshold).expect("a row at or under the threshold")
    };
    assert_eq!((quality.requests, quality.points.last().unwrap().threshold), (3, 1.0));
    assert!((quality.edge_risk - 2.0 / 3.0).abs() < 1e-6);
    assert_eq!((row(0.15).escalated_share, row(0.15).risk), (5.0 / 6.0, 0.0));
    assert_eq!((row(0.3).escalated_share, row(0.3).risk), (2.0 / 6.0, 1.0 / 3.0));
    assert_eq!((row(1.0).escalated_share, row(1.0).risk), (0.0, 2.0 / 3.0));
}

proptest! {
    #[test]
    fn isotonic_knots_always_pass_the_files_check(
        scored in prop::collection::vec((0.0f32..=1.0, any::<bool>()), 1..600)
    ) {
        let knots = isotonic(&scored);
        prop_assert!(!knots.is_empty() && knots.len() <= 256);
        for pair in knots.windows(2) {
            prop_assert!(pair[0][0] < pair[1][0] && pair[0][1] <= pair[1][1], "{knots:?}");
        }
        prop_assert!(knots.iter().flatten().all(|x| (0.0..=1.0).contains(x)));
    }

    #[test]
    fn platt_never_turns_the_ranking_around(
        data in prop::collection::vec((-20.0f32..20.0, any::<bool>()), 1..300)
    ) {
        let (logits, labels): (Vec<f32>, Vec<bool>) = data.into_iter().unzip();
        let (slope, offset) = platt(&logits, &labels);
        prop_assert!(slope > 0.0 && slope.is_finite() && offset.is_finite());
    }

    #[test]
    fn tables_always_pass_the_files_check(
        requests in prop::collection::vec(prop::collection::vec((0.0f32..=1.0, any::<bool>()), 0..20), 0..30),
        rows in 0usize..50,
    ) {
        let requests: Vec<_> = requests.into_iter().map(|tokens| ScoredRequest { tokens }).collect();
        let quality = operating_points(&requests, rows);
        for pair in quality.points.windows(2) {
            prop_assert!(pair[0].threshold < pair[1].threshold);
            prop_assert!(pair[0].escalated_share >= pair[1].escalated_share);
            prop_assert!(pair[0].risk <= pair[1].risk);
        }
        prop_assert_eq!(quality.points.last().map(|point| point.threshold), Some(1.0));
    }
}

use std::sync::Arc;

use proptest::prelude::*;
use tandem_proto::ids::Digest;

use super::*;

/// Makes one field of a file wrong.
type Spoil = fn(&mut PolicyFile);

/// A file whose p̂ is sigmoid(entropy − 2): mean 1, standard deviation 0.5, so weight 0.5.
fn file() -> PolicyFile {
    PolicyFile {
        format: file::FORMAT,
        edge_model: Digest::of(b"edge").to_string(),
        cloud_model: Digest::of(b"cloud").to_string(),
        predicts: Predicts::Divergence,
        fitted_on: "by hand".into(),
        features: vec![FeatureName::Entropy],
        means: vec![1.0],
        stds: vec![0.5],
        hidden: None,
        network: Network::Logistic { weights: vec![0.5], bias: -1.0 },
        calibration: Calibration::Platt { slope: 1.0, offset: 0.0 },
        threshold: 0.5,
        entropy_nats: 0.7,
        quality: Quality {
            requests: 99,
            edge_risk: 0.4,
            points: [(0.1, 0.6, 0.0), (0.3, 0.3, 0.04), (0.5, 0.15, 0.1), (1.0, 0.0, 0.4)]
                .map(|(threshold, escalated_share, risk)| OperatingPoint { threshold, escalated_share, risk })
                .to_vec(),
        },
    }
}

fn build(spec: &PolicySpec) -> Arc<dyn Policy> {
    spec.build(Some(&Arc::new(file()))).unwrap()
}

fn features(entropy: f32, top1: f32) -> Features<'static> {
    Features { entropy, top1, margin: top1, logit_margin: 1.0, running_acceptance: 1.0, ..Features::default() }
}

#[test]
fn decisions_table() {
    // policy | entropy top1 | decision reason
    let table = r#"
        {"policy":"always"}                        | 0    1    | escalate always
        {"policy":"never"}                         | 9    0.01 | stay never
        {"policy":"never"}                         | NaN  0.01 | stay never
        {"policy":"entropy","nats":1.5}            | 1.5  0.5  | stay sure
        {"policy":"entropy","nats":1.5}            | 1.51 0.5  | escalate entropy
        {"policy":"entropy","nats":1.5}            | NaN  0.5  | escalate not-finite
        {"policy":"entropy","nats":1.5}            | inf  0.5  | escalate not-finite
        {"policy":"top1","probability":0.75}       | 1    0.75 | stay sure
        {"policy":"top1","probability":0.75}       | 1    0.74 | escalate top1
        {"policy":"top1","probability":0.75}       | 1    NaN  | escalate not-finite
        {"policy":"random","share":0,"seed":1}     | 1    0.5  | stay sure
        {"policy":"random","share":1,"seed":1}     | 1    0.5  | escalate random
        {"policy":"calibrated"}                    | 1.99 0.5  | stay sure
        {"policy":"calibrated"}                    | 2.01 0.5  | escalate risk
        {"policy":"calibrated","threshold":0.9}    | 2.01 0.5  | stay sure
        {"policy":"calibrated","threshold":0.9}    | 5    0.5  | escalate risk
        {"policy":"calibrated","threshold":1}      | 99   0.5  | stay sure
        {"policy":"calibrated"}                    | NaN  0.5  | escalate not-finite
    "#;
    for line in table.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let [spec, inputs, expected] = line.split('|').map(str::trim).collect::<Vec<_>>()[..] else { panic!("{line}") };
        let spec: PolicySpec = serde_json::from_str(spec).unwrap();
        let numbers: Vec<f32> = inputs.split_whitespace().map(|x| x.parse().unwrap()).collect();
        let decision = build(&spec).decide(&features(numbers[0], numbers[1]));
        let found = format!("{} {}", if decision.escalates() { "escalate" } else { "stay" }, decision.reason());
        assert_eq!(found, expected, "{line}: {decision:?}");
    }
}

#[test]
fn specifications_are_checked() {
    let says = |json: &str, words: &str| {
        let spec: Result<PolicySpec, _> = serde_json::from_str(json);
        let error = match spec {
            Ok(spec) => spec.build(None).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(words), "{json}: {error:?} lacks {words:?}");
    };
    says(r#"{"policy":"calibrated"}"#, "policy.json");
    says(r#"{"policy":"entropy","nats":-1}"#, "nats is -1");
    says(r#"{"policy":"entropy","nats":1e39}"#, "nats is inf");
    says(r#"{"policy":"top1","probability":1.5}"#, "probability is 1.5");
    says(r#"{"policy":"random","share":2,"seed":0}"#, "share is 2");
    says(r#"{"policy":"top1"}"#, "probability");
    says(r#"{"policy":"entropy","nats":1,"share":1}"#, "share");
    says(r#"{"policy":"guess"}"#, "guess");
    let spec = PolicySpec::Calibrated { threshold: Some(f32::NAN) };
    assert!(matches!(spec.build(Some(&Arc::new(file()))), Err(PolicyError::OutOfRange { field: "threshold", .. })));
}

#[test]
fn names_are_stable() {
    let names: Vec<_> = [
        Reason::Sure,
        Reason::Risk,
        Reason::Entropy,
        Reason::Top1,
        Reason::Random,
        Reason::Always,
        Reason::Never,
        Reason::NotFinite,
        Reason::BudgetExhausted,
    ]
    .into_iter()
    .map(|reason| {
        assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{reason}\""));
        reason.to_string()
    })
    .collect();
    let expected = ["sure", "risk", "entropy", "top1", "random", "always", "never", "not-finite", "budget-exhausted"];
    assert_eq!(names, expected);
}

#[test]
fn files_name_the_field_that_is_wrong() {
    let cases: [(&str, Spoil); 26] = [
        ("format", |f| f.format = 1),
        ("edge_model", |f| f.edge_model = "abc".into()),
        ("cloud_model", |f| f.cloud_model = "G".repeat(64)),
        ("features[1]", |f| f.features.push(FeatureName::Entropy)),
        ("features", |f| (f.features, f.means, f.stds) = (vec![], vec![], vec![])),
        ("means", |f| f.means.push(0.0)),
        ("means[0]", |f| f.means[0] = f32::NAN),
        ("stds[0]", |f| f.stds[0] = 0.0),
        ("stds[0]", |f| f.stds[0] = f32::INFINITY),
        ("hidden.means", |f| f.hidden = Some(hidden(0, 0))),
        ("hidden.stds", |f| f.hidden = Some(hidden(3, 2))),
        ("network.weights", |f| f.hidden = Some(hidden(3, 3))),
        ("network.bias", |f| f.network = Network::Logistic { weights: vec![1.0], bias: f32::NAN }),
        ("network.units", |f| f.network = mlp(0)),
        ("network.units", |f| f.network = mlp(usize::MAX)),
        ("network.weights", |f| f.network = mlp(2)),
        ("calibration.slope", |f| f.calibration = Calibration::Platt { slope: -1.0, offset: 0.0 }),
        ("calibration.knots", |f| f.calibration = Calibration::Isotonic { knots: vec![] }),
        ("calibration.knots[1]", |f| f.calibration = Calibration::Isotonic { knots: vec![[0.5, 0.1], [0.4, 0.2]] }),
        ("calibration.knots[0][1]", |f| f.calibration = Calibration::Isotonic { knots: vec![[0.5, 1.1]] }),
        ("threshold", |f| f.threshold = 1.01),
        ("entropy_nats", |f| f.entropy_nats = -0.1),
        ("entropy_nats", |f| f.entropy_nats = f32::NAN),
        ("quality.edge_risk", |f| f.quality.edge_risk = f32::NAN),
        ("quality.points[1].threshold", |f| f.quality.points[1].threshold = 0.1),
        ("quality.points[2].escalated_share", |f| f.quality.points[2].escalated_share = 0.9),
    ];
    file().check().unwrap();
    for (expected, spoil) in cases {
        let mut file = file();
        spoil(&mut file);
        match file.check() {
            Err(PolicyFileError::Field { field, problem }) => assert_eq!(field, expected, "{problem}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

/// The fitted rule holds for its pair only: another edge is refused, another cloud gets the baseline.
#[test]
fn a_fitted_rule_serves_its_own_pair_only() {
    let [edge, cloud, other] = [b"edge".as_slice(), b"cloud", b"other"].map(Digest::of);
    let fitted = Paired::new(build(&PolicySpec::Calibrated { threshold: Some(0.2) }), &edge, 8).unwrap();
    for (model, name, threshold, noted) in [
        (Some(&cloud), "calibrated", 0.2, false),
        (None, "calibrated", 0.2, false),
        (Some(&other), "entropy", 0.7, true),
    ] {
        let (policy, why) = fitted.towards(model);
        assert_eq!((policy.name(), policy.threshold(), why.is_some()), (name, threshold, noted), "{model:?}");
        if let Some(why) = why {
            let text = why.to_string();
            assert!(matches!(why, PolicyFileError::OtherPair { which: "cloud", .. }), "{text}");
            assert!(text.contains(&other.to_string()) && text.contains("entropy"), "{text}");
        }
    }
    let refused = Paired::new(build(&PolicySpec::Calibrated { threshold: None }), &other, 8).unwrap_err();
    assert!(matches!(refused, PolicyFileError::OtherPair { which: "edge", .. }), "{refused}");
    // What was never fitted fits everything.
    let plain = Paired::new(build(&PolicySpec::Top1 { probability: 0.9 }), &other, 8).unwrap();
    assert_eq!(plain.towards(Some(&other)).0.name(), "top1");
    assert!(plain.towards(Some(&other)).1.is_none());
}

/// A rule that read another hidden state would score without a word of it.
#[test]
fn a_rule_fitted_on_another_hidden_state_is_refused() {
    let edge = Digest::of(b"edge");
    for (state, size, fits) in
        [(HiddenState::Raw, 2, true), (HiddenState::Raw, 3, false), (HiddenState::FinalNorm, 2, false)]
    {
        let mut file = file();
        file.hidden = Some(HiddenInput { state, means: vec![0.0; 2], stds: vec![1.0; 2] });
        file.network = Network::Logistic { weights: vec![0.5; 3], bias: -1.0 };
        let policy = PolicySpec::Calibrated { threshold: None }.build(Some(&Arc::new(file))).unwrap();
        match Paired::new(policy, &edge, size) {
            Ok(_) => assert!(fits, "{state:?} of 2 numbers beside {size}"),
            Err(PolicyFileError::Field { field, problem }) => assert!(!fits && field == "hidden", "{field} {problem}"),
            Err(other) => panic!("{other}"),
        }
    }
}

fn hidden(means: usize, stds: usize) -> HiddenInput {
    HiddenInput { state: HiddenState::FinalNorm, means: vec![0.0; means], stds: vec![1.0; stds] }
}

fn mlp(units: usize) -> Network {
    Network::Mlp { units, weights: vec![0.5], biases: vec![0.0], output: vec![1.0], output_bias: 0.0 }
}

#[test]
fn files_survive_the_disk_and_refuse_other_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policy.json");
    file().save(&path).unwrap();
    let loaded = PolicyFile::load(&path).unwrap();
    assert_eq!(loaded, file());
    loaded.check_pair(&Digest::of(b"edge"), &Digest::of(b"cloud")).unwrap();
    let error = loaded.check_pair(&Digest::of(b"edge"), &Digest::of(b"other")).unwrap_err();
    assert!(matches!(error, PolicyFileError::OtherPair { which: "cloud", .. }), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file is left");
    let missing = PolicyFile::load(&folder.path().join("none.json")).unwrap_err().to_string();
    assert!(missing.contains("none.json"), "{missing}");
    for broken in ["", "{}", "[1]", "{\"format\":2}", "null"] {
        assert!(matches!(PolicyFile::parse(broken.as_bytes()), Err(PolicyFileError::Json(_))), "{broken}");
    }
    let unknown = serde_json::to_string(&file()).unwrap().replacen('{', "{\"extra\":1,", 1);
    assert!(PolicyFile::parse(unknown.as_bytes()).unwrap_err().to_string().contains("extra"));
    let huge = serde_json::to_string(&file()).unwrap().replacen("0.5", "1e39", 1);
    assert!(PolicyFile::parse(huge.as_bytes()).is_err(), "an infinite number came through");
    let padded = vec![b' '; file::FILE_BYTES_MAX as usize + 1];
    assert!(matches!(PolicyFile::parse(&padded), Err(PolicyFileError::TooLarge { .. })));
}

#[test]
fn a_network_by_hand() {
    let mut file = file();
    file.hidden = Some(hidden(2, 2));
    // Inputs: (entropy − 1)/0.5, h0, h1. Units: ReLU(h0 + h1 − 1), ReLU(entropy').
    file.network = Network::Mlp {
        units: 2,
        weights: vec![0.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        biases: vec![-1.0, 0.0],
        output: vec![2.0, -3.0],
        output_bias: 0.25,
    };
    file.check().unwrap();
    let policy = Calibrated::new(Arc::new(file), None).unwrap();
    assert_eq!(policy.hidden().map(HiddenInput::size), Some(2));
    let score = |entropy, hidden: Option<&[f32]>| policy.score(&Features { hidden, ..features(entropy, 0.5) });
    let close = |found: f32, logit: f32| {
        let expected = 1.0 / (1.0 + (-logit).exp());
        assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
    };
    close(score(1.0, Some(&[1.0, 2.0])), 2.0 * 2.0 + 0.25);
    close(score(2.0, Some(&[0.0, 0.0])), -3.0 * 2.0 + 0.25);
    close(score(0.0, Some(&[0.5, 0.5])), 0.25);
    // Wild inputs are cut at 8 standard deviations.
    close(score(1.0, Some(&[1e30, 0.0])), 2.0 * 7.0 + 0.25);
    // No hidden state or a wrong one: better ask the cloud.
    for hidden in [None, Some(&[1.0f32][..]), Some(&[1.0, f32::NAN])] {
        let decision = policy.decide(&Features { hidden, ..features(1.0, 0.5) });
        assert_eq!((decision.escalates(), decision.reason()), (true, Reason::NotFinite), "{hidden:?}");
    }
}

#[test]
fn quality_table() {
    let quality = file().quality;
    // n = 99: the bound is (99·R̂ + 1)/100.
    for (target, threshold) in [(0.01, 0.1), (0.05, 0.3), (0.109, 0.5), (0.11, 0.5), (0.42, 1.0)] {
        assert_eq!(for_quality(&quality, target).map(|point| point.threshold), Ok(threshold), "{target}");
    }
    assert_eq!(
        for_quality(&quality, 0.005),
        Err(QualityError::TooFewRequests { target: 0.005, requests: 99, needed: 199 })
    );
    let mut poor = quality.clone();
    poor.points.remove(0);
    let error = for_quality(&poor, 0.02).unwrap_err();
    let QualityError::Infeasible { best, escalate_at_least, .. } = error else { panic!("{error}") };
    assert!((best - 0.0496).abs() < 1e-4 && (escalate_at_least - 0.38 / 0.98).abs() < 1e-4, "{error}");
    for target in [0.0, -1.0, 1.0, f32::NAN] {
        assert!(matches!(for_quality(&quality, target), Err(QualityError::BadTarget { .. })));
    }
    let empty = Quality { points: Vec::new(), ..file().quality };
    assert_eq!(for_quality(&empty, 0.1), Err(QualityError::NoPoints));
    // A dip after a bad row does not count: the promise needs every smaller τ to hold.
    let mut dip = quality.clone();
    dip.points[1].risk = 0.3;
    assert_eq!(for_quality(&dip, 0.15).map(|point| point.threshold), Ok(0.1));

    for (share, threshold) in [(0.0, 1.0), (0.1, 1.0), (0.15, 0.5), (0.59, 0.3), (1.0, 0.1)] {
        assert_eq!(for_share(&quality, share).map(|point| point.threshold), Ok(threshold), "{share}");
    }
    assert!(matches!(for_share(&quality, 1.5), Err(ShareError::BadShare { .. })));
    let mut few = quality;
    few.points.pop();
    assert_eq!(for_share(&few, 0.1), Err(ShareError::TooSmall { share: 0.1, least: 0.15 }));
    assert_eq!(for_share(&empty, 0.1), Err(ShareError::NoPoints));
}

/// A rule that fits every pair, bound to no pair.
fn unbound(spec: &PolicySpec) -> Paired {
    Paired::new(build(spec), &Digest([0; 32]), 1).expect("has no file")
}

#[test]
fn a_request_may_bring_a_threshold_of_its_own() {
    let policy = unbound(&PolicySpec::Entropy { nats: 1.0 });
    for share in [None, Some(0.5)] {
        let aim = Aim::new(Goal { cloud_share: share, ..Goal::default() }, &policy).expect("a goal");
        for (threshold, entropy, reason) in [
            (None, 1.5, Reason::Entropy),
            (None, 0.5, Reason::Sure),
            (Some(2.0), 1.5, Reason::Sure),
            (Some(0.4), 0.5, Reason::Entropy),
        ] {
            let mut steering = aim.steering(policy.policy(), false, threshold);
            let decision = steering.decide(&features(entropy, 0.5));
            assert_eq!(decision.reason(), reason, "{share:?} {threshold:?}, {entropy}");
        }
    }
}

#[test]
fn goals_move_the_threshold_or_say_why_not() {
    let entropy = unbound(&PolicySpec::Entropy { nats: 1.0 });
    let goal = |threshold, quality, cloud_share| Goal { threshold, quality, cloud_share, cloud_tokens_max: None };
    for two in [goal(Some(0.1), Some(0.1), None), goal(None, Some(0.1), Some(0.1)), goal(Some(0.1), None, Some(0.1))] {
        assert_eq!(Aim::new(two, &entropy).unwrap_err(), GoalError::Several);
    }
    assert_eq!(Aim::new(goal(None, Some(0.1), None), &entropy).unwrap_err(), GoalError::NotFitted);
    for share in [-0.1, 1.1, f32::NAN] {
        let error = Aim::new(goal(None, None, Some(share)), &entropy).unwrap_err();
        assert!(matches!(error, GoalError::Share(ShareError::BadShare { .. })), "{error}");
    }
    assert_eq!(Aim::new(goal(Some(0.3), None, None), &entropy).unwrap().threshold(), Some(0.3));

    // The share of one node, over answers that follow each other: half of the tokens lie above 1 nat.
    for share in [0.1, 0.5, 0.8] {
        let aim = Aim::new(goal(None, None, Some(share)), &entropy).unwrap();
        let (mut escalated, answers, tokens) = (0, 50, 200);
        for answer in 0..answers {
            let mut steering = aim.steering(entropy.policy(), false, None);
            for at in 0..tokens {
                let nats = ((answer * tokens + at) * 7919 % 1000) as f32 / 500.0;
                escalated += u32::from(steering.decide(&features(nats, 0.5)).escalates());
            }
        }
        let measured = escalated as f32 / (answers * tokens) as f32;
        assert!((measured - share).abs() < 0.02, "{measured} for {share}");
    }
}

#[test]
fn the_budget_of_an_answer_ends_and_another_answer_has_its_own() {
    let policy = unbound(&PolicySpec::Always);
    let aim = Aim::new(Goal { cloud_tokens_max: Some(2), ..Goal::default() }, &policy).unwrap();
    for _ in 0..2 {
        let mut steering = aim.steering(policy.policy(), false, None);
        let mut reasons = vec![];
        for _ in 0..2 {
            reasons.push(steering.decide(&features(1.0, 0.5)).reason());
        }
        // Another cloud does not fill it up.
        steering = steering.succeeded_by(aim.steering(policy.policy(), false, None));
        reasons.push(steering.decide(&features(1.0, 0.5)).reason());
        assert_eq!(reasons, [Reason::Always, Reason::Always, Reason::BudgetExhausted]);
    }
}

fn any_features() -> impl Strategy<Value = Features<'static>> {
    (0.0f32..8.3, 0.0f32..=1.0, 0.0f32..=1.0, 0.0f32..60.0, 0.0f32..=1.0, 0u32..100_000).prop_map(
        |(entropy, top1, margin, logit_margin, running_acceptance, position_in_answer)| Features {
            entropy,
            top1,
            margin,
            logit_margin,
            running_acceptance,
            position_in_answer,
            hidden: None,
        },
    )
}

proptest! {
    /// A higher threshold never escalates more, for any policy.
    #[test]
    fn decisions_are_monotone_in_the_threshold(f in any_features(), a in -0.5f32..9.0, b in -0.5f32..9.0, seed: u64) {
        let (low, high) = if a <= b { (a, b) } else { (b, a) };
        for spec in [
            PolicySpec::Always,
            PolicySpec::Never,
            PolicySpec::Random { share: 0.3, seed },
            PolicySpec::Entropy { nats: 1.0 },
            PolicySpec::Top1 { probability: 0.8 },
            PolicySpec::Calibrated { threshold: None },
        ] {
            let policy = build(&spec);
            let escalates = |threshold| policy.decide_at(&f, threshold).escalates();
            prop_assert!(escalates(low) || !escalates(high), "{spec:?}");
            let score = policy.score(&f);
            prop_assert!(score >= 0.0 && (score <= 1.0 || policy.reason() == Reason::Entropy));
        }
    }

    /// Both calibrations keep the order of logits and stay in 0..=1.
    #[test]
    fn calibration_is_monotone(
        mut knots in prop::collection::btree_map(0u32..1_000, 0.0f32..=1.0, 1..20),
        a in -40.0f32..40.0,
        b in -40.0f32..40.0,
        slope in 0.01f32..5.0,
        offset in -5.0f32..5.0,
    ) {
        let mut highest = 0.0f32;
        for p in knots.values_mut() {
            highest = highest.max(*p);
            *p = highest;
        }
        let knots = knots.into_iter().map(|(x, p)| [x as f32 / 999.0, p]).collect();
        let (low, high) = if a <= b { (a, b) } else { (b, a) };
        for calibration in [Calibration::Platt { slope, offset }, Calibration::Isotonic { knots }] {
            let (p, q) = (calibration.apply(low), calibration.apply(high));
            prop_assert!(p <= q && (0.0..=1.0).contains(&p) && (0.0..=1.0).contains(&q), "{calibration:?}: {p} {q}");
        }
    }

    /// The share follows its target within (1 + 2η)/(ηT), whatever the scores do.
    #[test]
    fn the_share_is_kept_under_any_drift(
        scores in prop::collection::vec(0.0f32..=1.0, 50..600),
        share in 0.0f32..=1.0,
        step in 0.005f32..0.3,
        start in 0.0f32..=1.0,
    ) {
        let mut controller = ShareController::new(start, share, step, 1.0);
        let mut escalated = 0;
        for score in &scores {
            let goes = *score > controller.threshold();
            escalated += u32::from(goes);
            controller.record(goes);
            prop_assert!((-step..=1.0 + step).contains(&controller.threshold()));
        }
        let n = scores.len() as f32;
        let off = (escalated as f32 / n - share).abs();
        prop_assert!(off <= (1.0 + 2.0 * step) / (step * n) + 1e-3, "off by {off} after {n}");
    }

    /// The coin escalates its share, differs by seed and repeats itself.
    #[test]
    fn the_coin_is_fair(share in 0.05f32..0.95, seed: u64) {
        let policy = Random::new(share, seed).unwrap();
        let at = |position_in_answer| policy.decide(&Features { position_in_answer, ..features(1.0, 0.5) });
        let escalated = (0..4_000).filter(|position| at(*position).escalates()).count();
        prop_assert!((escalated as f32 / 4_000.0 - share).abs() < 0.05);
        prop_assert_eq!(at(7), at(7));
    }
}

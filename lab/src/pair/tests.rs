use std::path::Path;
use std::sync::Arc;

use tandem_edge_node::request::Mode;
use tandem_router::policy::{PolicyFile, PolicyFileError, PolicySpec};

use super::*;
use crate::cluster::{Cluster, ClusterError, ClusterOptions};
use crate::eval::{EvalOptions, Measure, Split, evaluate};

/// The embedded cloud model as a folder whose tokenizer has two tokens the other way round.
fn with_another_tokenizer(dir: &Path) -> Found {
    let mut tokenizer: serde_json::Value = serde_json::from_slice(CLOUD.tokenizer).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let [a, b] = [300, 301].map(|id| vocab.iter().find(|(_, v)| **v == id).map(|(text, _)| text.clone()).unwrap());
    vocab.insert(a, 301.into());
    vocab.insert(b, 300.into());
    for (name, bytes) in [
        ("config.json", CLOUD.config),
        ("model.safetensors", CLOUD.weights),
        ("chat_template.jinja", CLOUD.chat_template.as_bytes()),
        ("generation_config.json", CLOUD.generation_config),
        ("tokenizer.json", serde_json::to_vec(&tokenizer).unwrap().as_slice()),
    ] {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    Found { name: "other".into(), place: Place::Folder(dir.to_owned()) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_with_two_tokenizers_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let models = PairFiles { cloud: with_another_tokenizer(dir.path()), ..PairFiles::default() };
    let refused = Pair::load(&models, 1).err().unwrap();
    assert!(
        matches!(&refused, LabError::TwoTokenizers(why) if why.edge == "demo-edge" && why.cloud == "other"),
        "{refused}"
    );
    assert!(refused.to_string().contains("differ first"), "{refused}");
    let nodes = ClusterOptions { models, ..ClusterOptions::default() };
    assert!(matches!(Cluster::start(nodes).await.err(), Some(ClusterError::TwoTokenizers(_))));
}

/// A pair that nothing was fitted for, on questions of its own: some of them have no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_without_a_fitted_rule_is_evaluated_with_a_baseline() {
    let dir = tempfile::tempdir().unwrap();
    let [scored, open] = ["scored", "open"].map(|name| dir.path().join(format!("{name}.jsonl")));
    let rows = [
        r#"{"prompt":"What is the capital of Peru?","answer":"\\bLima\\b","scorer":"regex"}"#,
        r#"{"messages":[{"role":"user","content":"What is the capital of France?"}],"answer":"PARIS","category":"c"}"#,
    ];
    std::fs::write(&scored, rows.join("\n")).unwrap();
    std::fs::write(&open, r#"{"prompt":"Who are you?"}"#).unwrap();
    let nodes = ClusterOptions {
        models: PairFiles { cloud: PairFiles::default().edge, ..PairFiles::default() },
        policy: PolicySpec::Entropy { nats: 1.0 },
        ..ClusterOptions::default()
    };
    let options = EvalOptions {
        splits: [&scored, &open].map(|path| Split::of_file(path)).to_vec(),
        curves: vec!["scored".into(), "open".into()],
        answer_tokens: 24,
        ..EvalOptions::default()
    };
    let report = evaluate(&options, &nodes).await.unwrap();
    assert_eq!((report.policy.name.as_str(), report.policy.fitted_on.as_deref()), ("entropy", None));
    assert_eq!((&report.pair.edge.name, &report.pair.edge), (&"demo-edge".to_owned(), &report.pair.cloud));
    assert_eq!(report.splits.iter().map(|s| s.measure).collect::<Vec<_>>(), [Measure::Scorers, Measure::EqualsCloud]);
    for split in &report.splits {
        assert_eq!(split.exact_equals_cloud, Some(1.0));
        assert_eq!(split.baselines.iter().map(|b| b.rule.as_str()).collect::<Vec<_>>(), ["entropy", "top1", "random"]);
        assert_eq!(split.curves.len(), 3);
        // One model twice: whoever writes, the answer is the same.
        assert!(split.baselines.iter().all(|b| b.equals_cloud == 1.0), "{:?}", split.baselines);
    }
    assert_eq!(report.splits[0].total(Mode::Local).unwrap().exact_match, 0.5);
    let text = report.markdown();
    let digest = &report.pair.edge.digest;
    for part in [digest, "numerics tandem-cpu", "not fitted to this pair", "scored.jsonl", "entropy is ahead by"] {
        assert!(text.contains(part), "{part}: {text}");
    }

    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/policy.json");
    let policy_file = Some(Arc::new(PolicyFile::load(&file).unwrap()));
    let nodes = ClusterOptions { policy: PolicySpec::Calibrated { threshold: None }, policy_file, ..nodes };
    let refused = evaluate(&options, &nodes).await.err().unwrap();
    assert!(matches!(refused, LabError::PolicyFile(PolicyFileError::OtherPair { which: "cloud", .. })), "{refused}");
}

#[test]
fn a_prompt_that_leaves_no_room_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.jsonl");
    std::fs::write(&path, format!("{{\"prompt\":\"a\"}}\n{{\"prompt\":\"{}\"}}\n", "no ".repeat(20_000))).unwrap();
    let (rows, _) = crate::questions::read(&path, &crate::questions::ReadOptions::default()).unwrap();
    let refused = Pair::embedded(1).unwrap().prompts(&rows, 96).unwrap_err();
    assert!(matches!(refused, LabError::Row { line: 2, problem: RowError::Tokens { .. }, .. }), "{refused}");
}

use std::path::Path;

use tandem_router::policy::{Calibrated, Policy, PolicySpec, Top1};

use super::*;
use crate::explore::{Explorer, Rule};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn policy() -> Arc<PolicyFile> {
    Arc::new(PolicyFile::load(&root().join("models/policy.json")).unwrap())
}

fn questions(n: usize) -> Vec<Row> {
    let data = root().join("models/data");
    SPLITS.iter().flat_map(|s| reference_subset(read(&data.join(format!("{s}.jsonl"))).unwrap(), n)).collect()
}

/// What the offline sweep promises: the same tokens, decided by the same model, as two nodes over
/// QUIC, for the fitted rule at its own and at a lower threshold and for a baseline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_offline_path_is_the_closed_loop_token_for_token() {
    let rows = questions(6);
    let pair = Pair::embedded(1).unwrap();
    let file = policy();
    file.check_pair(&pair.edge.digest(), &pair.cloud.digest()).unwrap();
    let prompts: Vec<Vec<u32>> = rows.iter().map(|r| pair.prompt(&r.prompt).unwrap()).collect();
    let mut explorer = Explorer::new(&pair, prompts.clone());
    let calibrated: Arc<dyn Policy> = Arc::new(Calibrated::new(file.clone(), None).unwrap());
    let top1: Arc<dyn Policy> = Arc::new(Top1::new(0.9).unwrap());
    let spec = PolicySpec::Top1 { probability: 0.9 };
    let cases = [
        (PolicySpec::Calibrated { threshold: None }, calibrated.clone(), None),
        (PolicySpec::Calibrated { threshold: None }, calibrated, Some(0.03)),
        (spec, top1, None),
    ];
    let mut asked = 0;
    for (spec, policy, threshold) in cases {
        let rule = Rule::Policy(policy.clone(), threshold.unwrap_or_else(|| policy.threshold()));
        let offline = explorer.run(&[rule], &Progress::silent()).unwrap().remove(0);
        let options = ClusterOptions { policy: spec, policy_file: Some(file.clone()), ..ClusterOptions::default() };
        let cluster = Cluster::start(options).await.unwrap();
        for (at, path) in offline.iter().enumerate() {
            let asked_for = Asked { threshold, ..Asked::greedy(prompts[at].clone(), Mode::Auto) };
            let answer = ask(&cluster.edge, asked_for).await.unwrap();
            assert_eq!(answer.tokens, path.tokens, "{}: {}", policy.name(), rows[at].prompt);
            let by_cloud = (answer.route.accepted + answer.route.cloud_tokens) as usize;
            assert_eq!(by_cloud, path.cloud_tokens(), "{}: {}", policy.name(), rows[at].prompt);
            assert!(!answer.route.degraded);
            asked += by_cloud;
        }
    }
    assert!(asked > 0, "no token went to the cloud: the comparison says nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_evaluation_adds_up() {
    let options = EvalOptions {
        data: root().join("models/data"),
        splits: vec![SPLITS[0].to_owned()],
        limit: 6,
        curves: vec![SPLITS[0].to_owned()],
        at_once: 2,
        ..EvalOptions::default()
    };
    let report = evaluate(&options, &policy()).await.unwrap();
    let split = &report.splits[0];
    assert_eq!((split.prompts, split.modes.len()), (6, 4));
    assert_eq!(split.exact_equals_cloud, Some(1.0));
    assert_eq!(split.total(Mode::Local).unwrap().cloud_share, 0.0);
    assert_eq!(split.total(Mode::Local).unwrap().bytes_up, 0.0);
    let cloud = split.total(Mode::Cloud).unwrap();
    assert_eq!((cloud.cloud_share, cloud.written_by_cloud), (1.0, 1.0));
    for mode in &split.modes {
        assert_eq!(mode.degraded, 0);
        assert_eq!(mode.categories.iter().skip(1).map(|c| c.prompts).sum::<usize>(), 6);
    }
    assert_eq!(split.curves.len(), 4);
    assert_eq!(split.baselines.len(), 4);
    let text = report.markdown();
    assert!(text.contains("| auto |") && text.contains("| random |"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plot.svg");
    crate::plot::shares(split, &file).unwrap();
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("calibrated") && svg.contains("cloud alone"));
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<EvalReport>(&json).unwrap().splits.len(), 1);
}

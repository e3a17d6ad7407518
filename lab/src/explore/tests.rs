use std::path::Path as File;

use serde::Deserialize;
use tandem_router::policy::{PolicySpec, Top1};

use super::*;

#[derive(Deserialize)]
struct Reference {
    rows: Vec<Recorded>,
}

#[derive(Deserialize)]
struct Recorded {
    model: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
}

fn recorded() -> Vec<Recorded> {
    let path = File::new(env!("CARGO_MANIFEST_DIR")).join("../models/reference/greedy.json");
    serde_json::from_slice::<Reference>(&std::fs::read(path).unwrap()).unwrap().rows
}

#[test]
fn single_model_paths_are_the_reference() {
    let pair = Pair::embedded(1).unwrap();
    let of = |model: &str| recorded().into_iter().filter(|r| r.model == model).take(12).collect::<Vec<_>>();
    let (edge, cloud) = (of("edge"), of("cloud"));
    let prompts = edge.iter().map(|r| r.prompt_ids.clone()).collect();
    let mut explorer = Explorer::new(&pair, prompts);
    let paths = explorer.run(&[Rule::Edge, Rule::Cloud], &Progress::silent()).unwrap();
    for (at, (e, c)) in edge.iter().zip(&cloud).enumerate() {
        assert_eq!(e.prompt_ids, c.prompt_ids);
        // The record may stop before the end token or at its own length.
        let n = e.greedy_ids.len().min(paths[0][at].tokens.len());
        assert_eq!(paths[0][at].tokens[..n], e.greedy_ids[..n], "edge, prompt {at}");
        let n = c.greedy_ids.len().min(paths[1][at].tokens.len());
        assert_eq!(paths[1][at].tokens[..n], c.greedy_ids[..n], "cloud, prompt {at}");
    }
}

/// The tree is a cache: the order in which rules visit it changes nothing.
#[test]
fn known_contexts_change_no_path() {
    let pair = Pair::embedded(1).unwrap();
    let prompts: Vec<Vec<u32>> = recorded().into_iter().take(6).map(|r| r.prompt_ids).collect();
    let top1 = PolicySpec::Top1 { probability: 0.9 }.build(None).unwrap();
    let rules =
        [Rule::Policy(top1.clone(), top1.threshold()), Rule::Random { share: 0.3, seed: 7 }, Rule::Cloud, Rule::Edge];
    let together = Explorer::new(&pair, prompts.clone()).run(&rules, &Progress::silent()).unwrap();
    let mut reversed = rules.clone();
    reversed.reverse();
    let mut backwards = Explorer::new(&pair, prompts.clone()).run(&reversed, &Progress::silent()).unwrap();
    backwards.reverse();
    for (rule, (a, b)) in together.iter().zip(&backwards).enumerate() {
        let mut alone = Explorer::new(&pair, prompts.clone());
        let alone = alone.run(&rules[rule..=rule], &Progress::silent()).unwrap();
        for prompt in 0..prompts.len() {
            assert_eq!(a[prompt].tokens, alone[0][prompt].tokens, "rule {rule}, prompt {prompt}");
            assert_eq!(a[prompt].tokens, b[prompt].tokens, "rule {rule}, prompt {prompt}, other order");
            assert_eq!(a[prompt].by_cloud, b[prompt].by_cloud);
        }
    }
    assert_eq!(cloud_share(&together[2]), 1.0);
    assert_eq!(cloud_share(&together[3]), 0.0);
}

/// A branch goes on as the rule would have from there, whatever else has been visited.
#[test]
fn a_branch_goes_on_where_it_begins() {
    let pair = Pair::embedded(1).unwrap();
    let prompts: Vec<Vec<u32>> = recorded().into_iter().take(5).map(|r| r.prompt_ids).collect();
    let mut explorer = Explorer::new(&pair, prompts.clone());
    let own = explorer.run(&[Rule::Edge, Rule::Cloud], &Progress::silent()).unwrap();
    // The rule's own beginnings give its own answers; several of one prompt, in any order.
    let mut branches = Vec::new();
    for prompt in (0..prompts.len()).rev() {
        for length in [0, 1, own[1][prompt].tokens.len() / 2, own[1][prompt].tokens.len()] {
            branches.push(Branch { prompt, begins: own[1][prompt].tokens[..length].to_vec() });
        }
    }
    for (branch, path) in branches.iter().zip(explorer.go_on(&branches, &Rule::Cloud).unwrap()) {
        assert_eq!(path.tokens, own[1][branch.prompt].tokens, "{branch:?}");
        let before: Vec<Vec<u32>> =
            path.nodes.iter().map(|&node| explorer.tokens_before(branch.prompt, node)).collect();
        assert!(before.iter().enumerate().all(|(at, tokens)| *tokens == path.tokens[..at]), "{branch:?}");
    }
    // A foreign beginning, known contexts or not.
    let branch = Branch { prompt: 1, begins: own[0][1].tokens[..3].to_vec() };
    let known = explorer.go_on(std::slice::from_ref(&branch), &Rule::Cloud).unwrap();
    let fresh = Explorer::new(&pair, prompts).go_on(std::slice::from_ref(&branch), &Rule::Cloud).unwrap();
    assert_eq!(known[0].tokens, fresh[0].tokens);
    assert_eq!(known[0].tokens[..3], branch.begins);
}

#[test]
fn a_policy_escalates_where_its_score_is_above_the_threshold() {
    let node = Node {
        edge: 1,
        cloud: 2,
        depth: 0,
        entropy: 1.0,
        top1: 0.8,
        margin: 0.7,
        logit_margin: 2.0,
        hidden: vec![0.0],
        children: Vec::new(),
        after: None,
    };
    assert!(node.differs());
    let policy: Arc<dyn Policy> = Arc::new(Top1::new(0.5).unwrap());
    for (threshold, asks) in [(0.1, true), (0.3, false)] {
        assert_eq!(Rule::Policy(policy.clone(), threshold).asks_cloud(0, &node), asks, "{threshold}");
    }
    let coins = |share| (0..1000).filter(|&p| Rule::Random { share, seed: 1 }.asks_cloud(p, &node)).count();
    assert_eq!((coins(0.0), coins(1.0)), (0, 1000));
    assert!((250..350).contains(&coins(0.3)), "{}", coins(0.3));
}

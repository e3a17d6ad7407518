//! Both models side by side over many prompts: which token each would choose after every context
//! that some rule leads to.
//!
//! Answers are greedy, so what follows a context is a fact that is computed once: the contexts of a
//! prompt form a tree, and a second rule computes only where it turns off. That is how a sweep over
//! many thresholds costs little more than one run. A row's bits do not depend on what else is in the
//! batch, so a path here equals the closed loop's token for token (a test holds them together).

mod step;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tandem_router::policy::{Features, Policy, Random};

use crate::error::LabError;
use crate::pair::Pair;
use crate::progress::Progress;
use step::Group;

/// Tokens of an answer at most, as in the reference evaluation.
pub const ANSWER_TOKENS_MAX: usize = 96;
/// Prompts that are fed together.
const GROUP: usize = 128;

/// A context and what the models say after it.
#[derive(Clone, Debug)]
pub struct Node {
    /// The edge's token.
    pub edge: u32,
    /// The cloud's token.
    pub cloud: u32,
    /// Tokens of the answer before it.
    pub depth: u32,
    /// Entropy of the edge's distribution, nats.
    pub entropy: f32,
    /// Probability of the edge's token.
    pub top1: f32,
    /// That minus the second's.
    pub margin: f32,
    /// Logit of the edge's token minus the second's.
    pub logit_margin: f32,
    /// The edge's hidden state above its last layer, before the final norm.
    pub hidden: Vec<f32>,
    children: Vec<(u32, u32)>,
    /// The context before it and the token that leads here; none for the prompt itself.
    after: Option<(u32, u32)>,
}

impl Node {
    /// What a policy sees. Running acceptance depends on other requests, so it is at its
    /// neutral value here.
    #[must_use]
    pub fn features(&self) -> Features<'_> {
        Features { hidden: Some(&self.hidden), ..self.scalars() }
    }

    /// As [`Node::features`], without the hidden state.
    #[must_use]
    pub fn scalars(&self) -> Features<'static> {
        Features {
            entropy: self.entropy,
            top1: self.top1,
            margin: self.margin,
            logit_margin: self.logit_margin,
            running_acceptance: 1.0,
            position_in_answer: self.depth,
            hidden: None,
        }
    }

    /// True if the cloud would choose another token than the edge.
    #[must_use]
    pub fn differs(&self) -> bool {
        self.edge != self.cloud
    }
}

/// Who chooses the next token.
#[derive(Clone, Debug)]
pub enum Rule {
    /// The edge, always.
    Edge,
    /// The cloud, always.
    Cloud,
    /// The cloud where the policy's score is above the threshold.
    Policy(Arc<dyn Policy>, f32),
    /// The cloud for this share of the tokens, by a coin per prompt and position.
    Random {
        /// Share in 0..=1.
        share: f32,
        /// Seed of the coins.
        seed: u64,
    },
}

impl Rule {
    fn asks_cloud(&self, prompt: usize, node: &Node) -> bool {
        match self {
            Self::Edge => false,
            Self::Cloud => true,
            Self::Policy(policy, threshold) => policy.decide_at(&node.features(), *threshold).escalates(),
            Self::Random { share, seed } => {
                let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ prompt as u64;
                Random::new(share.clamp(0.0, 1.0), seed).is_ok_and(|coin| coin.decide(&node.features()).escalates())
            }
        }
    }
}

/// One answer under a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Its tokens, the one that ends it included.
    pub tokens: Vec<u32>,
    /// Which of them the cloud decided.
    pub by_cloud: Vec<bool>,
    /// The contexts they were chosen in.
    pub nodes: Vec<u32>,
}

impl Path {
    /// Tokens that the cloud decided.
    #[must_use]
    pub fn cloud_tokens(&self) -> usize {
        self.by_cloud.iter().filter(|c| **c).count()
    }
}

/// Share of the tokens of `paths` that the cloud decided, 0 … 1.
#[must_use]
pub fn cloud_share<'a>(paths: impl IntoIterator<Item = &'a Path>) -> f64 {
    let (cloud, all) =
        paths.into_iter().fold((0, 0), |(cloud, all), p| (cloud + p.cloud_tokens(), all + p.tokens.len()));
    cloud as f64 / (all as f64).max(1.0)
}

/// An answer whose first tokens are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branch {
    /// Which prompt.
    pub prompt: usize,
    /// Its first tokens, whichever model would choose them.
    pub begins: Vec<u32>,
}

/// The contexts of one prompt. Node 0 is the prompt itself.
#[derive(Clone, Debug, Default)]
struct Tree {
    prompt: Vec<u32>,
    nodes: Vec<Node>,
}

impl Tree {
    fn child(&self, node: usize, token: u32) -> Option<usize> {
        self.nodes[node].children.iter().find(|(t, _)| *t == token).map(|(_, at)| *at as usize)
    }
}

/// Where a walk stands.
struct Walk {
    /// Tokens that are taken before the rule is asked.
    begins: Vec<u32>,
    path: Path,
    /// The context whose node is needed next.
    at: Option<usize>,
    done: bool,
}

impl Walk {
    fn new(tree: &Tree, begins: Vec<u32>, answer_max: usize) -> Self {
        Self { begins, path: Path::default(), at: (!tree.nodes.is_empty()).then_some(0), done: answer_max == 0 }
    }

    /// For a prompt that takes no part.
    fn none() -> Self {
        Self { begins: Vec::new(), path: Path::default(), at: None, done: true }
    }
}

/// The trees of many prompts. See the module's text.
pub struct Explorer<'a> {
    pair: &'a Pair,
    trees: Vec<Tree>,
    answer_max: usize,
}

impl<'a> Explorer<'a> {
    /// An explorer of `prompts` (token ids, none empty) for answers of [`ANSWER_TOKENS_MAX`] tokens.
    #[must_use]
    pub fn new(pair: &'a Pair, prompts: Vec<Vec<u32>>) -> Self {
        let trees = prompts.into_iter().map(|prompt| Tree { prompt, nodes: Vec::new() }).collect();
        Self { pair, trees, answer_max: ANSWER_TOKENS_MAX }
    }

    /// For answers of at most `answer_max` tokens.
    #[must_use]
    pub fn with_answer_max(self, answer_max: usize) -> Self {
        Self { answer_max, ..self }
    }

    /// The contexts of prompt `prompt` that have been visited.
    #[must_use]
    pub fn nodes(&self, prompt: usize) -> &[Node] {
        self.trees.get(prompt).map_or(&[], |t| &t.nodes)
    }

    /// Tokens of the answer before context `node` of prompt `prompt`.
    #[must_use]
    pub fn tokens_before(&self, prompt: usize, node: u32) -> Vec<u32> {
        let nodes = self.nodes(prompt);
        let after = |at: u32| nodes.get(at as usize).and_then(|n| n.after);
        let mut tokens: Vec<u32> =
            std::iter::successors(after(node), |(before, _)| after(*before)).map(|a| a.1).collect();
        tokens.reverse();
        tokens
    }

    /// Prompts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.trees.len()
    }

    /// True without prompts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.trees.is_empty()
    }

    /// Answers every prompt under every rule: `[rule][prompt]`.
    ///
    /// # Errors
    /// A prompt does not fit the models, or a model fails.
    pub fn run(&mut self, rules: &[Rule], progress: &Progress) -> Result<Vec<Vec<Path>>, LabError> {
        let mut out: Vec<Vec<Path>> = vec![Vec::with_capacity(self.trees.len()); rules.len()];
        let mut from = 0;
        for trees in self.trees.chunks_mut(GROUP) {
            // Made when something is missing: a sweep over known contexts needs no KV state.
            let mut group: Option<Group> = None;
            for (rule, paths) in rules.iter().zip(&mut out) {
                let walks = trees.iter().map(|t| Walk::new(t, Vec::new(), self.answer_max)).collect();
                paths.extend(walk(self.pair, trees, &mut group, rule, (from, walks), self.answer_max)?);
                progress.advance(trees.len() as u64);
            }
            from += trees.len();
        }
        Ok(out)
    }

    /// Goes on under `rule` after the tokens that each branch begins with; the paths are in the order
    /// of the branches and hold these tokens too.
    ///
    /// # Errors
    /// A prompt does not fit the models, or a model fails.
    pub fn go_on(&mut self, branches: &[Branch], rule: &Rule) -> Result<Vec<Path>, LabError> {
        let mut of_prompt: Vec<Vec<usize>> = vec![Vec::new(); self.trees.len()];
        for (at, branch) in branches.iter().enumerate() {
            of_prompt[branch.prompt].push(at);
        }
        let mut out = vec![Path::default(); branches.len()];
        let mut from = 0;
        for (trees, of_prompt) in self.trees.chunks_mut(GROUP).zip(of_prompt.chunks(GROUP)) {
            let mut group: Option<Group> = None;
            // A pass holds one context of a prompt, so its branches take turns.
            for turn in 0..of_prompt.iter().map(Vec::len).max().unwrap_or(0) {
                let walks = trees.iter().zip(of_prompt).map(|(tree, of_prompt)| match of_prompt.get(turn) {
                    Some(&at) => Walk::new(tree, branches[at].begins.clone(), self.answer_max),
                    None => Walk::none(),
                });
                let walks = walks.collect();
                let paths = walk(self.pair, trees, &mut group, rule, (from, walks), self.answer_max)?;
                for (of_prompt, path) in of_prompt.iter().zip(paths) {
                    if let Some(&at) = of_prompt.get(turn) {
                        out[at] = path;
                    }
                }
            }
            from += trees.len();
        }
        Ok(out)
    }
}

/// Takes `walks`, one for each tree of a group whose first prompt is `from`, to their ends under one
/// rule, feeding the models where contexts are missing.
fn walk(
    pair: &Pair,
    trees: &mut [Tree],
    group: &mut Option<Group>,
    rule: &Rule,
    (from, mut walks): (usize, Vec<Walk>),
    answer_max: usize,
) -> Result<Vec<Path>, LabError> {
    loop {
        let mut missing = Vec::new();
        for (i, (tree, walk)) in trees.iter().zip(&mut walks).enumerate() {
            advance(pair, tree, walk, rule, from + i, answer_max);
            if !walk.done {
                missing.push(i);
            }
        }
        if missing.is_empty() {
            return Ok(walks.into_iter().map(|w| w.path).collect());
        }
        if group.is_none() {
            *group = Some(Group::new(pair, trees.iter().map(|t| t.prompt.len() + answer_max))?);
        }
        let Some(group) = group else { return Ok(Vec::new()) };
        let contexts: Vec<(usize, Vec<u32>)> =
            missing.iter().map(|&i| (i, [trees[i].prompt.as_slice(), &walks[i].path.tokens].concat())).collect();
        for (&i, mut node) in missing.iter().zip(group.feed(pair, &contexts)?) {
            let (tree, walk) = (&mut trees[i], &mut walks[i]);
            node.depth = walk.path.tokens.len() as u32;
            let at = tree.nodes.len();
            if let (Some(&parent), Some(&token)) = (walk.path.nodes.last(), walk.path.tokens.last()) {
                tree.nodes[parent as usize].children.push((token, at as u32));
                node.after = Some((parent, token));
            }
            tree.nodes.push(node);
            walk.at = Some(at);
        }
    }
}

/// Follows the rule as far as the tree is known.
fn advance(pair: &Pair, tree: &Tree, walk: &mut Walk, rule: &Rule, prompt: usize, answer_max: usize) {
    while let (Some(at), false) = (walk.at, walk.done) {
        let node = &tree.nodes[at];
        let (token, cloud) = match walk.begins.get(walk.path.tokens.len()) {
            Some(&token) => (token, token != node.edge),
            None if rule.asks_cloud(prompt, node) => (node.cloud, true),
            None => (node.edge, false),
        };
        walk.path.tokens.push(token);
        walk.path.by_cloud.push(cloud);
        walk.path.nodes.push(at as u32);
        walk.done = pair.is_stop(token) || walk.path.tokens.len() >= answer_max;
        walk.at = tree.child(at, token);
    }
}

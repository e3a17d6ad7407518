//! What the rule learns to predict of a context.

use std::collections::BTreeMap;

use tandem_router::policy::Predicts;

use crate::error::LabError;
use crate::explore::{Branch, Explorer, Node, Path, Rule};
use crate::pair::Pair;
use crate::rows::Row;

/// Two ways to go on from a context: with the cloud's token and with the edge's. After it the cloud
/// decides in both, so that the difference is this token's alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fork {
    /// The tokens differ.
    pub differs: bool,
    /// The answer with the cloud's token is right.
    pub cloud_right: bool,
    /// The answer with the edge's token is right.
    pub edge_right: bool,
}

impl Fork {
    /// The label of the context.
    pub(super) fn label(self, predicts: Predicts) -> bool {
        match predicts {
            Predicts::Divergence => self.differs,
            Predicts::Benefit => self.differs && self.cloud_right && !self.edge_right,
        }
    }
}

/// What to predict on `rows`: what was asked for, or the benefit if every row has a right answer.
pub(super) fn choose(rows: &[Row], asked: Option<Predicts>) -> Result<Predicts, LabError> {
    let without = rows.iter().find(|row| !row.has_answer());
    match (asked, without) {
        (Some(Predicts::Benefit), Some(row)) => Err(LabError::NoAnswer { at: row.at(), wanted: "the label `benefit`" }),
        (Some(asked), _) => Ok(asked),
        (None, Some(_)) => Ok(Predicts::Divergence),
        (None, None) => Ok(Predicts::Benefit),
    }
}

/// Labels of the contexts of all prompts.
pub(super) struct Labels<'a> {
    pair: &'a Pair,
    rows: &'a [Row],
    predicts: Predicts,
    /// Of each prompt, the contexts whose fork has been followed, with the label.
    known: Vec<BTreeMap<u32, bool>>,
}

impl<'a> Labels<'a> {
    pub(super) fn new(pair: &'a Pair, rows: &'a [Row], predicts: Predicts) -> Self {
        Self { pair, rows, predicts, known: vec![BTreeMap::new(); rows.len()] }
    }

    /// The label of a context that was among the `visited` of [`Labels::follow`].
    pub(super) fn of(&self, explorer: &Explorer<'_>, prompt: usize, node: u32) -> bool {
        match self.predicts {
            Predicts::Divergence => explorer.nodes(prompt)[node as usize].differs(),
            // Without a difference there is no fork and nothing to gain.
            Predicts::Benefit => self.known[prompt].get(&node).copied().unwrap_or(false),
        }
    }

    /// Follows the forks of those contexts of each prompt that are new.
    pub(super) fn follow(&mut self, explorer: &mut Explorer<'_>, visited: &[Vec<u32>]) -> Result<(), LabError> {
        if self.predicts == Predicts::Divergence {
            return Ok(());
        }
        let mut forks = Vec::new();
        for (prompt, nodes) in visited.iter().enumerate() {
            let new = nodes.iter().filter(|node| !self.known[prompt].contains_key(node));
            forks.extend(new.filter(|&&node| explorer.nodes(prompt)[node as usize].differs()).map(|&n| (prompt, n)));
        }
        let cloud_right = self.right(explorer, &forks, |node| node.cloud)?;
        // Where the cloud is wrong as well, the edge's way decides nothing.
        let open: Vec<(usize, u32)> = forks.iter().zip(&cloud_right).filter(|(_, r)| **r).map(|(f, _)| *f).collect();
        let mut edge_right = self.right(explorer, &open, |node| node.edge)?.into_iter();
        for ((prompt, node), cloud_right) in forks.into_iter().zip(cloud_right) {
            let edge_right = cloud_right && edge_right.next().unwrap_or(false);
            let fork = Fork { differs: true, cloud_right, edge_right };
            self.known[prompt].insert(node, fork.label(self.predicts));
        }
        Ok(())
    }

    /// Whether each answer that takes `token` at the context, and then the cloud's, is right.
    fn right(
        &self,
        explorer: &mut Explorer<'_>,
        contexts: &[(usize, u32)],
        token: impl Fn(&Node) -> u32,
    ) -> Result<Vec<bool>, LabError> {
        let branch = |&(prompt, node): &(usize, u32)| {
            let mut begins = explorer.tokens_before(prompt, node);
            begins.push(token(&explorer.nodes(prompt)[node as usize]));
            Branch { prompt, begins }
        };
        let branches: Vec<Branch> = contexts.iter().map(branch).collect();
        let paths = explorer.go_on(&branches, &Rule::Cloud)?;
        let right =
            |(branch, path): (&Branch, &Path)| self.rows[branch.prompt].is_right(&self.pair.text(&path.tokens)?);
        branches.iter().zip(&paths).map(right).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    #[test]
    fn labels_table() {
        // differs, cloud right, edge right → divergence, benefit
        let table = [
            (false, true, true, false, false),
            (false, false, false, false, false),
            (true, true, true, true, false),
            (true, true, false, true, true),
            (true, false, true, true, false),
            (true, false, false, true, false),
        ];
        for (differs, cloud_right, edge_right, divergence, benefit) in table {
            let fork = Fork { differs, cloud_right, edge_right };
            assert_eq!(fork.label(Predicts::Divergence), divergence, "{fork:?}");
            assert_eq!(fork.label(Predicts::Benefit), benefit, "{fork:?}");
        }
    }

    fn row(answer: &str) -> Row {
        let [prompt, category] = ["What?", "add"].map(str::to_owned);
        Row { prompt, answer: answer.into(), category, ..Row::default() }
    }

    #[test]
    fn benefits_need_right_answers() {
        let (known, partly) = ([row("1"), row("2")], [row("1"), row(" ")]);
        assert_eq!(choose(&known, None).unwrap(), Predicts::Benefit);
        assert_eq!(choose(&partly, None).unwrap(), Predicts::Divergence);
        assert_eq!(choose(&known, Some(Predicts::Divergence)).unwrap(), Predicts::Divergence);
        assert_eq!(choose(&partly, Some(Predicts::Divergence)).unwrap(), Predicts::Divergence);
        let error = choose(&partly, Some(Predicts::Benefit)).unwrap_err();
        assert!(matches!(error, LabError::NoAnswer { .. }) && error.to_string().contains("What?"), "{error}");
    }

    /// Each label on the cloud's own paths, against answers that are made from scratch: the edge's
    /// token there and the cloud's from then on.
    #[test]
    fn a_benefit_is_an_answer_that_the_edges_token_spoils() {
        let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/data/calibration.jsonl");
        let rows = crate::questions::read(&data, &crate::questions::ReadOptions::default()).unwrap().0;
        let rows: Vec<Row> = rows.into_iter().filter(|r| r.category == "add" && r.part == "fresh").take(40).collect();
        let pair = Pair::embedded(1).unwrap();
        let prompts: Vec<Vec<u32>> = rows.iter().map(|r| pair.prompt(r).unwrap()).collect();
        let mut explorer = Explorer::new(&pair, prompts.clone());
        let paths = explorer.run(&[Rule::Cloud, Rule::Edge], &Progress::silent()).unwrap();
        let visited: Vec<Vec<u32>> = paths[0].iter().map(|p| p.nodes.clone()).collect();
        let mut labels = Labels::new(&pair, &rows, Predicts::Benefit);
        labels.follow(&mut explorer, &visited).unwrap();
        let right = |prompt: usize, path: &Path| rows[prompt].is_right(&pair.text(&path.tokens).unwrap()).unwrap();
        let (mut gains, mut rescued) = (0, 0);
        for (prompt, path) in paths[0].iter().enumerate() {
            let mut any = false;
            for (at, &node) in path.nodes.iter().enumerate() {
                let label = labels.of(&explorer, prompt, node);
                any |= label;
                let choice = &explorer.nodes(prompt)[node as usize];
                if !choice.differs() {
                    assert!(!label, "prompt {prompt}, token {at}: the models agree");
                    continue;
                }
                let mut begins = path.tokens[..at].to_vec();
                begins.push(choice.edge);
                let mut fresh = Explorer::new(&pair, vec![prompts[prompt].clone()]);
                let spoilt = fresh.go_on(&[Branch { prompt: 0, begins }], &Rule::Cloud).unwrap();
                let expected = right(prompt, path) && !right(prompt, &spoilt[0]);
                assert_eq!(label, expected, "prompt {prompt}, token {at}");
                gains += usize::from(label);
            }
            rescued += usize::from(right(prompt, path) && !right(prompt, &paths[1][prompt]));
            if right(prompt, path) && !right(prompt, &paths[1][prompt]) {
                assert!(any, "prompt {prompt} is rescued by no token");
            }
        }
        assert!(gains >= rescued && rescued > 0, "{gains} gains, {rescued} rescued");
    }
}

//! What a calibration found.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use tandem_router::policy::fit::{auc, brier, calibration_error};
use tandem_router::policy::{Policy, Predicts};

use super::Data;
use super::label::Labels;
use super::threshold::TriedThreshold;
use crate::error::LabError;
use crate::explore::{Explorer, Node, Path, cloud_share};
use crate::pair::{Pair, PairReport};
use crate::questions::DataReport;

/// Bins of the expected calibration error.
const BINS: usize = 15;

/// Ranking and calibration of the scores on held-back problems, over the cloud's own paths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Tokens.
    pub tokens: usize,
    /// Share of tokens on which the models differ, 0 … 1.
    pub differs: f64,
    /// Share of tokens with the label, 0 … 1.
    pub positive: f64,
    /// Area under the ROC curve of the fitted rule.
    pub auc: f32,
    /// The same of the edge's entropy.
    pub auc_entropy: f32,
    /// The same of one minus the edge's top-1 probability.
    pub auc_top1: f32,
    /// Brier score of the fitted rule.
    pub brier: f32,
    /// Expected calibration error over 15 bins of equal count.
    pub calibration_error: f32,
}

impl Measured {
    pub(super) fn all<'p>(
        explorer: &Explorer<'_>,
        paths: impl Iterator<Item = (usize, &'p Path)>,
        policy: &dyn Policy,
        labels: &Labels<'_>,
    ) -> Self {
        let of_path = |(i, path): (usize, &'p Path)| path.nodes.iter().map(move |&at| (i, at));
        let nodes: Vec<(&Node, bool)> = paths
            .flat_map(of_path)
            .map(|(i, at)| (&explorer.nodes(i)[at as usize], labels.of(explorer, i, at)))
            .collect();
        let by = |score: &dyn Fn(&Node) -> f32| nodes.iter().map(|(n, l)| (score(n), *l)).collect::<Vec<_>>();
        let risk = by(&|n| policy.score(&n.features()));
        Self {
            tokens: nodes.len(),
            differs: nodes.iter().filter(|n| n.0.differs()).count() as f64 / nodes.len().max(1) as f64,
            positive: nodes.iter().filter(|n| n.1).count() as f64 / nodes.len().max(1) as f64,
            auc: auc(&risk),
            auc_entropy: auc(&by(&|n| n.entropy)),
            auc_top1: auc(&by(&|n| 1.0 - n.top1)),
            brier: brier(&risk),
            calibration_error: calibration_error(&risk, BINS),
        }
    }
}

/// A rule at the share of the fitted one, on held-back fresh problems.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rival {
    /// The rule.
    pub rule: String,
    /// Its threshold.
    pub threshold: f32,
    /// Share of tokens that the cloud decided, 0 … 1.
    pub share: f64,
    /// Share of answers equal to the cloud's, 0 … 1.
    pub equals_cloud: f64,
    /// Exact match, 0 … 1.
    pub exact_match: f64,
}

impl Rival {
    pub(super) fn of(
        rule: &str,
        threshold: f32,
        pair: &Pair,
        data: &Data<'_>,
        members: &[usize],
        paths: &[Path],
        cloud: &[Path],
    ) -> Result<Self, LabError> {
        let right = data.right(pair, members, paths)?;
        Ok(Self {
            rule: rule.to_owned(),
            threshold,
            share: cloud_share(members.iter().map(|&i| &paths[i])),
            equals_cloud: super::equal_share_of(members, paths, cloud),
            exact_match: right as f64 / members.len().max(1) as f64,
        })
    }
}

/// Exact match on the held-back problems of one part of the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartReport {
    /// The part.
    pub part: String,
    /// Rows.
    pub rows: usize,
    /// Exact match of the edge alone, 0 … 1.
    pub edge: f64,
    /// Of the cloud alone.
    pub cloud: f64,
    /// Of the fitted rule at its threshold.
    pub auto: f64,
    /// Share of tokens that the cloud decided under it.
    pub share: f64,
}

impl PartReport {
    /// `paths` are those of the edge, the cloud and the rule.
    pub(super) fn all(pair: &Pair, data: &Data<'_>, paths: [&Vec<Path>; 3]) -> Result<Vec<Self>, LabError> {
        let mut parts: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for i in data.measured() {
            parts.entry(data.rows[i].part.as_str()).or_default().push(i);
        }
        let mut out = Vec::new();
        for (part, members) in parts {
            let mut right = [0usize; 3];
            for (count, paths) in right.iter_mut().zip(paths) {
                *count = data.right(pair, &members, paths)?;
            }
            let [edge, cloud, auto] = right.map(|n| n as f64 / members.len() as f64);
            let share = cloud_share(members.iter().map(|&i| &paths[2][i]));
            out.push(Self { part: part.to_owned(), rows: members.len(), edge, cloud, auto, share });
        }
        Ok(out)
    }
}

/// What a calibration found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrateReport {
    /// The models.
    pub pair: PairReport,
    /// The files that the rows come from.
    pub data: Vec<DataReport>,
    /// What the rule predicts.
    pub predicts: Predicts,
    /// Rows of the calibration data.
    pub rows: usize,
    /// Of these, held back for measuring.
    pub measured_rows: usize,
    /// Tokens the rule was fitted and calibrated on.
    pub samples: usize,
    /// Epoch that was kept, from 0.
    pub epoch: usize,
    /// τ of the file.
    pub threshold: f32,
    /// Thresholds in the closed loop, largest first.
    pub tried: Vec<TriedThreshold>,
    /// Ranking and calibration.
    pub measured: Measured,
    /// The rule and the baselines at its share.
    pub rivals: Vec<Rival>,
    /// Exact match by part of the data.
    pub parts: Vec<PartReport>,
}

impl CalibrateReport {
    /// As Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let m = &self.measured;
        let mut out = self.pair.markdown();
        out.extend(self.data.iter().map(DataReport::markdown));
        let _ = writeln!(
            out,
            "\nPredicts the {}. Fitted on {} tokens of {} rows; measured on {} rows ({} tokens, models differ on {:.1} %, the label holds on {:.2} %).\n",
            self.predicts.describe(),
            self.samples,
            self.rows - self.measured_rows,
            self.measured_rows,
            m.tokens,
            100.0 * m.differs,
            100.0 * m.positive
        );
        let _ = writeln!(out, "| score | AUC | ECE | Brier |\n|---|---|---|---|");
        let _ = writeln!(out, "| calibrated | {:.4} | {:.4} | {:.4} |", m.auc, m.calibration_error, m.brier);
        let _ = writeln!(
            out,
            "| entropy | {:.4} | | |\n| 1 − top-1 probability | {:.4} | | |\n",
            m.auc_entropy, m.auc_top1
        );
        let _ = writeln!(
            out,
            "| τ | tokens decided by the cloud | gain recovered | answers equal to the cloud's |\n|---|---|---|---|"
        );
        for t in &self.tried {
            let mark = if t.threshold.to_bits() == self.threshold.to_bits() { " (chosen)" } else { "" };
            let (share, equal) = (100.0 * t.share, 100.0 * t.equals_cloud);
            let recovered = t.recovered.map_or_else(|| "–".into(), |r| format!("{:.1} %", 100.0 * r));
            let _ = writeln!(out, "| {:.4}{mark} | {share:.1} % | {recovered} | {equal:.1} % |", t.threshold);
        }
        let _ = writeln!(
            out,
            "\n| rule at equal share | τ | tokens decided by the cloud | answers equal to the cloud's | exact match |\n|---|---|---|---|---|"
        );
        for r in &self.rivals {
            let [share, equal, hit] = [r.share, r.equals_cloud, r.exact_match].map(|x| 100.0 * x);
            let _ = writeln!(out, "| {} | {:.4} | {share:.1} % | {equal:.1} % | {hit:.1} % |", r.rule, r.threshold);
        }
        let _ = writeln!(
            out,
            "\n| part | rows | edge | cloud | auto | tokens decided by the cloud |\n|---|---|---|---|---|---|"
        );
        for p in &self.parts {
            let [edge, cloud, auto, share] = [p.edge, p.cloud, p.auto, p.share].map(|x| 100.0 * x);
            let _ =
                writeln!(out, "| {} | {} | {edge:.1} % | {cloud:.1} % | {auto:.1} % | {share:.1} % |", p.part, p.rows);
        }
        out
    }
}

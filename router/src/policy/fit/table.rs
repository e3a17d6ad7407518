//! What thresholds cost and buy, from scored requests.

use super::Quality;
use crate::policy::{OperatingPoint, file::OPERATING_POINTS_MAX};

/// A request whose tokens were scored and judged.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ScoredRequest {
    /// (score, true if the token has what the score predicts), token by token.
    pub tokens: Vec<(f32, bool)>,
}

/// The table for a policy file: at most `rows` thresholds, spread over the escalated share. A
/// request counts as wrong at τ if a token of it that stays (score ≤ τ) has what the score predicts.
///
/// This replays recorded drafts: after the first correction a live request goes on differently, so
/// confirm the point chosen in a live run on other prompts.
#[must_use]
pub fn operating_points(requests: &[ScoredRequest], rows: usize) -> Quality {
    let rows = rows.clamp(2, OPERATING_POINTS_MAX);
    let mut scores: Vec<f32> = requests.iter().flat_map(|request| &request.tokens).map(|(score, _)| *score).collect();
    scores.sort_by(f32::total_cmp);
    // The request is wrong from the least score of its wrong tokens on.
    let wrong_from = |request: &ScoredRequest| {
        request.tokens.iter().filter(|(_, label)| *label).map(|(score, _)| *score).min_by(f32::total_cmp)
    };
    let mut wrong: Vec<f32> = requests.iter().filter_map(wrong_from).collect();
    wrong.sort_by(f32::total_cmp);

    let all = scores.len().max(1) as f32;
    let of = requests.len().max(1) as f32;
    let mut thresholds: Vec<f32> = (0..rows)
        .filter_map(|row| scores.get(row * scores.len().saturating_sub(1) / (rows - 1)))
        .map(|score| score.clamp(0.0, 1.0))
        .chain([1.0])
        .collect();
    thresholds.dedup();
    thresholds.truncate(OPERATING_POINTS_MAX);
    let points = thresholds.into_iter().map(|threshold| OperatingPoint {
        threshold,
        escalated_share: (scores.len() - scores.partition_point(|score| *score <= threshold)) as f32 / all,
        risk: wrong.partition_point(|score| *score <= threshold) as f32 / of,
    });
    Quality { requests: requests.len() as u32, edge_risk: wrong.len() as f32 / of, points: points.collect() }
}

//! Rules compared at equal cost: the threshold at which a rule asks the cloud as often as another.

use std::sync::Arc;

use tandem_router::policy::Policy;

use crate::error::LabError;
use crate::explore::{Explorer, Path, Rule, cloud_share};
use crate::progress::Progress;

/// Halvings of the interval in which the threshold lies.
pub(crate) const HALVINGS: usize = 9;

/// The score that a share of `share` of the scores is above; 1 of none.
pub(crate) fn quantile(scores: &mut [f32], share: f64) -> f32 {
    scores.sort_by(f32::total_cmp);
    let at = ((1.0 - share.clamp(0.0, 1.0)) * scores.len() as f64) as usize;
    scores.get(at.min(scores.len().saturating_sub(1))).copied().unwrap_or(1.0)
}

/// Scores of a policy over the contexts of `paths`, which are those of the prompts `members`.
pub(crate) fn scores(explorer: &Explorer<'_>, members: &[usize], paths: &[Path], policy: &dyn Policy) -> Vec<f32> {
    let nodes = members.iter().flat_map(|&i| paths[i].nodes.iter().map(move |&at| &explorer.nodes(i)[at as usize]));
    nodes.map(|node| policy.score(&node.features())).collect()
}

/// The threshold at which the share of `policy` over `members` comes closest to `share` from below,
/// with the paths of all prompts. `cloud` are the cloud's own paths.
pub(crate) fn at_share(
    explorer: &mut Explorer<'_>,
    members: &[usize],
    policy: &Arc<dyn Policy>,
    cloud: &[Path],
    share: f64,
    progress: &Progress,
) -> Result<(f32, Vec<Path>), LabError> {
    let mut scores = scores(explorer, members, cloud, &**policy);
    // What a replay of the cloud's paths says is near, not equal to, what the rule's own paths say.
    let (mut least, mut most) = (share * 0.5, (share * 1.6).min(1.0));
    let mut best: Option<(f32, Vec<Path>)> = None;
    for _ in 0..HALVINGS {
        let asked = f64::midpoint(least, most);
        let threshold = quantile(&mut scores, asked);
        let paths = explorer.run(&[Rule::Policy(policy.clone(), threshold)], progress)?.pop().unwrap_or_default();
        if cloud_share(members.iter().map(|&i| &paths[i])) <= share {
            least = asked;
            best = Some((threshold, paths));
        } else {
            most = asked;
        }
    }
    match best {
        Some(found) => Ok(found),
        None => Ok((f32::INFINITY, explorer.run(&[Rule::Edge], progress)?.pop().unwrap_or_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn a_quantile_leaves_its_share_above() {
        let mut scores: Vec<f32> = (0..100).map(|i| i as f32 / 100.0).collect();
        for share in [0.01, 0.1, 0.5] {
            let t = quantile(&mut scores, share);
            let above = scores.iter().filter(|s| **s > t).count();
            assert!(above.abs_diff((share * 100.0) as usize) <= 1, "{share}: {above}");
        }
        assert_eq!(quantile(&mut [], 0.1), 1.0);
    }
}

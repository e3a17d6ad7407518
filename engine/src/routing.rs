//! Which experts a token goes to: a pure function of its router scores (DeepSeek-V3's rule).

use crate::spec::ExpertsSpec;

/// One chosen expert and the weight of its output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) expert: usize,
    pub(crate) weight: f32,
}

/// Chooses experts for one token. `scores` are the logistic scores; the correction `bias` decides
/// who is chosen but not the weights. Ties go to the lower index; the result is ordered by expert,
/// so that sums over it have one order.
pub(crate) fn choose(spec: &ExpertsSpec, scores: &[f32], bias: &[f32]) -> Vec<Choice> {
    let biased: Vec<f32> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    let group = spec.experts / spec.groups;
    let mut open = vec![true; spec.experts];
    if spec.groups_chosen < spec.groups {
        // A group is worth the sum of its two best experts.
        let worth: Vec<f32> = biased
            .chunks(group)
            .map(|g| {
                let best = top(g, 2);
                best.iter().map(|&i| g[i]).sum()
            })
            .collect();
        open.fill(false);
        for g in top(&worth, spec.groups_chosen) {
            open[g * group..(g + 1) * group].fill(true);
        }
    }
    let masked: Vec<f32> = biased.iter().zip(&open).map(|(&v, &o)| if o { v } else { f32::NEG_INFINITY }).collect();
    let mut chosen = top(&masked, spec.chosen);
    chosen.sort_unstable();
    let mut sum = 1e-20f32;
    for &e in &chosen {
        sum += scores[e];
    }
    let weight = |e: usize| if spec.normalise { scores[e] / sum * spec.scale } else { scores[e] * spec.scale };
    chosen.into_iter().map(|expert| Choice { expert, weight: weight(expert) }).collect()
}

/// Indices of the `n` largest values, largest first, ties to the lower index.
fn top(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(n);
    order
}

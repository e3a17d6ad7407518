//! Which experts a token goes to: a pure function of its router scores.

use crate::checkpoint::spec::{ExpertsSpec, Gate, GroupWorth};

/// One chosen expert and the weight of its output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) expert: usize,
    pub(crate) weight: f32,
}

/// Chooses experts for one token. `scores` are as the spec's gate makes them (logistic, softmax or
/// raw). A correction `bias` (may be empty) decides who is chosen but not the weights. Ties go to the
/// lower index; the result is ordered by expert, so that sums over it have one order.
pub(crate) fn choose(spec: &ExpertsSpec, scores: &[f32], bias: &[f32]) -> Vec<Choice> {
    let mut biased = scores.to_vec();
    biased.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
    let group = spec.experts / spec.groups;
    let mut open = vec![true; spec.experts];
    if spec.groups_chosen < spec.groups {
        let best_of = match spec.group_worth {
            GroupWorth::Best => 1,
            GroupWorth::TwoBest => 2,
        };
        let worth = |g: &[f32]| top(g, best_of).iter().map(|&i| g[i]).sum();
        let worth: Vec<f32> = biased.chunks(group).map(worth).collect();
        open.fill(false);
        for g in top(&worth, spec.groups_chosen) {
            open[g * group..(g + 1) * group].fill(true);
        }
    }
    let masked: Vec<f32> = biased.iter().zip(&open).map(|(&v, &o)| if o { v } else { f32::NEG_INFINITY }).collect();
    let mut chosen = top(&masked, spec.chosen);
    let best = chosen.first().map_or(0.0, |&e| scores[e]);
    chosen.sort_unstable();
    let worth = |e: usize| match spec.gate {
        Gate::Sigmoid | Gate::Softmax => scores[e],
        Gate::SoftmaxOfChosen => libm::expf(scores[e] - best),
    };
    let normalise = spec.normalise || spec.gate == Gate::SoftmaxOfChosen;
    let mut sum = 1e-20f32;
    for &e in &chosen {
        sum += worth(e);
    }
    let weight = |e: usize| if normalise { worth(e) / sum * spec.scale } else { worth(e) * spec.scale };
    chosen.into_iter().map(|expert| Choice { expert, weight: weight(expert) }).collect()
}

/// Indices of the `n` largest values, largest first, ties to the lower index.
fn top(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(n);
    order
}

#[cfg(test)]
mod tests {
    use super::{Choice, choose};
    use crate::checkpoint::spec::{ExpertsSpec, Gate, GroupWorth};

    fn spec() -> ExpertsSpec {
        let mut spec = ExpertsSpec::plain(8, 2, 1);
        (spec.gate, spec.group_worth, spec.normalise) = (Gate::Sigmoid, GroupWorth::TwoBest, false);
        spec
    }

    fn experts(c: &[Choice]) -> Vec<usize> {
        c.iter().map(|c| c.expert).collect()
    }

    #[test]
    fn table() {
        let scores = [0.1, 0.9, 0.2, 0.3, 0.8, 0.75, 0.1, 0.05];
        let none = [0.0; 8];
        assert_eq!(experts(&choose(&spec(), &scores, &none)), [1, 4]);
        // The bias decides who is chosen, not with what weight.
        let bias = [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let c = choose(&spec(), &scores, &bias);
        assert_eq!(c, [Choice { expert: 0, weight: 0.1 }, Choice { expert: 4, weight: 0.8 }]);
        // Groups of two: worth 1.0, 0.5, 1.55, 0.15; the best two keep experts 0, 1, 4, 5.
        let grouped = ExpertsSpec { groups: 4, groups_chosen: 2, chosen: 3, ..spec() };
        assert_eq!(experts(&choose(&grouped, &scores, &none)), [1, 4, 5]);
        let one = ExpertsSpec { groups_chosen: 1, chosen: 2, ..grouped };
        assert_eq!(experts(&choose(&one, &scores, &none)), [4, 5]);
        // A closed group stays closed even if what is open is worth less than nothing.
        let low = [-5.0; 8];
        assert_eq!(experts(&choose(&one, &scores, &low)), [4, 5]);
        let c = choose(&ExpertsSpec { normalise: true, scale: 1.5, ..spec() }, &scores, &none);
        assert!((c[0].weight - 0.9 / 1.7 * 1.5).abs() < 1e-6 && (c[1].weight - 0.8 / 1.7 * 1.5).abs() < 1e-6);
        // By its best expert, the first group wins.
        let best = ExpertsSpec { groups: 4, groups_chosen: 1, group_worth: GroupWorth::Best, ..spec() };
        assert_eq!(experts(&choose(&best, &scores, &none)), [0, 1]);
        // Softmax over the chosen only.
        let c = choose(
            &ExpertsSpec { gate: Gate::SoftmaxOfChosen, ..spec() },
            &[-1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[],
        );
        assert_eq!(experts(&c), [1, 2]);
        assert!((c[0].weight - 0.731_058_6).abs() < 1e-6 && (c[1].weight - 0.268_941_4).abs() < 1e-6);
        // Ties go to the lower index; NaN neither panics nor loses an expert.
        assert_eq!(experts(&choose(&spec(), &[0.5; 8], &none)), [0, 1]);
        assert_eq!(choose(&spec(), &[f32::NAN; 8], &none).len(), 2);
    }
}

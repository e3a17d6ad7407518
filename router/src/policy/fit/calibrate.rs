//! From scores that only rank to calibrated probabilities.

use crate::policy::calibrated::sigmoid;

/// Most knots that a fit writes; far below what a file may hold.
const KNOTS: usize = 256;

/// Scores that were pooled: their mean, their labels' sum, how many.
#[derive(Clone, Copy)]
struct Pool {
    score: f64,
    positive: f64,
    count: f64,
}

impl Pool {
    fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        let score = (self.score * self.count + other.score * other.count) / count;
        Self { score, positive: self.positive + other.positive, count }
    }

    fn rate(self) -> f64 {
        self.positive / self.count
    }
}

/// Isotonic regression by pooling adjacent violators: knots of (score, probability), both rising.
/// `scored` are (score in 0..=1, label), in any order. Each pool counts half a positive and half a
/// negative more, so that nothing is certain.
#[must_use]
pub fn isotonic(scored: &[(f32, bool)]) -> Vec<[f32; 2]> {
    let mut sorted = scored.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut pools: Vec<Pool> = Vec::new();
    // Equal scores must end in one pool.
    for group in sorted.chunk_by(|a, b| a.0 == b.0) {
        let positive = group.iter().filter(|(_, label)| *label).count() as f64;
        pools.push(Pool { score: f64::from(group[0].0), positive, count: group.len() as f64 });
        pool_violators(&mut pools);
    }
    while pools.len() > KNOTS {
        pools = pools.chunks(2).map(|pair| pair.iter().copied().reduce(Pool::merge).unwrap_or(pair[0])).collect();
    }
    let mut knots: Vec<[f32; 2]> = Vec::with_capacity(pools.len());
    for pool in pools {
        let smoothed = ((pool.positive + 0.5) / (pool.count + 1.0)) as f32;
        let score = (pool.score as f32).clamp(0.0, 1.0);
        match knots.last_mut() {
            // Two means that round to one f32: keep the higher probability.
            Some([last, p]) if *last >= score => *p = p.max(smoothed),
            // Smoothing may turn small pools around.
            Some([_, p]) => {
                let p = p.max(smoothed);
                knots.push([score, p]);
            }
            None => knots.push([score, smoothed]),
        }
    }
    knots
}

fn pool_violators(pools: &mut Vec<Pool>) {
    while let [.., before, last] = pools.as_slice() {
        if before.rate() < last.rate() {
            return;
        }
        let merged = before.merge(*last);
        pools.truncate(pools.len() - 2);
        pools.push(merged);
    }
}

/// Platt scaling: (slope, offset) of sigmoid(slope · logit + offset) with the least log loss, by
/// Newton's method with Platt's smoothed targets. The slope is kept above 0: a calibration must
/// not turn the ranking around.
#[must_use]
pub fn platt(logits: &[f32], labels: &[bool]) -> (f32, f32) {
    let positive = labels.iter().filter(|label| **label).count() as f64;
    let negative = labels.len() as f64 - positive;
    let (high, low) = ((positive + 1.0) / (positive + 2.0), 1.0 / (negative + 2.0));
    let (mut slope, mut offset) = (1.0f64, 0.0f64);
    for _ in 0..50 {
        // Gradient and Hessian; the small ridge keeps the system solvable for constant logits.
        let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, 1e-6, 0.0, 1e-6);
        for (logit, label) in logits.iter().zip(labels) {
            let z = f64::from(*logit);
            let p = f64::from(sigmoid((slope * z + offset) as f32));
            let error = p - if *label { high } else { low };
            let weight = p * (1.0 - p);
            ga += error * z;
            gb += error;
            haa += weight * z * z;
            hab += weight * z;
            hbb += weight;
        }
        let determinant = haa * hbb - hab * hab;
        if determinant.abs() < 1e-12 {
            break;
        }
        // Half a step at most of 4 logits: far from the optimum the quadratic model overshoots.
        let da = ((hbb * ga - hab * gb) / determinant).clamp(-2.0, 2.0);
        let db = ((haa * gb - hab * ga) / determinant).clamp(-2.0, 2.0);
        slope = (slope - da).max(1e-3);
        offset -= db;
        if da.abs() + db.abs() < 1e-7 {
            break;
        }
    }
    (slope as f32, offset as f32)
}

//! Tables of rotary position embedding. Angles are taken in f64 with `libm`, so that the tables are
//! the same numbers on every machine.

use crate::spec::{Rope, RopeScaling};

/// Positions computed at a time.
const GROW: usize = 512;

/// Cosines and sines `[position][dim / 2]`, grown on demand.
pub(crate) struct RopeTable {
    pub(crate) interleaved: bool,
    frequencies: Vec<f64>,
    positions: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    pub(crate) fn new(rope: &Rope, dim: usize) -> Self {
        let frequencies = (0..dim / 2).map(|i| frequency(rope, i, dim)).collect();
        Self { interleaved: rope.interleaved, frequencies, positions: 0, cos: Vec::new(), sin: Vec::new() }
    }

    /// Makes sure the table covers `positions` positions.
    pub(crate) fn cover(&mut self, positions: usize) {
        if positions <= self.positions {
            return;
        }
        let to = positions.next_multiple_of(GROW);
        for p in self.positions..to {
            for f in &self.frequencies {
                let (sin, cos) = libm::sincos(p as f64 * f);
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
        self.positions = to;
    }

    /// Cosines and sines of a covered position.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let n = self.frequencies.len();
        let range = position * n..(position + 1) * n;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

fn frequency(rope: &Rope, i: usize, dim: usize) -> f64 {
    let f = libm::pow(f64::from(rope.theta), -((2 * i) as f64) / dim as f64);
    match rope.scaling {
        RopeScaling::None => f,
        RopeScaling::Linear { factor } => f / f64::from(factor),
        RopeScaling::Llama3 { factor, low, high, original } => {
            let (factor, low, high) = (f64::from(factor), f64::from(low), f64::from(high));
            let turns = f64::from(original) * f / (2.0 * std::f64::consts::PI);
            if turns < low {
                f / factor
            } else if turns > high {
                f
            } else {
                let keep = (turns - low) / (high - low);
                (1.0 - keep) * f / factor + keep * f
            }
        }
    }
}

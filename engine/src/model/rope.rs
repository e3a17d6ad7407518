//! Tables of rotary position embedding. Angles are taken in f64 with `libm`, so that the tables are
//! the same numbers on every machine.

use crate::checkpoint::spec::Rope;

/// Positions computed at a time.
const GROW: usize = 512;

/// Cosines and sines `[position][dim / 2]`, grown on demand.
pub(crate) struct RopeTable {
    pub(crate) interleaved: bool,
    frequencies: Vec<f64>,
    magnitude: f64,
    positions: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    pub(crate) fn new(rope: &Rope, dim: usize) -> Self {
        Self {
            interleaved: rope.interleaved,
            frequencies: (0..dim / 2).map(|i| rope.frequency(i, dim)).collect(),
            magnitude: rope.scaling.magnitude(),
            positions: 0,
            cos: Vec::new(),
            sin: Vec::new(),
        }
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
                self.cos.push((cos * self.magnitude) as f32);
                self.sin.push((sin * self.magnitude) as f32);
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

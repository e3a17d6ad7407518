//! What a pass costs by its number of rows, as measured. Pure: times are numbers passed in.
//!
//! A pass of one row reads all weights; more rows share that, and from some number on each costs its own
//! arithmetic. Where that begins depends on the model, the kernels, the machine and what else it does, so
//! the curve is measured: a point per power of two, interpolated.

/// Points of the curve: one for each power of two up to `usize::MAX`.
const POINTS: usize = usize::BITS as usize;
/// Weight of a new measurement in its point.
const GAIN: f64 = 0.25;
/// A measurement counts for at most so many times its point: a pass that lost its core says little.
const OUTLIER: f64 = 4.0;

#[derive(Clone, Copy, Debug)]
struct Point {
    rows: f64,
    us: f64,
    /// Passes noted when it was last measured.
    at: u64,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct PassTimes {
    points: [Option<Point>; POINTS],
    passes: u64,
}

impl Default for PassTimes {
    fn default() -> Self {
        Self { points: [None; POINTS], passes: 0 }
    }
}

fn index(rows: usize) -> usize {
    rows.max(1).ilog2() as usize
}

impl PassTimes {
    /// A pass of `rows` rows took `us` microseconds.
    pub fn note(&mut self, rows: usize, us: u64) {
        self.passes += 1;
        let (rows_now, us_now) = (rows.max(1) as f64, us as f64);
        let point = &mut self.points[index(rows)];
        let old = point.unwrap_or(Point { rows: rows_now, us: us_now, at: 0 });
        let us_now = us_now.min(old.us * OUTLIER);
        *point = Some(Point {
            rows: old.rows + GAIN * (rows_now - old.rows),
            us: old.us + GAIN * (us_now - old.us),
            at: self.passes,
        });
    }

    /// What a pass of `rows` rows takes, microseconds; none before the first measurement.
    #[must_use]
    pub fn estimate_us(&self, rows: usize) -> Option<f64> {
        let wanted = rows.max(1) as f64;
        let smaller = || self.points.iter().flatten().take_while(|p| p.rows <= wanted);
        let larger = self.points.iter().flatten().find(|p| p.rows > wanted);
        // `n` passes of a row do what a pass of `n` rows does, so it takes no longer. That also bounds what
        // an old measurement can say of a size that has not been tried since.
        let most = smaller().map(|p| p.us * wanted / p.rows).reduce(f64::min);
        let between = match (smaller().last(), larger) {
            (Some(s), Some(l)) => Some(s.us + (wanted - s.rows) / (l.rows - s.rows) * (l.us - s.us)),
            (None, Some(l)) => Some(l.us),
            (_, None) => None,
        };
        between.into_iter().chain(most).reduce(f64::min)
    }

    /// Passes since one of about `rows` rows was measured; none if there was none.
    #[must_use]
    pub fn age(&self, rows: usize) -> Option<u64> {
        self.points[index(rows)].map(|p| self.passes - p.at)
    }

    /// Most rows up to `most` that a pass can have beside `beside` others within `budget_us`.
    #[must_use]
    pub fn rows_within(&self, budget_us: f64, beside: usize, most: usize) -> usize {
        let fits = |rows: usize| self.estimate_us(beside + rows).is_some_and(|us| us <= budget_us);
        // The largest that fits lies between `low`, which does, and `high`, which does not.
        let (mut low, mut high) = (0, most + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            *(if fits(middle) { &mut low } else { &mut high }) = middle;
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes that take `fixed + rows * per_row`, a few of each size.
    fn measured(sizes: &[usize], fixed: u64, per_row: u64) -> PassTimes {
        let mut times = PassTimes::default();
        for &rows in sizes {
            (0..8).for_each(|_| times.note(rows, fixed + per_row * rows as u64));
        }
        times
    }

    #[test]
    fn the_curve_is_interpolated_and_bounded() {
        let times = measured(&[1, 8, 128], 900, 100);
        // (rows, microseconds): measured points, between them, and past them no more than in proportion.
        let table = [(1, 1000), (8, 1700), (4, 1300), (68, 7700), (128, 13700), (256, 27400)];
        for (rows, us) in table {
            assert_eq!(times.estimate_us(rows).map(f64::round), Some(f64::from(us)), "{rows} rows");
        }
        assert_eq!(PassTimes::default().estimate_us(1), None);
        // Nothing smaller was measured.
        assert_eq!(measured(&[128], 900, 100).estimate_us(1), Some(13_700.0));
        let within = [(500.0, 0), (1000.0, 0), (1700.0, 7), (7700.0, 67), (1e9, 200)];
        for (budget, rows) in within {
            assert_eq!(times.rows_within(budget, 1, 200), rows, "within {budget} µs beside a row");
        }
    }

    #[test]
    fn a_hiccup_and_an_old_slow_time_are_got_over() {
        let mut times = measured(&[1, 16, 128], 900, 100);
        times.note(16, 1_000_000);
        let hurt = times.estimate_us(16).unwrap_or(f64::MAX);
        assert!(hurt < 5000.0, "{hurt}");
        // All sizes were slow once; sixteen rows have not been tried since a row is fast again.
        let mut times = measured(&[1, 16], 90_000, 10_000);
        (0..40).for_each(|_| times.note(1, 1000));
        assert!(times.estimate_us(16).unwrap_or(f64::MAX) <= 16_200.0, "{:?}", times.estimate_us(16));
        assert_eq!((times.age(1), times.age(16), times.age(4)), (Some(0), Some(40), None));
    }
}

//! How many rows of prompts a pass may have beside sequences that decode. A pure function: no clock, no
//! model; times are measured by others and passed in.
//!
//! A stream of tokens gets one per pass. Alone, a token takes it the pass and the turnaround: the time from
//! a result to the sequence's next job. Rows of a prompt lengthen the pass, so they get what keeps the
//! whole within [`SLOWDOWN`] times that. Between a result and the next job the stream has no job at all;
//! a chunk that began then would hold it up unseen. So streams are remembered for a while, and where the
//! turnaround is shorter than a pass of a prompt's own would be, the next job is waited for: one pass with
//! both reads the weights once.

use super::pass_times::PassTimes;

/// How many times as long as alone a stream's token may take beside a prompt. The promise is three; the
/// rest is for what is not foreseen: the prompt's tokenization, a thread that loses its core.
pub const SLOWDOWN: f64 = 2.0;
/// After so many passes a pass goes without prompts where the time of the streams' own is out of date.
const REFERENCE_PASSES: u64 = 64;

/// A sequence that decodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    /// Usual time from a result to the next job, microseconds.
    pub turnaround_us: f64,
    /// Time since the last result, microseconds; none while a job of it waits.
    pub since_us: Option<f64>,
}

/// What the next pass may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowance {
    /// Feed at most so many rows of prompts.
    Rows(usize),
    /// Look again when a job has come, or after so many microseconds.
    Wait(u64),
}

/// Decides on the next pass, in which `decisions` rows of streams and others wait, and at most `rows_left`
/// rows of prompts could be fed.
#[must_use]
pub fn allowance(times: &PassTimes, streams: &[Stream], decisions: usize, rows_left: usize) -> Allowance {
    let own = decisions.max(1);
    let Some(quickest) = streams.iter().map(|s| s.turnaround_us).reduce(f64::min).filter(|_| rows_left > 0) else {
        return Allowance::Rows(rows_left);
    };
    if decisions > 0 && times.age(own).is_none_or(|age| age >= REFERENCE_PASSES) {
        return Allowance::Rows(0);
    }
    let Some(pass_us) = times.estimate_us(own) else { return Allowance::Rows(1) };
    let alone_us = pass_us + quickest;
    if decisions > 0 {
        let budget = SLOWDOWN * alone_us - quickest;
        return Allowance::Rows(times.rows_within(budget, decisions, rows_left).max(1));
    }
    // All streams are between two jobs. Waiting pays up to what a pass by itself costs.
    let soon = streams.iter().filter(|s| s.turnaround_us < pass_us);
    let wait_us = soon.filter_map(|s| Some(pass_us - s.since_us?)).fold(0.0, f64::max);
    if wait_us >= 1.0 {
        return Allowance::Wait(wait_us as u64);
    }
    // The stream may come at the start of this pass, and has another one with rows of prompts before it.
    let budget = (SLOWDOWN - 1.0) / 2.0 * alone_us;
    Allowance::Rows(times.rows_within(budget, 0, rows_left).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass takes 900 µs and 100 µs a row.
    fn times() -> PassTimes {
        let mut times = PassTimes::default();
        [1, 2, 4, 8, 16, 32, 64, 128, 256].into_iter().for_each(|rows| times.note(rows, 900 + 100 * rows as u64));
        times
    }

    fn stream(turnaround_us: f64, since_us: Option<f64>) -> Stream {
        Stream { turnaround_us, since_us }
    }

    #[test]
    fn a_prompt_gets_what_the_streams_beside_it_leave() {
        use Allowance::{Rows, Wait};
        let waits = |turnaround| stream(turnaround, None);
        let away = |turnaround, since| stream(turnaround, Some(since));
        // (streams, rows of decisions, rows left, allowance)
        let table: [(&[Stream], usize, usize, Allowance); 13] = [
            (&[], 0, 256, Rows(256)),
            // A decision, but no stream: such as a short prompt's last rows.
            (&[], 1, 256, Rows(256)),
            // Twice 1000 µs leave 1000 for rows of 100.
            (&[waits(0.0)], 1, 256, Rows(10)),
            (&[waits(0.0)], 1, 4, Rows(4)),
            // A turnaround counts as the stream's own time: 2 * 1200 - 200 = 2200.
            (&[waits(200.0)], 1, 256, Rows(12)),
            // The quickest stream sets the pace; two rows take 1100 µs.
            (&[waits(200.0), waits(50_000.0)], 2, 256, Rows(13)),
            // An edge far away does not notice.
            (&[waits(50_000.0)], 1, 256, Rows(256)),
            // The stream's next job is near ...
            (&[away(100.0, 40.0)], 0, 256, Wait(960)),
            (&[away(100.0, 40.0), away(9000.0, 10.0)], 0, 256, Wait(960)),
            // ... or late: a pass of the prompt's own begins, of which the stream may feel all.
            (&[away(100.0, 1200.0)], 0, 256, Rows(1)),
            (&[away(3000.0, 100.0)], 0, 256, Rows(11)),
            (&[away(100.0, 40.0)], 0, 0, Rows(0)),
            // Decisions wait: the pass is not delayed for a job that may come.
            (&[away(100.0, 40.0), waits(100.0)], 1, 256, Rows(11)),
        ];
        for (streams, decisions, rows_left, expected) in table {
            let got = allowance(&times(), streams, decisions, rows_left);
            assert_eq!(got, expected, "{streams:?}, {decisions} decisions, {rows_left} rows left");
        }
    }

    /// What a stream takes alone is measured before and while prompts come, or it would be taken for what
    /// it takes beside them.
    #[test]
    fn the_streams_own_pass_is_measured_now_and_then() {
        let streams = [stream(0.0, None)];
        let mut times = PassTimes::default();
        assert_eq!(allowance(&times, &streams, 1, 256), Allowance::Rows(0));
        times.note(1, 1000);
        // Two rows cost at most twice as much as one.
        assert_eq!(allowance(&times, &streams, 1, 256), Allowance::Rows(1));
        let mut alone = 0;
        for _ in 0..1000 {
            let Allowance::Rows(rows) = allowance(&times, &streams, 1, 256) else { panic!("a decision waits") };
            alone += usize::from(rows == 0);
            times.note(1 + rows, 900 + 100 * (1 + rows as u64));
        }
        assert!((10..=20).contains(&alone), "{alone} of 1000 passes");
        // However the clock misleads, a prompt gets on: 64 passes, then at least a row.
        times.note(128, 0);
        let rows: usize = (0..65).fold(0, |fed, _| match allowance(&times, &streams, 1, 256) {
            Allowance::Rows(rows) => {
                times.note(1 + rows, 0);
                fed + rows
            }
            Allowance::Wait(_) => fed,
        });
        assert!(rows > 0);
    }
}

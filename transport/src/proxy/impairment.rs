//! The fate of a packet on one direction of a link. Pure: time and randomness are passed in.

use std::time::Duration;

/// Longest queue before a link of limited rate, as time; longer is overflow (drop-tail).
pub const QUEUE_DELAY_MAX: Duration = Duration::from_millis(200);
/// A packet that is reordered comes up to this much later than its turn.
pub const REORDER_DELAY_MAX: Duration = Duration::from_millis(10);

/// How bad a link is, in both directions alike. `Faults::default()` changes nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Faults {
    /// False: every packet is lost.
    pub on: bool,
    /// One-way delay: half of the round-trip time.
    pub delay: Duration,
    /// Up to this much is added to each packet's delay; order is kept.
    pub jitter: Duration,
    /// Probability that a packet is lost, 0 to 1.
    pub loss: f64,
    /// Probability that a packet is held back past its successors, 0 to 1.
    pub reorder: f64,
    /// Probability that a packet arrives twice, 0 to 1.
    pub duplicate: f64,
    /// Rate of the link, bytes per second; `None` for no limit.
    pub bytes_per_s: Option<u64>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            on: true,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            reorder: 0.0,
            duplicate: 0.0,
            bytes_per_s: None,
        }
    }
}

impl Faults {
    /// A link with this round-trip time and nothing else.
    #[must_use]
    pub fn rtt(rtt: Duration) -> Self {
        Self { delay: rtt / 2, ..Self::default() }
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Lost by chance, or the link is off.
    Lost,
    /// The queue before the link is full.
    Overflowed,
    /// Arrives.
    Arrives {
        /// When, microseconds.
        at_us: u64,
        /// When a second copy arrives, if any.
        copy_at_us: Option<u64>,
        /// Held back past its successors.
        reordered: bool,
    },
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// One direction of a link.
#[derive(Debug)]
pub struct Impairment {
    rng: fastrand::Rng,
    /// When the last bit of the queue leaves.
    free_at_us: u64,
    /// Arrival of the last packet in order.
    last_arrival_us: u64,
}

impl Impairment {
    /// The same seed and packets give the same fates.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed), free_at_us: 0, last_arrival_us: 0 }
    }

    /// Decides over a packet of `len` bytes that enters at `now_us`.
    pub fn judge(&mut self, faults: &Faults, now_us: u64, len: usize) -> Fate {
        // Every packet draws the same numbers, whatever the faults are: switching one fault on does
        // not change the others' fates.
        let [loss, reorder, duplicate, jitter, hold] = std::array::from_fn(|_| self.rng.f64());
        if !faults.on || loss < faults.loss {
            return Fate::Lost;
        }
        let mut leaves_us = now_us;
        if let Some(rate) = faults.bytes_per_s {
            let starts_us = self.free_at_us.max(now_us);
            // At a trickle a single packet may take longer than the whole queue; it still goes.
            if starts_us - now_us > micros(QUEUE_DELAY_MAX) {
                return Fate::Overflowed;
            }
            let takes_us = (len as u64).saturating_mul(1_000_000) / rate.max(1);
            leaves_us = starts_us.saturating_add(takes_us);
            self.free_at_us = leaves_us;
        }
        let jitter_us = (micros(faults.jitter) as f64 * jitter) as u64;
        let in_turn_us = leaves_us.saturating_add(micros(faults.delay)).saturating_add(jitter_us);
        let reordered = reorder < faults.reorder;
        let at_us = if reordered {
            in_turn_us + 1 + (micros(REORDER_DELAY_MAX) as f64 * hold) as u64
        } else {
            self.last_arrival_us = self.last_arrival_us.max(in_turn_us);
            self.last_arrival_us
        };
        let copy_at_us = (duplicate < faults.duplicate).then_some(at_us + 1);
        Fate::Arrives { at_us, copy_at_us, reordered }
    }
}

#[cfg(test)]
mod tests;

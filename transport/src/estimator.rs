//! Estimators of a link: round-trip time and goodput. Pure: time is passed in, microseconds.

/// How long a minimum RTT counts, microseconds: a path may change under a link.
pub const MIN_RTT_WINDOW_US: u64 = 10_000_000;
/// Fewest bytes that make a goodput sample; less is dominated by latency.
pub const SAMPLE_BYTES_MIN: u64 = 64 * 1024;
/// Weight of a new goodput sample.
const GOODPUT_GAIN: f64 = 0.25;

/// Round-trip time: windowed minimum, smoothed mean and mean deviation (RFC 6298 gains).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rtt {
    smoothed_us: f64,
    deviation_us: f64,
    window_start_us: u64,
    window_min_us: Option<u64>,
    previous_min_us: Option<u64>,
}

impl Rtt {
    /// Takes a sample seen at `now_us`.
    pub fn observe(&mut self, now_us: u64, sample_us: u64) {
        let sample = sample_us as f64;
        if self.min_us().is_none() {
            self.smoothed_us = sample;
            self.deviation_us = sample / 2.0;
        } else {
            self.deviation_us += ((self.smoothed_us - sample).abs() - self.deviation_us) / 4.0;
            self.smoothed_us += (sample - self.smoothed_us) / 8.0;
        }
        let age = now_us.saturating_sub(self.window_start_us);
        if age >= MIN_RTT_WINDOW_US {
            let stale = age >= 2 * MIN_RTT_WINDOW_US;
            self.previous_min_us = if stale { None } else { self.window_min_us };
            self.window_min_us = None;
            self.window_start_us = now_us;
        }
        let min = self.window_min_us.map_or(sample_us, |min| min.min(sample_us));
        self.window_min_us = Some(min);
    }

    /// Smallest sample of the last one to two windows.
    #[must_use]
    pub fn min_us(&self) -> Option<u64> {
        self.window_min_us.into_iter().chain(self.previous_min_us).min()
    }

    /// Smoothed mean, microseconds; 0 before the first sample.
    #[must_use]
    pub fn smoothed_us(&self) -> u64 {
        self.smoothed_us as u64
    }

    /// Smoothed mean deviation, microseconds.
    #[must_use]
    pub fn deviation_us(&self) -> u64 {
        self.deviation_us as u64
    }
}

/// Bytes per second while something is under way: overlapping transfers count once, idle time not
/// at all.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Goodput {
    under_way: u32,
    busy_since_us: u64,
    bytes: u64,
    busy_us: u64,
    bytes_per_s: Option<f64>,
}

impl Goodput {
    /// A transfer begins.
    pub fn start(&mut self, now_us: u64) {
        if self.under_way == 0 {
            self.busy_since_us = now_us;
        }
        self.under_way += 1;
    }

    /// `bytes` of any transfer under way have arrived.
    pub fn deliver(&mut self, now_us: u64, bytes: u64) {
        self.bytes += bytes;
        self.count_busy(now_us);
        if self.bytes >= SAMPLE_BYTES_MIN {
            self.fold();
        }
    }

    /// A transfer ends, complete or not.
    pub fn finish(&mut self, now_us: u64) {
        self.count_busy(now_us);
        self.under_way = self.under_way.saturating_sub(1);
        if self.under_way == 0 {
            // Too few bytes to say anything: forget them rather than mix them with a later time.
            self.bytes = 0;
            self.busy_us = 0;
        }
    }

    /// The estimate; `None` before [`SAMPLE_BYTES_MIN`] have gone through at once.
    #[must_use]
    pub fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s.map(|rate| rate as u64)
    }

    fn count_busy(&mut self, now_us: u64) {
        if self.under_way > 0 {
            self.busy_us += now_us.saturating_sub(self.busy_since_us);
            self.busy_since_us = self.busy_since_us.max(now_us);
        }
    }

    fn fold(&mut self) {
        // On a fast local link many bytes arrive in the same microsecond.
        let rate = self.bytes as f64 * 1e6 / self.busy_us.max(1) as f64;
        let old = self.bytes_per_s.unwrap_or(rate);
        self.bytes_per_s = Some(old + (rate - old) * GOODPUT_GAIN);
        self.bytes = 0;
        self.busy_us = 0;
    }
}

/// What a transfer may count on, bytes per second: what was measured in its direction, else in the other one, else
/// what the congestion window lets through in a round trip. The one estimate by which both ends decide whether
/// state is moved or computed.
#[must_use]
pub(crate) fn expected_bytes_per_s(measured: Option<u64>, opposite: Option<u64>, cwnd: u64, rtt_us: u64) -> f64 {
    let by_window = || cwnd as f64 * 1e6 / rtt_us.max(1) as f64;
    measured.or(opposite).map_or_else(by_window, |rate| rate as f64).max(1.0)
}

#[cfg(test)]
mod tests;

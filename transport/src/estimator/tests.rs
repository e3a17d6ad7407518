use super::*;
use crate::link::LinkStats;

#[test]
fn rtt_table() {
    // (now, sample) → (min, smoothed, deviation)
    let table = [
        ((0, 1_000), (1_000, 1_000, 500)),
        ((1, 1_000), (1_000, 1_000, 375)),
        ((2, 1_800), (1_000, 1_100, 481)),
        ((3, 300), (300, 1_000, 560)),
        // A window later the old minimum still counts, two windows later it does not.
        ((MIN_RTT_WINDOW_US, 900), (300, 987, 445)),
        ((2 * MIN_RTT_WINDOW_US, 950), (900, 982, 343)),
        ((9 * MIN_RTT_WINDOW_US, 5_000), (5_000, 1_484, 1_262)),
    ];
    let mut rtt = Rtt::default();
    assert_eq!((rtt.min_us(), rtt.smoothed_us()), (None, 0));
    for ((now, sample), (min, smoothed, deviation)) in table {
        rtt.observe(now, sample);
        let found = (rtt.min_us().unwrap(), rtt.smoothed_us(), rtt.deviation_us());
        assert_eq!(found, (min, smoothed, deviation), "at {now}");
    }
}

enum Event {
    Start(u64),
    Deliver(u64, u64),
    Finish(u64),
}
use Event::{Deliver, Finish, Start};

fn goodput(events: &[Event]) -> Option<u64> {
    let mut estimate = Goodput::default();
    for event in events {
        match *event {
            Start(now) => estimate.start(now),
            Deliver(now, bytes) => estimate.deliver(now, bytes),
            Finish(now) => estimate.finish(now),
        }
    }
    estimate.bytes_per_s()
}

#[test]
fn goodput_table() {
    const MIB: u64 = 1 << 20;
    assert_eq!(goodput(&[]), None);
    // Too small to say anything.
    assert_eq!(goodput(&[Start(0), Deliver(1_000, 1_000), Finish(1_000)]), None);
    // 1 MiB in one second.
    assert_eq!(goodput(&[Start(0), Deliver(1_000_000, MIB), Finish(1_000_000)]), Some(MIB));
    // Two at once share the pipe: their bytes add, their time does not.
    let both = [Start(0), Start(0), Deliver(500_000, MIB), Deliver(1_000_000, MIB)];
    assert_eq!(goodput(&both), Some(2 * MIB));
    // Idle time between two transfers does not count.
    let apart = [
        Start(0),
        Deliver(1_000_000, MIB),
        Finish(1_000_000),
        Start(60_000_000),
        Deliver(61_000_000, MIB),
        Finish(61_000_000),
    ];
    assert_eq!(goodput(&apart), Some(MIB));
    // A quarter of the way to a new rate per sample.
    let faster = [Start(0), Deliver(1_000_000, MIB), Deliver(2_000_000, 5 * MIB)];
    assert_eq!(goodput(&faster), Some(2 * MIB));
    // A scrap of a cancelled transfer is not mixed into the next one.
    let scrap = [Start(0), Deliver(10_000_000, 10), Finish(10_000_000), Start(20_000_000), Deliver(21_000_000, MIB)];
    assert_eq!(goodput(&scrap), Some(MIB));
    // No time passed: large, but not a division by zero.
    assert!(goodput(&[Start(5), Deliver(5, MIB)]).unwrap() > 1 << 39);
    // Late or unbalanced events do no harm.
    assert_eq!(goodput(&[Finish(1), Start(9), Deliver(3, MIB / 2), Finish(2), Finish(2)]), Some(MIB / 2 * 1_000_000));
}

#[test]
fn a_transfer_counts_on_what_was_measured_and_else_on_the_window() {
    // (rate in its direction, in the other, congestion window, round trip in microseconds, expected)
    let table = [
        (Some(5_000_000), Some(1_000), 12_000, 10_000, 5e6),
        (None, Some(1_000), 12_000, 10_000, 1e3),
        // A fresh link: 12 kB in a round trip of 10, 100 ms.
        (None, None, 12_000, 10_000, 1.2e6),
        (None, None, 12_000, 100_000, 1.2e5),
        // Before the first round trip nothing limits it; a window or a rate of 0 never becomes a divisor.
        (None, None, 12_000, 0, 1.2e10),
        (None, None, 0, 10_000, 1.0),
        (Some(0), Some(9), 12_000, 10_000, 1.0),
    ];
    for (measured, opposite, cwnd, rtt_us, expected) in table {
        let got = expected_bytes_per_s(measured, opposite, cwnd, rtt_us);
        assert_eq!(got, expected, "{measured:?} {opposite:?} {cwnd} {rtt_us}");
    }
    let stats = LinkStats { receive_bytes_per_s: Some(7), send_bytes_per_s: Some(3), ..LinkStats::default() };
    assert_eq!((stats.expected_receive_bytes_per_s(), stats.expected_send_bytes_per_s()), (7.0, 3.0));
}

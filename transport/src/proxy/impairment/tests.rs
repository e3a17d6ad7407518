use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000;

fn arrivals(faults: &Faults, packets: usize, gap_us: u64, len: usize, seed: u64) -> Vec<Fate> {
    let mut link = Impairment::new(seed);
    (0..packets as u64).map(|i| link.judge(faults, i * gap_us, len)).collect()
}

fn at(fate: Fate) -> Option<u64> {
    match fate {
        Fate::Arrives { at_us, .. } => Some(at_us),
        _ => None,
    }
}

#[test]
fn a_clean_link_passes_everything_at_once() {
    let fates = arrivals(&Faults::default(), 100, 10, 1_200, 1);
    for (i, fate) in fates.into_iter().enumerate() {
        let at_us = i as u64 * 10;
        assert_eq!(fate, Fate::Arrives { at_us, copy_at_us: None, reordered: false });
    }
}

#[test]
fn delay_is_half_of_the_round_trip() {
    let fates = arrivals(&Faults::rtt(Duration::from_millis(50)), 3, MS, 1_200, 1);
    assert_eq!(fates.into_iter().filter_map(at).collect::<Vec<_>>(), [25 * MS, 26 * MS, 27 * MS]);
}

#[test]
fn a_rate_spaces_packets_and_overflows_its_queue() {
    let faults = Faults { bytes_per_s: Some(1_000_000), ..Faults::default() };
    let fates = arrivals(&faults, 1_000, 0, 1_000, 1);
    let passed: Vec<u64> = fates.iter().copied().filter_map(at).collect();
    // 1 ms each; the queue holds 200 ms.
    assert_eq!(passed[..3], [MS, 2 * MS, 3 * MS]);
    assert_eq!(passed.len(), 201);
    assert_eq!(fates.iter().filter(|fate| **fate == Fate::Overflowed).count(), 799);
}

#[test]
fn a_trickle_still_passes_a_packet() {
    let faults = Faults { bytes_per_s: Some(100), ..Faults::default() };
    let fates = arrivals(&faults, 2, 0, 1_200, 1);
    assert_eq!((at(fates[0]), fates[1]), (Some(12_000 * MS), Fate::Overflowed));
}

#[test]
fn off_loses_everything_and_on_again_passes() {
    let off = Faults { on: false, ..Faults::default() };
    let mut link = Impairment::new(1);
    assert_eq!(link.judge(&off, 0, 1), Fate::Lost);
    assert_eq!(at(link.judge(&Faults::default(), 5, 1)), Some(5));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..Default::default() })]

    #[test]
    fn probabilities_hold(seed: u64, p in 0.0..1.0f64) {
        let share = |faults: Faults, hit: fn(&Fate) -> bool| {
            let fates = arrivals(&faults, 4_000, 10, 1_200, seed);
            fates.iter().filter(|fate| hit(fate)).count() as f64 / 4_000.0
        };
        let clean = Faults::default();
        // Five standard deviations of 4 000 draws.
        let near = |found: f64| (found - p).abs() < 0.04;
        let lost = share(Faults { loss: p, ..clean }, |f| *f == Fate::Lost);
        let doubled = share(Faults { duplicate: p, ..clean }, |f| {
            matches!(f, Fate::Arrives { copy_at_us: Some(_), .. })
        });
        let held_back = share(Faults { reorder: p, ..clean }, |f| {
            matches!(f, Fate::Arrives { reordered: true, .. })
        });
        prop_assert!(near(lost) && near(doubled) && near(held_back));
    }

    #[test]
    fn jitter_stays_in_its_bound_and_keeps_order(seed: u64, jitter_ms in 0..50u64) {
        let faults = Faults { jitter: Duration::from_millis(jitter_ms), ..Faults::default() };
        let passed: Vec<u64> =
            arrivals(&faults, 500, 100, 1_200, seed).into_iter().filter_map(at).collect();
        prop_assert!(passed.is_sorted());
        for (i, at_us) in passed.iter().enumerate() {
            prop_assert!((i as u64 * 100..=500 * 100 + jitter_ms * MS).contains(at_us));
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_fates(seed: u64) {
        let faults = Faults {
            delay: Duration::from_millis(3),
            jitter: Duration::from_millis(2),
            loss: 0.1,
            reorder: 0.1,
            duplicate: 0.1,
            bytes_per_s: Some(500_000),
            on: true,
        };
        prop_assert_eq!(arrivals(&faults, 300, 500, 900, seed), arrivals(&faults, 300, 500, 900, seed));
    }
}

use tandem_proto::ids::Epoch;

use super::*;

fn ticket(epoch: u64, expires_in_ms: u64) -> Ticket {
    Ticket {
        node: "a".into(),
        address: "10.0.0.1:7443".into(),
        server_name: "a.tandem".into(),
        epoch: Epoch(epoch),
        expires_in_ms,
        reasons: vec!["expected wait 5 ms".into()],
        alternatives: Vec::new(),
    }
}

#[test]
fn ages_table() {
    let mut cache = TicketCache::default();
    assert_eq!(cache.get("big", 0), None);
    cache.keep("big", ticket(1, 1_000), 10_000);
    // now → stale, refresh due
    for (now_ms, stale, refresh_due) in [
        (10_000, false, false),
        (10_499, false, false),
        (10_500, false, true),
        (10_999, false, true),
        (11_000, true, true),
        (u64::MAX, true, true),
        (9_999, true, true),
    ] {
        let cached = cache.get("big", now_ms).unwrap();
        assert_eq!((cached.stale, cached.refresh_due), (stale, refresh_due), "at {now_ms}");
    }
    cache.keep("big", ticket(2, 1_000), 10_900);
    assert_eq!(cache.get("big", 11_000).map(|cached| (cached.ticket.epoch, cached.stale)), Some((Epoch(2), false)));
    cache.forget("big");
    assert_eq!(cache.get("big", 11_000), None);
}

#[test]
fn a_full_cache_drops_its_oldest_ticket() {
    let mut cache = TicketCache::default();
    for at in 0..CACHED_TICKETS_MAX as u64 {
        cache.keep(&format!("m{at}"), ticket(at, 1_000), at);
    }
    cache.keep("m0", ticket(99, 1_000), 99);
    assert!(cache.get("m1", 99).is_some(), "a renewed ticket pushes nobody out");
    cache.keep("more", ticket(100, 1_000), 100);
    assert!(cache.get("m1", 100).is_none() && cache.get("m0", 100).is_some() && cache.get("more", 100).is_some());
}

#[test]
fn a_stored_cache_comes_back() {
    let mut cache = TicketCache::default();
    cache.keep("big", ticket(7, 1_000), 5);
    let stored = serde_json::to_string(&cache).unwrap();
    assert_eq!(serde_json::from_str::<TicketCache>(&stored).unwrap(), cache);
}

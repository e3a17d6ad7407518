//! In which order the addresses of a name are dialed (RFC 8305, "happy eyeballs"). Pure.

use std::net::SocketAddr;

/// Addresses of one name that are tried.
pub const ADDRESSES_MAX: usize = 8;
/// Addresses remembered as dead.
pub(crate) const DEAD_MAX: usize = 8;

/// `found` in the order of dialing: families take turns, beginning with that of the resolver's first
/// address (it has sorted them by RFC 6724); an address of `dead` comes after all others, the one that died
/// last at the end. Each once, at most [`ADDRESSES_MAX`].
#[must_use]
pub fn order(found: &[SocketAddr], dead: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut unique: Vec<SocketAddr> = Vec::new();
    for addr in found {
        if !unique.contains(addr) {
            unique.push(*addr);
        }
    }
    let first_is_v6 = unique.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = unique.into_iter().partition(|addr| addr.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut turns = Vec::new();
    loop {
        let before = turns.len();
        turns.extend(first.next());
        turns.extend(second.next());
        if turns.len() == before {
            break;
        }
    }
    // Stable: the alternation stays among the living. `dead` has the latest death first.
    turns.sort_by_key(|addr| dead.iter().position(|d| d == addr).map_or(0, |at| DEAD_MAX.saturating_sub(at).max(1)));
    turns.truncate(ADDRESSES_MAX);
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns_and_dead_addresses_come_last() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        let [a6, b6, c6] = ["[2001:db8::a]:1", "[2001:db8::b]:1", "[2001:db8::c]:1"].map(addr);
        let [a4, b4] = ["10.0.0.1:1", "10.0.0.2:1"].map(addr);
        let table: [(&[SocketAddr], &[SocketAddr], &[SocketAddr]); 9] = [
            (&[], &[], &[]),
            (&[a4], &[], &[a4]),
            (&[a4], &[a4], &[a4]),
            (&[a6, b6, c6, a4, b4], &[], &[a6, a4, b6, b4, c6]),
            (&[a4, b4, a6], &[], &[a4, a6, b4]),
            (&[a6, a6, a4, a6], &[], &[a6, a4]),
            (&[a6, a4], &[a6], &[a4, a6]),
            (&[a6, b6, a4, b4], &[a6, a4], &[b6, b4, a4, a6]),
            (&[a6, b6, a4], &[a4, b6, a6], &[a6, b6, a4]),
        ];
        for (found, dead, expected) in table {
            assert_eq!(order(found, dead), expected, "{found:?} without {dead:?}");
        }
        let many: Vec<SocketAddr> = (1..=20).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect();
        assert_eq!(order(&many, &[]), many[..ADDRESSES_MAX]);
    }
}

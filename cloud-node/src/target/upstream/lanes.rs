//! Where an engine keeps the computed state of sequences: a session goes where most of its tokens are.

/// Tokens of a sequence that are remembered of a lane.
const REMEMBERED_MAX: usize = 4096;

/// Common tokens that make a lane worth taking though others were used less recently.
const COMMON_MIN: usize = 16;

/// A session's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// Index of the engine.
    pub(super) member: usize,
    /// Lane of that engine.
    pub(super) lane: usize,
}

/// The lanes of one engine.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Lane {
    used_at: u64,
    tenant: [u8; 32],
    tokens: Vec<u32>,
}

impl Lanes {
    pub(super) fn new(count: usize) -> Self {
        Self { lanes: vec![Lane::default(); count.max(1)], clock: 0 }
    }

    /// The lane for a sequence: the one with the longest common beginning, of the same tenant; else the one that
    /// was taken longest ago.
    pub(super) fn take(&mut self, tenant: [u8; 32], tokens: &[u32]) -> usize {
        self.clock += 1;
        let common = |lane: &Lane| {
            let same = lane.tenant == tenant;
            let common = lane.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            // A short common beginning (every chat has one) is no reason to give up another sequence's state.
            if same && common >= COMMON_MIN { common } else { 0 }
        };
        let best = (0..self.lanes.len()).max_by_key(|&at| {
            let lane = &self.lanes[at];
            (common(lane), std::cmp::Reverse(lane.used_at), std::cmp::Reverse(at))
        });
        let at = best.unwrap_or(0);
        let tokens = tokens[..tokens.len().min(REMEMBERED_MAX)].to_vec();
        self.lanes[at] = Lane { used_at: self.clock, tenant, tokens };
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_goes_where_its_beginning_is() {
        let mut lanes = Lanes::new(3);
        let talk = |id: u32, len: u32| (0..len).map(|i| if i < 8 { i } else { id * 1000 + i }).collect::<Vec<_>>();
        let me = [1; 32];
        assert_eq!(lanes.take(me, &talk(1, 40)), 0);
        assert_eq!(lanes.take(me, &talk(2, 40)), 1);
        // The second turn of the first talk, and of the second.
        assert_eq!(lanes.take(me, &talk(1, 80)), 0);
        assert_eq!(lanes.take(me, &talk(2, 80)), 1);
        // A third one shares eight tokens with both: the free lane.
        assert_eq!(lanes.take(me, &talk(3, 40)), 2);
        // The same text of another tenant takes the oldest lane.
        assert_eq!(lanes.take([2; 32], &talk(3, 40)), 0);
    }
}

//! The accept rule of speculative decoding under the shared noise: a draft is accepted iff it is the
//! token the target picks at its position.

/// What the target decided about a run of drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Drafts accepted from the start.
    pub accepted: usize,
    /// The target's token after them: the correction after a rejection, else the bonus token.
    pub next: u32,
    /// Whether a draft was rejected.
    pub rejected: bool,
}

/// Judges `drafts` by the target's own picks: `picks[i]` is what the target chooses at the position
/// of `drafts[i]`, and one more pick follows the last draft. `None` if there are not exactly
/// `drafts.len() + 1` picks.
#[must_use]
pub fn accept(drafts: &[u32], picks: &[u32]) -> Option<Accepted> {
    if picks.len() != drafts.len() + 1 {
        return None;
    }
    let accepted = drafts.iter().zip(picks).take_while(|(d, p)| d == p).count();
    Some(Accepted { accepted, next: picks[accepted], rejected: accepted < drafts.len() })
}

#[cfg(test)]
mod tests {
    use super::{Accepted, accept};

    #[test]
    fn table() {
        type Case<'a> = (&'a [u32], &'a [u32], Option<(usize, u32, bool)>);
        let cases: [Case<'_>; 8] = [
            (&[], &[7], Some((0, 7, false))),
            (&[1], &[1, 9], Some((1, 9, false))),
            (&[1], &[2, 9], Some((0, 2, true))),
            (&[1, 2, 3], &[1, 2, 3, 4], Some((3, 4, false))),
            (&[1, 2, 3], &[1, 5, 3, 4], Some((1, 5, true))),
            (&[1, 2, 3], &[1, 2, 9, 4], Some((2, 9, true))),
            (&[1, 2], &[1, 2], None),
            (&[], &[], None),
        ];
        for (drafts, picks, expected) in cases {
            let expected = expected.map(|(accepted, next, rejected)| Accepted { accepted, next, rejected });
            assert_eq!(accept(drafts, picks), expected, "{drafts:?} judged by {picks:?}");
        }
    }
}

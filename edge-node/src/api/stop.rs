//! Stop strings in text that arrives in pieces. What might be the beginning of a stop string is
//! held back, so that no part of one is ever sent.

/// Looks for stop strings. The match is the one that is complete first; of several that end at
/// the same place, the longest.
#[derive(Clone, Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<Stop>,
    /// Text held back: a prefix of some stop string, thus shorter than the longest of them.
    held: String,
    /// Index of the one that is complete.
    complete: Option<usize>,
}

#[derive(Clone, Debug)]
struct Stop {
    bytes: Vec<u8>,
    /// Knuth-Morris-Pratt: for each length of a matched prefix, the length of its longest proper
    /// border.
    borders: Vec<usize>,
    /// Bytes of the stop string that end the text seen so far.
    matched: usize,
}

impl Stop {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len() + 1];
        let mut border = 0;
        for end in 1..bytes.len() {
            while border > 0 && bytes[end] != bytes[border] {
                border = borders[border];
            }
            border += usize::from(bytes[end] == bytes[border]);
            borders[end + 1] = border;
        }
        Self { bytes, borders, matched: 0 }
    }

    /// Takes the next byte; true if the stop string is complete.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

/// What came of a piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Text that can be sent.
    pub(crate) text: String,
    /// True if a stop string is complete; nothing may be pushed after it.
    pub(crate) stopped: bool,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones never match.
    pub(crate) fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops = stops.iter().map(AsRef::as_ref).filter(|stop| !stop.is_empty()).map(Stop::new).collect();
        Self { stops, held: String::new(), complete: None }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> Passed {
        let before = self.held.len();
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        for (i, byte) in piece.bytes().enumerate() {
            let complete =
                self.stops.iter_mut().enumerate().filter_map(|(at, s)| s.step(byte).then_some((s.bytes.len(), at)));
            if let Some((length, at)) = complete.max() {
                self.complete = Some(at);
                text.truncate(before + i + 1 - length);
                return Passed { text, stopped: true };
            }
        }
        // Matched bytes are whole characters from the front and may end inside of one, but text
        // arrives in whole characters, so the cut is on a boundary.
        let keep = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        self.held = text.split_off(text.len() - keep);
        Passed { text, stopped: false }
    }

    /// The stop string that is complete.
    pub(crate) fn stopped_by(&self) -> Option<&str> {
        // It was given as text.
        self.complete.and_then(|at| std::str::from_utf8(&self.stops[at].bytes).ok())
    }

    /// The text still held back, once nothing more comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops);
        let mut out = String::new();
        for piece in pieces {
            let passed = matcher.push(piece);
            out.push_str(&passed.text);
            if passed.stopped {
                let stop = matcher.stopped_by().expect("it stopped");
                assert!(stops.contains(&stop) && pieces.concat().starts_with(&(out.clone() + stop)), "{stop}");
                return (out, true);
            }
        }
        assert_eq!(matcher.stopped_by(), None);
        out.push_str(&matcher.finish());
        (out, false)
    }

    /// Tries every end of the text in order.
    fn naive(stops: &[&str], text: &str) -> (String, bool) {
        for end in 0..=text.len() {
            let ends = |stop: &&&str| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes());
            if let Some(length) = stops.iter().filter(ends).map(|stop| stop.len()).max() {
                return (text[..end - length].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn table() {
        let table: [(&[&str], &[&str], &str, bool); 12] = [
            (&[], &["a", "b"], "ab", false),
            (&[""], &["a"], "a", false),
            (&["b"], &["abc"], "a", true),
            (&["END"], &["x E", "N", "D y"], "x ", true),
            (&["END"], &["x E", "N"], "x EN", false),
            (&["END"], &["EEN", "DD"], "E", true),
            (&["aab"], &["a", "a", "a", "a", "b"], "aa", true),
            (&["bc", "abcd"], &["abcd"], "a", true),
            (&["c", "abc"], &["xab", "c"], "x", true),
            (&["é"], &["caf", "é!"], "caf", true),
            (&["ü"], &["é", "è"], "éè", false),
            (&["\n\n"], &["a\n", "b\n", "\nc"], "a\nb", true),
        ];
        for (stops, pieces, expected, stopped) in table {
            assert_eq!(run(stops, pieces), (expected.to_owned(), stopped), "{stops:?} in {pieces:?}");
        }
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut matcher = StopMatcher::new(&["STOP"]);
        assert_eq!(matcher.push("hello S").text, "hello ");
        assert_eq!(matcher.push("T").text, "");
        assert_eq!(matcher.push("AR").text, "STAR");
        assert_eq!(matcher.finish(), "");
    }

    proptest! {
        #[test]
        fn equals_naive_search_whatever_the_splits(
            text in "[abé🦀]{0,40}",
            stops in prop::collection::vec("[abé🦀]{0,5}", 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let boundaries: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
            prop_assert_eq!(run(&stops, &pieces), naive(&stops, &text));
        }
    }
}

//! From tokens to text that can be sent: stop strings are cut out, and each token stays with the
//! part of the text it wrote.

use std::collections::VecDeque;

use super::stop::StopMatcher;
use crate::request::TokenEvent;

/// A token with the part of the answer's text that it wrote.
#[derive(Clone, Debug)]
pub(crate) struct WrittenToken {
    pub(crate) event: TokenEvent,
    /// Its text: empty while it is but the first bytes of a character, cut where a stop string
    /// begins. The texts of all tokens together are the answer's text.
    pub(crate) text: String,
    /// Characters of the answer before it.
    pub(crate) chars_before: usize,
}

/// A part of an answer that can be sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// The tokens whose text is now complete.
    pub(crate) tokens: Vec<WrittenToken>,
}

impl Piece {
    /// True if there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }
}

/// Puts the text of one choice together.
#[derive(Debug)]
pub(crate) struct Assembler {
    stops: StopMatcher,
    /// Tokens with text that is not wholly released, with the place where their text ends, bytes
    /// from the beginning of the answer.
    waiting: VecDeque<(TokenEvent, usize)>,
    /// Text that is released and belongs to tokens that still wait.
    open: String,
    /// Bytes decoded so far.
    decoded: usize,
    /// Bytes released so far.
    released: usize,
    /// Characters of the tokens handed out so far.
    chars: usize,
}

impl Assembler {
    /// For an answer that ends at one of these strings.
    pub(crate) fn new(stops: &[String]) -> Self {
        Self {
            stops: StopMatcher::new(stops),
            waiting: VecDeque::new(),
            open: String::new(),
            decoded: 0,
            released: 0,
            chars: 0,
        }
    }

    /// Takes the next token and the text that it completed. The flag says that a stop string is
    /// complete; nothing may be pushed after it.
    pub(crate) fn push(&mut self, event: TokenEvent, text: &str) -> (Piece, bool) {
        self.decoded += text.len();
        self.waiting.push_back((event, self.decoded));
        let passed = self.stops.push(text);
        let mut piece = self.release(passed.text, false);
        if passed.stopped {
            self.cut(&mut piece);
        }
        (piece, passed.stopped)
    }

    /// The stop string that has ended the answer.
    pub(crate) fn stopped_by(&self) -> Option<&str> {
        self.stops.stopped_by()
    }

    /// Takes text that belongs to the last token (bytes that never became a character) and ends.
    pub(crate) fn finish(&mut self, text: &str) -> Piece {
        self.decoded += text.len();
        if let Some((_, end)) = self.waiting.back_mut() {
            *end = self.decoded;
        }
        let passed = self.stops.push(text);
        let mut piece = self.release(passed.text, false);
        if passed.stopped {
            self.cut(&mut piece);
        } else {
            let rest = self.stops.finish();
            let last = self.release(rest, true);
            piece.text.push_str(&last.text);
            piece.tokens.extend(last.tokens);
        }
        piece
    }

    /// Hands out `text` and every token whose text it completes. The newest token waits while it
    /// has no text, unless it is the last: bytes that never become a character become its text.
    fn release(&mut self, text: String, last: bool) -> Piece {
        self.released += text.len();
        self.open.push_str(&text);
        let mut tokens = Vec::new();
        while let Some((_, end)) = self.waiting.front()
            && *end <= self.released
        {
            // Text of this token: what is open, up to the token's end.
            let own = self.open.len() - (self.released - *end);
            if own == 0 && self.waiting.len() == 1 && !last {
                break;
            }
            let rest = self.open.split_off(own);
            let own = std::mem::replace(&mut self.open, rest);
            tokens.extend(self.waiting.pop_front().map(|(event, _)| self.written(event, own)));
        }
        Piece { text, tokens }
    }

    /// Ends the text here: the token that is cut keeps what was released of it, later ones are
    /// not part of the answer's text.
    fn cut(&mut self, piece: &mut Piece) {
        let own = std::mem::take(&mut self.open);
        if !own.is_empty()
            && let Some((event, _)) = self.waiting.pop_front()
        {
            let token = self.written(event, own);
            piece.tokens.push(token);
        }
        self.waiting.clear();
    }

    fn written(&mut self, event: TokenEvent, text: String) -> WrittenToken {
        let chars_before = self.chars;
        self.chars += text.chars().count();
        WrittenToken { event, text, chars_before }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::Origin;

    fn event(index: u32) -> TokenEvent {
        TokenEvent {
            index,
            id: index,
            origin: Origin::Edge,
            logprob: -0.5,
            edge_top1: None,
            edge_entropy: None,
            risk: None,
            reason: "sure",
            alternatives: Vec::new(),
        }
    }

    /// Text, texts by token, and whether a stop string ended it.
    fn run(stops: &[&str], texts: &[&str], tail: &str) -> (String, Vec<(u32, String)>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut assembler = Assembler::new(&stops);
        let (mut text, mut tokens, mut stopped) = (String::new(), Vec::new(), false);
        for (i, part) in texts.iter().enumerate() {
            let (piece, stop) = assembler.push(event(i as u32), part);
            text.push_str(&piece.text);
            tokens.extend(piece.tokens);
            stopped = stop;
            if stop {
                break;
            }
        }
        if !stopped {
            let piece = assembler.finish(tail);
            text.push_str(&piece.text);
            tokens.extend(piece.tokens);
        }
        let mut chars = 0;
        for token in &tokens {
            assert_eq!(token.chars_before, chars);
            chars += token.text.chars().count();
        }
        (text, tokens.into_iter().map(|token| (token.event.index, token.text)).collect(), stopped)
    }

    fn tokens(list: &[(u32, &str)]) -> Vec<(u32, String)> {
        list.iter().map(|(i, text)| (*i, (*text).to_owned())).collect()
    }

    #[test]
    fn tokens_keep_their_text() {
        let got = run(&[], &["Li", "ma", "."], "");
        assert_eq!(got, ("Lima.".into(), tokens(&[(0, "Li"), (1, "ma"), (2, ".")]), false));
    }

    #[test]
    fn a_character_over_two_tokens_belongs_to_the_second() {
        let got = run(&[], &["a", "", "🦀", "b"], "");
        assert_eq!(got, ("a🦀b".into(), tokens(&[(0, "a"), (1, ""), (2, "🦀"), (3, "b")]), false));
    }

    #[test]
    fn bytes_that_never_became_a_character_belong_to_the_last_token() {
        let got = run(&["zz"], &["a", ""], "\u{fffd}");
        assert_eq!(got, ("a\u{fffd}".into(), tokens(&[(0, "a"), (1, "\u{fffd}")]), false));
    }

    #[test]
    fn a_stop_string_cuts_the_token_it_begins_in() {
        let got = run(&["\n\n"], &["one", " two\n", "\nthree", "four"], "");
        assert_eq!(got, ("one two".into(), tokens(&[(0, "one"), (1, " two")]), true));
    }

    #[test]
    fn tokens_inside_a_stop_string_are_left_out() {
        let got = run(&["STOP"], &["go ", "ST", "OP", "x"], "");
        assert_eq!(got, ("go ".into(), tokens(&[(0, "go ")]), true));
    }

    #[test]
    fn text_held_back_at_the_end_is_released() {
        let got = run(&["STOP"], &["go ", "ST", "O"], "");
        assert_eq!(got, ("go STO".into(), tokens(&[(0, "go "), (1, "ST"), (2, "O")]), false));
    }

    proptest! {
        #[test]
        fn the_texts_of_the_tokens_are_the_text(
            texts in prop::collection::vec("[abé🦀]{0,3}", 0..16),
            stops in prop::collection::vec("[abé🦀]{1,4}", 0..3),
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (text, tokens, stopped) = run(&stops, &texts, "");
            prop_assert_eq!(&text, &tokens.iter().map(|(_, t)| t.as_str()).collect::<String>());
            let indices: Vec<u32> = tokens.iter().map(|(i, _)| *i).collect();
            prop_assert_eq!(&indices, &(0..tokens.len() as u32).collect::<Vec<_>>());
            if !stopped {
                prop_assert_eq!(text, texts.concat());
                prop_assert_eq!(tokens.len(), texts.len());
            }
        }
    }
}

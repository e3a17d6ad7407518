//! What a vocabulary tells a peer of itself, so that a peer with another one can name a token that differs.
//!
//! Ids are cut into blocks, single ids first and longer ones behind. Of each block go three sums over the
//! hashes of its tokens: plain, and weighted by the place in the block and by its square, modulo a prime. The
//! first block whose sums differ is the first that differs; if one token in it does, the ratio of the differences is
//! its place.

use tandem_proto::limits::TOKENIZER_MARKS_MAX;

use super::Tokenizer;
use crate::checkpoint::spec::VOCAB_MAX;

/// A Mersenne prime; products of two numbers below it fit into 128 bits.
const PRIME: u64 = (1 << 61) - 1;
/// Sums of a block.
const SUMS: usize = 3;
/// Blocks, the most that fit.
const BLOCKS: usize = TOKENIZER_MARKS_MAX / SUMS;
/// Blocks of a single id.
const SINGLE: usize = 32;

/// Where two vocabularies differ first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// At this id.
    Token(u32),
    /// At several ids of this block; which is the first is not known.
    Within(u32, u32),
    /// Nowhere, as far as sums can tell, or the peer has not told.
    Unknown,
}

/// Begin and end of every block.
fn blocks() -> impl Iterator<Item = (u64, u64)> {
    let mut end = 0;
    (0..BLOCKS).map(move |block| {
        let begin = end;
        let last = block + 1 == BLOCKS;
        end = match block < SINGLE {
            true => end + 1,
            // Growth that reaches the largest vocabulary with the blocks there are.
            false if last => VOCAB_MAX as u64,
            false => end + end / 9 + 1,
        };
        (begin, end)
    })
}

fn times(a: u64, b: u64) -> u64 {
    (u128::from(a) * u128::from(b) % u128::from(PRIME)) as u64
}

fn minus(a: u64, b: u64) -> u64 {
    (a % PRIME + PRIME - b % PRIME) % PRIME
}

/// `1 / a`, by Fermat.
fn inverse(a: u64) -> u64 {
    let (mut power, mut base, mut left) = (1, a, PRIME - 2);
    while left > 0 {
        if left & 1 == 1 {
            power = times(power, base);
        }
        base = times(base, base);
        left >>= 1;
    }
    power
}

impl Tokenizer {
    /// The sums of all blocks up to the last token.
    #[must_use]
    pub fn marks(&self) -> &[u64] {
        self.marks.get_or_init(|| self.sums())
    }

    fn sums(&self) -> Vec<u64> {
        let mut marks = Vec::new();
        for (begin, end) in blocks().take_while(|(begin, _)| *begin < self.vocab_size() as u64) {
            let mut sums = [0; SUMS];
            for id in begin..end.min(self.vocab_size() as u64) {
                let Some(text) = self.token(id as u32) else { continue };
                let hash = blake3::hash(text.as_bytes());
                let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
                // Never 0, which stands for no token.
                let mut weighted = u64::from_le_bytes([a, b, c, d, e, f, g, h]) % (PRIME - 1) + 1;
                for sum in &mut sums {
                    *sum = (*sum + weighted) % PRIME;
                    weighted = times(weighted, id - begin + 1);
                }
            }
            marks.extend(sums);
        }
        marks
    }

    /// Where the vocabulary with these marks differs first from this one.
    #[must_use]
    pub fn first_difference(&self, theirs: &[u64]) -> Difference {
        let ours = self.marks();
        if theirs.is_empty() {
            return Difference::Unknown;
        }
        let sums = |marks: &[u64], block: usize| -> [u64; SUMS] {
            marks.get(block * SUMS..(block + 1) * SUMS).and_then(|s| s.try_into().ok()).unwrap_or_default()
        };
        for (block, (begin, end)) in blocks().enumerate() {
            let (ours, theirs) = (sums(ours, block), sums(theirs, block));
            let [plain, by_place, by_square] = [0, 1, 2].map(|i| minus(ours[i], theirs[i]));
            if [plain, by_place, by_square] == [0; SUMS] {
                continue;
            }
            let place = if plain == 0 { 0 } else { times(by_place, inverse(plain)) };
            let alone = (1..=end - begin).contains(&place) && times(by_place, place) == by_square;
            return match alone {
                true => Difference::Token((begin + place - 1) as u32),
                false => Difference::Within(begin as u32, (end - 1) as u32),
            };
        }
        Difference::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[(u32, &str)]) -> Tokenizer {
        let vocab: serde_json::Map<String, serde_json::Value> =
            words.iter().map(|(id, word)| ((*word).to_owned(), (*id).into())).collect();
        let file = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": words[0].1 },
        });
        Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer")
    }

    #[test]
    fn the_blocks_are_all_ids_once() {
        let all: Vec<_> = blocks().collect();
        assert!(all.windows(2).all(|pair| pair[0].1 == pair[1].0 && pair[0].0 < pair[0].1), "{all:?}");
        assert_eq!((all[0], all[SINGLE - 1]), ((0, 1), (SINGLE as u64 - 1, SINGLE as u64)));
        assert_eq!(all.last().expect("a block").1, VOCAB_MAX as u64);
    }

    #[test]
    fn the_first_token_that_differs_is_named() {
        let texts: Vec<String> = (0..900).map(|i| format!("w{i}")).collect();
        let with = |changes: &[(u32, &str)]| {
            let mut list: Vec<(u32, &str)> = (0..).zip(texts.iter().map(String::as_str)).collect();
            for (id, text) in changes {
                list.retain(|(there, _)| there != id);
                if !text.is_empty() {
                    list.push((*id, text));
                }
            }
            words(&list)
        };
        let ours = with(&[]);
        assert_eq!(ours.first_difference(with(&[]).marks()), Difference::Unknown);
        assert_eq!(ours.first_difference(&[]), Difference::Unknown);
        for id in [0, 7, 31, 32, 33, 500, 899] {
            assert_eq!(ours.first_difference(with(&[(id, "other")]).marks()), Difference::Token(id), "{id}");
        }
        // One more, one less; a gap; several, of which the first stands alone in its block.
        assert_eq!(ours.first_difference(with(&[(900, "new")]).marks()), Difference::Token(900));
        assert_eq!(ours.first_difference(with(&[(899, "")]).marks()), Difference::Token(899));
        assert_eq!(ours.first_difference(with(&[(40, ""), (700, "x"), (701, "y")]).marks()), Difference::Token(40));
        assert_eq!(ours.first_difference(with(&[(3, "x"), (4, "y")]).marks()), Difference::Token(3));
        let Difference::Within(from, to) = ours.first_difference(with(&[(700, "x"), (701, "y")]).marks()) else {
            panic!("two differences in a block are not one")
        };
        assert!(from <= 700 && to >= 701);
        assert!(ours.marks().len() <= TOKENIZER_MARKS_MAX);
    }
}

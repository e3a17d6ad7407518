//! Letters of multiple choice in text.

/// Most choices of a question: those that have a letter.
pub const CHOICES_MAX: usize = 26;

/// Words before the letter in a reply that reasons first.
const SAYS: [&str; 6] = ["answer is", "answer:", "choice is", "choice:", "option is", "option"];

/// Which of `of` choices a reply names, from 0: the letter it begins with, else the last one that it calls its
/// answer, else the only one that stands alone in it.
#[must_use]
pub fn letter(reply: &str, of: usize) -> Option<usize> {
    let text: String = reply.chars().filter(|c| !matches!(c, '*' | '`' | '"' | '_')).collect();
    leading(&text, of).or_else(|| said(&text, of)).or_else(|| alone(&text, of))
}

fn index(c: char, of: usize) -> Option<usize> {
    let upper = c.to_ascii_uppercase();
    upper.is_ascii_uppercase().then(|| (upper as u8 - b'A') as usize).filter(|at| *at < of.min(CHOICES_MAX))
}

/// The letter at the start of `text`, if it is one and not a word.
fn leading(text: &str, of: usize) -> Option<usize> {
    let inner = text.trim_start().trim_start_matches(['(', '[', '$', '\\', '{']);
    let mut chars = inner.chars();
    let at = index(chars.next()?, of)?;
    let rest = chars.as_str();
    // `A dog` is no choice, `A` and `A. A dog` and `A: …` are.
    let ends = rest.is_empty() || rest.starts_with(['.', ')', ']', ':', ',', ';', '}', '\n', '\r']);
    (ends || rest.trim().is_empty()).then_some(at)
}

fn said(text: &str, of: usize) -> Option<usize> {
    let lower = text.to_ascii_lowercase();
    let letter_after = |from: usize| {
        let rest = text[from..].trim_start_matches([' ', ':', '(', '[', '\n', '$', '\\', '{']);
        let mut chars = rest.chars();
        let c = chars.next()?;
        let at = index(c, of)?;
        let next = chars.next();
        let word = next.is_some_and(char::is_alphanumeric);
        // `the answer is a dog`: an article.
        let article = matches!(c, 'a' | 'A') && next == Some(' ') && chars.as_str().starts_with(char::is_lowercase);
        (!word && !article).then_some(at)
    };
    let found = SAYS.iter().flat_map(|says| lower.match_indices(says).map(|(at, says)| at + says.len()));
    found.filter_map(|from| Some((from, letter_after(from)?))).max_by_key(|(from, _)| *from).map(|(_, at)| at)
}

fn alone(text: &str, of: usize) -> Option<usize> {
    let words = text.split(|c: char| c.is_whitespace() || matches!(c, ',' | ';' | '/'));
    let letters = words.filter_map(|word| {
        let bare = word.trim_matches(['(', ')', '[', ']', '.', ':']);
        let mut chars = bare.chars();
        let c = chars.next().filter(char::is_ascii_uppercase)?;
        // An unmarked `A` or `I` is a word of English.
        let marked = word.len() > bare.len() || !matches!(c, 'A' | 'I');
        (chars.next().is_none() && marked).then(|| index(c, of)).flatten()
    });
    let mut letters: Vec<usize> = letters.collect();
    letters.dedup();
    match letters.as_slice() {
        [only] => Some(*only),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_in_replies() {
        for (reply, of, at) in [
            ("B", 4, Some(1)),
            ("b", 4, Some(1)),
            ("(C)", 4, Some(2)),
            ("**D**", 4, Some(3)),
            ("B. Lima", 4, Some(1)),
            ("A: it is warm", 4, Some(0)),
            ("A dog runs away. The answer is C.", 4, Some(2)),
            ("The answer is B, not the answer: C", 4, Some(2)),
            ("The answer is a dog", 4, None),
            ("I think it is (B).", 4, Some(1)),
            ("Either B or C", 4, None),
            ("E", 4, None),
            ("E", 5, Some(4)),
            ("Because of that", 4, None),
            ("A cat", 4, None),
            ("Option D looks right", 4, Some(3)),
            ("Answer: \\boxed{C}", 4, None),
            ("", 4, None),
            ("答案：B。", 4, None),
            ("Z", 26, Some(25)),
            ("A", 0, None),
        ] {
            assert_eq!(letter(reply, of), at, "{reply}");
        }
    }
}

//! What may reach a terminal. Text of models, files, certificates and peers can carry control sequences,
//! which would move the cursor, rename the window, or type for the person; everything that a command prints
//! goes through here.

use std::borrow::Cow;

use serde_json::Value;

/// True for a character that is an instruction to a terminal: C0, DEL and C1, but for line ends and tabs.
fn is_control(c: char) -> bool {
    c.is_control() && c != '\n' && c != '\t'
}

/// Text without control characters. Each character is judged by itself, so a sequence that is cut into
/// pieces loses its beginning all the same.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    if text.contains(is_control) {
        Cow::Owned(text.chars().filter(|c| !is_control(*c)).collect())
    } else {
        Cow::Borrowed(text)
    }
}

/// JSON on one line with no raw control character in it: `serde_json` escapes C0, and strings are the only
/// place where the others can be.
pub(crate) fn json_line(value: &Value) -> String {
    let line = value.to_string();
    if !line.contains(is_control) {
        return line;
    }
    let mut escaped = String::with_capacity(line.len() + 16);
    for c in line.chars() {
        if is_control(c) { escaped.push_str(&format!("\\u{:04x}", u32::from(c))) } else { escaped.push(c) }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_do_not_pass_in_one_piece_or_in_many() {
        let table = [
            ("plain\ttext\n", "plain\ttext\n"),
            ("\x1b[31mred\x1b[0m", "[31mred[0m"),
            ("\x1b]0;title\x07x", "]0;titlex"),
            ("\u{9b}2Jgone", "2Jgone"),
            ("a\rb\x08c\x7fd\0e", "abcde"),
            ("ü 漢 👩‍💻 \u{a0}", "ü 漢 👩‍💻 \u{a0}"),
        ];
        for (text, expected) in table {
            assert_eq!(visible(text), expected, "{text:?}");
            for (cut, _) in text.char_indices() {
                let (head, tail) = text.split_at(cut);
                assert_eq!(format!("{}{}", visible(head), visible(tail)), expected, "{text:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn json_says_the_same_without_raw_control_characters() {
        let value = serde_json::json!({ "text": "\x1b[1m\u{9b}2J\x7f ü" });
        let line = json_line(&value);
        assert!(!line.contains(char::is_control), "{line:?}");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }
}

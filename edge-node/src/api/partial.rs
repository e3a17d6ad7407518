//! JSON objects that were cut before their end: what an answer's length leaves of a call's arguments.

use serde_json::Value;

/// Deepest nesting, as the JSON parser has it.
const DEPTH_MAX: usize = 127;

/// Where a walk over JSON text stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// Between two parts.
    Between,
    /// In a string.
    Text,
    /// In a string, after a backslash.
    Escape,
}

/// `text` if it is a JSON object; the object that it begins if it was cut or goes wrong on the way. None
/// if it begins none.
///
/// What stands whole is kept: open strings and brackets are closed, and a member or item that is not
/// whole otherwise (a key without a value, half a number's exponent) is left out.
pub(crate) fn whole_object(text: &str) -> Option<String> {
    let is_object = |text: &str| matches!(serde_json::from_str(text), Ok(Value::Object(_)));
    if is_object(text) {
        return Some(text.to_owned());
    }
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let (mut at, mut open) = (At::Between, Vec::new());
    // Ends of what is whole, with the brackets open there, latest last.
    let mut ends: Vec<(usize, Vec<char>)> = Vec::new();
    for (i, c) in text.char_indices() {
        match (at, c) {
            (At::Escape, _) => at = At::Text,
            (At::Text, '\\') => at = At::Escape,
            (At::Text, '"') => at = At::Between,
            (At::Text, _) => {}
            (At::Between, '"') => at = At::Text,
            (At::Between, '{' | '[') if open.len() == DEPTH_MAX => return None,
            (At::Between, '{') => open.push('}'),
            (At::Between, '[') => open.push(']'),
            (At::Between, '}' | ']') => {
                if open.pop() != Some(c) {
                    return None;
                }
            }
            (At::Between, _) => {}
        }
        let ends_part = at == At::Between && matches!(c, '{' | '[' | '}' | ']' | '"');
        if ends_part || (at == At::Between && c == ',') {
            let end = if c == ',' { i } else { i + c.len_utf8() };
            ends.push((end, open.clone()));
            let first = ends.len().saturating_sub(ENDS_KEPT);
            ends.drain(..first);
        }
    }
    let closed = |end: usize, quote: &str, open: &[char]| {
        let mut whole = text.get(..end)?.to_owned() + quote;
        whole.extend(open.iter().rev());
        is_object(&whole).then_some(whole)
    };
    let all = match at {
        At::Between => closed(text.len(), "", &open),
        At::Text => closed(text.len(), "\"", &open),
        At::Escape => closed(text.len() - 1, "\"", &open),
    };
    all.or_else(|| ends.iter().rev().find_map(|(end, open)| closed(*end, "", open)))
}

/// Ends that are tried; a key, its colon and half a value lie after the last but two.
const ENDS_KEPT: usize = 4;

#[cfg(test)]
mod tests {
    use super::whole_object;

    #[test]
    fn what_was_cut_is_closed() {
        let table = [
            ("{}", Some("{}")),
            (r#" {"a": 1} "#, Some(r#" {"a": 1} "#)),
            ("{", Some("{}")),
            (r#"{"a"#, Some("{}")),
            (r#"{"a""#, Some("{}")),
            (r#"{"a":"#, Some("{}")),
            (r#"{"a": "é"#, Some(r#"{"a": "é"}"#)),
            (r#"{"a": "x\"#, Some(r#"{"a": "x"}"#)),
            (r#"{"a": "x\u00"#, Some("{}")),
            (r#"{"a": 12"#, Some(r#"{"a": 12}"#)),
            (r#"{"a": 1e"#, Some("{}")),
            (r#"{"a": tr"#, Some("{}")),
            (r#"{"a": 1, "b"#, Some(r#"{"a": 1}"#)),
            (r#"{"a": 1, "b": [1, {"c": "#, Some(r#"{"a": 1, "b": [1, {}]}"#)),
            (r#"{"a": {"b": "}{", "c": 2"#, Some(r#"{"a": {"b": "}{", "c": 2}}"#)),
            ("", None),
            ("[1]", None),
            ("42", None),
            ("print(1)", None),
            ("{bad", Some("{}")),
            ("{]", None),
            (r#"{"a": 1} x"#, Some(r#"{"a": 1}"#)),
        ];
        for (text, whole) in table {
            assert_eq!(whole_object(text).as_deref(), whole, "{text}");
        }
    }
}

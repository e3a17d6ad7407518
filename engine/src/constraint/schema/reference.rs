//! Where `$ref` leads.

use serde_json::Value;

/// Deepest place that anchors are looked for at.
const ANCHOR_DEPTH_MAX: usize = 128;

/// What `reference` points to in `root`: a JSON pointer (RFC 6901) as a URI fragment, or an anchor. The
/// document's own `$id` may stand before it.
///
/// # Errors
/// Says what is wrong with the reference.
pub fn resolve<'a>(root: &'a Value, reference: &str) -> Result<&'a Value, String> {
    let (document, fragment) = reference.split_once('#').unwrap_or((reference, ""));
    let own = ["$id", "id"].iter().filter_map(|word| root.get(word)?.as_str());
    if !document.is_empty() && !own.map(|id| id.trim_end_matches('#')).any(|id| id == document) {
        return Err(format!("the `$ref` `{reference}` leads outside the schema, which is not supported"));
    }
    let fragment = decoded(fragment).ok_or_else(|| format!("the `$ref` `{reference}` is badly percent-encoded"))?;
    // `#/` is an empty key by the letter, and the whole schema to some writers.
    let found = match fragment.as_str() {
        "" => Some(root),
        "/" => root.pointer("/").or(Some(root)),
        pointer if pointer.starts_with('/') => root.pointer(pointer),
        anchor => anchored(root, anchor, 0),
    };
    found.ok_or_else(|| format!("the `$ref` `{reference}` leads nowhere"))
}

/// Undoes percent-encoding.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if *first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

fn anchored<'a>(schema: &'a Value, anchor: &str, depth: usize) -> Option<&'a Value> {
    if depth > ANCHOR_DEPTH_MAX {
        return None;
    }
    match schema {
        Value::Object(map) => {
            let own = map.get("$anchor").and_then(Value::as_str) == Some(anchor)
                || map.get("$id").and_then(Value::as_str).and_then(|id| id.strip_prefix('#')) == Some(anchor);
            // What is listed are values, not schemas.
            let inner =
                map.iter().filter(|(word, _)| !["const", "enum", "default", "examples"].contains(&word.as_str()));
            if own { Some(schema) } else { inner.into_iter().find_map(|(_, v)| anchored(v, anchor, depth + 1)) }
        }
        Value::Array(list) => list.iter().find_map(|v| anchored(v, anchor, depth + 1)),
        _ => None,
    }
}

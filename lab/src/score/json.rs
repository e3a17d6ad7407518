//! JSON in a reply.

use serde_json::Value;

/// The JSON value of a reply: all of it, the code block in it, or what begins with the first bracket.
pub(super) fn found(reply: &str) -> Option<Value> {
    let parse = |text: &str| serde_json::from_str(text.trim()).ok();
    let block = || {
        let (_, rest) = reply.split_once("```")?;
        let (_, rest) = rest.split_once('\n')?;
        parse(rest.split_once("```").map_or(rest, |(block, _)| block))
    };
    let first = || {
        let from = reply.find(['{', '['])?;
        serde_json::Deserializer::from_str(&reply[from..]).into_iter().next()?.ok()
    };
    parse(reply).or_else(block).or_else(first)
}

/// Equal values; numbers by what they are worth, objects in any order.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_in_replies() {
        for (reply, value) in [
            ("{\"a\": 1}", Some(json!({"a": 1}))),
            ("Here:\n```json\n[1, 2]\n```\nDone.", Some(json!([1, 2]))),
            ("Sure! {\"a\": {\"b\": 2}} is it.", Some(json!({"a": {"b": 2}}))),
            ("3", Some(json!(3))),
            ("no value", None),
            ("{\"a\": ", None),
        ] {
            assert_eq!(found(reply), value, "{reply}");
        }
    }
}

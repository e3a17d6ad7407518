//! Whether a schema has a value that ends.

use serde_json::{Map, Value};

use super::super::ConstraintError;

/// Refuses a schema all whose values go on for ever, as a list item that must have an item like itself.
/// `schema` and its definitions are prepared.
pub(super) fn check(schema: &Value, definitions: &Map<String, Value>) -> Result<(), ConstraintError> {
    let all: Vec<(String, &Value)> =
        definitions.iter().map(|(name, s)| (format!("#/$defs/{name}"), s)).chain([("#".into(), schema)]).collect();
    let mut finite: Vec<&str> = Vec::new();
    loop {
        let before = finite.len();
        for (reference, schema) in &all {
            if !finite.contains(&reference.as_str()) && ends(schema, &finite) {
                finite.push(reference);
            }
        }
        if finite.contains(&"#") {
            return Ok(());
        }
        if finite.len() == before {
            return Err(ConstraintError::Rejected("no finite value is in the schema".into()));
        }
    }
}

/// True if a value of the schema can end, as far as is known of the references.
fn ends(schema: &Value, finite: &[&str]) -> bool {
    let Value::Object(map) = schema else { return *schema != Value::Bool(false) };
    let ends = |schema: &Value| ends(schema, finite);
    let list = |word: &str| map.get(word).and_then(Value::as_array);
    let reference = map.get("$ref").and_then(Value::as_str).is_none_or(|target| finite.contains(&target));
    let combined =
        list("allOf").is_none_or(|all| all.iter().all(ends)) && list("anyOf").is_none_or(|any| any.iter().any(ends));
    // Other types need neither members nor items.
    let only = |kind: &str| map.get("type").is_some_and(|t| t == kind);
    let members = !only("object")
        || list("required").is_none_or(|keys| {
            let schema = |key: &Value| map.get("properties").and_then(|p| p.get(key.as_str()?));
            keys.iter().filter_map(schema).all(ends)
        });
    let least = map.get("minItems").and_then(Value::as_u64).unwrap_or(0);
    let items = !only("array") || least == 0 || {
        let first = list("prefixItems").map_or(&[][..], |l| l);
        first.iter().take(least as usize).all(ends)
            && (first.len() as u64 >= least || map.get("items").is_none_or(ends))
    };
    reference && combined && members && items
}

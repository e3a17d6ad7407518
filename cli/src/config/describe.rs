//! What each setting means: the doc comments of the settings themselves, taken from their JSON schema.

use std::collections::BTreeMap;

use serde_json::Value;

use super::settings::Settings;

/// Every setting by its dotted key, with its description.
pub(crate) fn descriptions() -> BTreeMap<String, String> {
    let schema = schemars::schema_for!(Settings).to_value();
    let mut found = BTreeMap::new();
    walk(&schema, &schema, "", &mut found);
    found
}

/// The schema that `schema` refers to, or itself.
fn resolve<'s>(root: &'s Value, schema: &'s Value) -> &'s Value {
    let referred = schema["$ref"].as_str().and_then(|name| name.strip_prefix('#'));
    referred.and_then(|pointer| root.pointer(pointer)).unwrap_or(schema)
}

/// The alternatives of a schema that is a choice.
fn choices(schema: &Value) -> impl Iterator<Item = &Value> {
    ["oneOf", "anyOf"].into_iter().filter_map(|name| schema[name].as_array()).flatten()
}

fn walk(root: &Value, schema: &Value, prefix: &str, found: &mut BTreeMap<String, String>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let target = resolve(root, property);
        let tables: Vec<&Value> =
            std::iter::once(target).chain(choices(target)).filter(|schema| schema["properties"].is_object()).collect();
        for table in &tables {
            walk(root, table, &key, found);
        }
        if let Some(variant) = property["const"].as_str() {
            // The tag of a table that comes in variants: one name of each.
            let named = with_meaning(variant, schema);
            let text = found.entry(key).or_default();
            text.push_str(if text.is_empty() { "One of: " } else { "; " });
            text.push_str(&named);
        } else if tables.is_empty() {
            let text = property["description"].as_str().or(target["description"].as_str()).unwrap_or_default();
            let text = format!("{}{}", flat(text), words(root, property));
            found.entry(key).or_insert(text);
        }
    }
}

/// A word and what its schema says it means.
fn with_meaning(word: &str, schema: &Value) -> String {
    let meaning = schema["description"].as_str().map(|text| format!(" ({})", flat(text).trim_end_matches('.')));
    format!("{word}{}", meaning.unwrap_or_default())
}

/// A doc comment on one line.
fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The words that a setting may have, with their meanings.
fn words(root: &Value, property: &Value) -> String {
    let own = std::iter::once(property).chain(choices(property)).map(|schema| resolve(root, schema));
    let named = own.flat_map(|schema| {
        let plain = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
        let told = std::iter::once(schema)
            .chain(choices(schema))
            .filter_map(|one| one["const"].as_str().map(|word| with_meaning(word, one)));
        plain.chain(told).collect::<Vec<_>>()
    });
    let named: Vec<String> = named.collect();
    if named.is_empty() { String::new() } else { format!(" One of: {}.", named.join("; ")) }
}

#[cfg(test)]
mod tests {
    use toml::Table;

    use super::*;
    use crate::config::layers::flatten;

    #[test]
    fn every_setting_is_described() {
        let found = descriptions();
        for (key, text) in &found {
            let sentence = text.chars().next().is_some_and(|c| c.is_uppercase() || "`τ".contains(c));
            assert!(sentence && text.len() > 8, "{key}: {text:?}");
        }
        let table = Table::try_from(Settings::default()).expect("plain data");
        for (key, _) in flatten(table) {
            assert!(found.contains_key(&key), "{key} has no description");
        }
    }

    #[test]
    fn descriptions_are_the_doc_comments() {
        let found = descriptions();
        for (key, part) in [
            ("edge.requests_max", "Most requests under way."),
            ("edge.threshold", "the policy's own if absent"),
            ("listen.metrics", "`/metrics`"),
            ("link.profile", "near (One machine or one room"),
            ("edge.default_mode", "local (The edge model alone"),
            ("policy.nats", "Threshold, nats"),
            ("policy.policy", "entropy"),
            ("cloud.bounds.sessions_max", "sessions"),
        ] {
            let text = found.get(key).unwrap_or_else(|| panic!("{key} is not there: {:?}", found.keys()));
            assert!(text.contains(part), "{key}: {text}");
        }
    }
}

//! Fields of a chat request that reach the model through its template: `chat_template_kwargs`, and the
//! many names under which clients ask for more, less or no reasoning.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, type_error, unsupported};

/// Most variables of a request's own.
const VARIABLES_MAX: usize = 32;
/// What a template gets from the node itself.
const OWN: [&str; 7] =
    ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "strftime_now"];
/// OpenAI's words for how long to reason.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Takes the variables for the template. A template that knows none of them is not changed by them.
///
/// `reasoning_effort` goes in as it is (gpt-oss reads it) and, where it switches reasoning on or off, as
/// `enable_thinking` (Qwen 3, GLM) and `thinking` (DeepSeek V3.1). What `chat_template_kwargs` says itself
/// wins.
pub(crate) fn take(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut variables = Map::new();
    if let Some(effort) = take_effort(fields)? {
        variables.insert("reasoning_effort".into(), effort.into());
        think(&mut variables, effort != "none");
    }
    for name in ["enable_thinking", "think"] {
        if let Some(on) = fields.boolean(name)? {
            think(&mut variables, on);
        }
    }
    if let Some(mut thinking) = fields.object("thinking")? {
        let kind = thinking.choice("type", &["enabled", "disabled", "auto", "adaptive"])?;
        // A bound on what the model says to itself cannot be kept; `max_tokens` counts it.
        thinking.ignore(&["budget_tokens", "clear_thinking", "display"]);
        thinking.finish()?;
        match kind {
            Some("enabled") => think(&mut variables, true),
            Some("disabled") => think(&mut variables, false),
            _ => {}
        }
    }
    let path = "chat_template_kwargs";
    match fields.take(path) {
        None => {}
        Some(Value::Object(map)) => {
            if map.len() > VARIABLES_MAX {
                let message = format!("`{path}` takes at most {VARIABLES_MAX} variables, not {}", map.len());
                return Err(ApiError::invalid(path, message));
            }
            if let Some(name) = map.keys().find(|name| OWN.contains(&name.as_str())) {
                let message = format!("`{path}.{name}` is set by the node; leave it out");
                return Err(ApiError::invalid(format!("{path}.{name}"), message));
            }
            variables.extend(map);
        }
        Some(other) => return Err(type_error(path, "an object", &other)),
    }
    Ok(variables)
}

/// The effort, from `reasoning_effort` or from `reasoning` as routers of several vendors write it.
fn take_effort(fields: &mut Fields) -> Result<Option<&'static str>, ApiError> {
    let plain = fields.choice("reasoning_effort", &EFFORTS)?;
    let Some(mut reasoning) = fields.object("reasoning")? else { return Ok(plain) };
    let effort = reasoning.choice("effort", &EFFORTS)?;
    let enabled = reasoning.boolean("enabled")?;
    if reasoning.boolean("exclude")? == Some(true) {
        return Err(unsupported("reasoning.exclude"));
    }
    reasoning.ignore(&["summary", "generate_summary", "max_tokens"]);
    reasoning.finish()?;
    let switched = match enabled {
        Some(false) => Some("none"),
        _ => None,
    };
    Ok(plain.or(switched).or(effort))
}

fn think(variables: &mut Map<String, Value>, on: bool) {
    for name in ["enable_thinking", "thinking"] {
        variables.insert(name.into(), on.into());
    }
}

//! For chat templates that know no tools: the tools as a system text, earlier calls and their results as
//! plain turns.

use serde_json::{Value, json};

use super::messages::{ChatMessage, Role};
use super::tools::Tool;

/// What a model is told before the list of functions. The form is that of the calls that can be forced.
const INTRODUCTION: &str = "You can call the functions below. To call one, answer with one JSON object and nothing \
else: {\"name\": <name of the function>, \"arguments\": <object with its arguments>}. Its result comes as the next \
message. Where no function helps, answer in words.";

/// The tools as a text.
pub(crate) fn description(tools: &[&Tool]) -> String {
    let mut text = INTRODUCTION.to_owned();
    for tool in tools {
        text.push('\n');
        text.push_str(&tool.described["function"].to_string());
    }
    text
}

/// The conversation with a text about tools at the end of its first system message, or in one of its own.
pub(crate) fn with_tools(messages: &[ChatMessage], tools: &str) -> Vec<ChatMessage> {
    let mut messages = messages.to_vec();
    match messages.first_mut() {
        Some(first) if first.role == Role::System => {
            first.content = format!("{}\n\n{tools}", first.content.trim_end());
        }
        _ => messages.insert(0, ChatMessage { role: Role::System, content: tools.into(), ..ChatMessage::default() }),
    }
    messages
}

/// The conversation with calls written as the model was told to write them, and their results as the
/// user's turns. What would be two turns of one side becomes one: templates refuse such.
pub(crate) fn without_calls(messages: Vec<ChatMessage>) -> Vec<ChatMessage> {
    let mut out: Vec<ChatMessage> = Vec::with_capacity(messages.len());
    let mut after_result = false;
    let name_of = |messages: &[ChatMessage], id: &str| {
        let called = messages.iter().flat_map(|m| &m.calls).find(|call| call.id == id);
        called.map(|call| call.name.clone())
    };
    let names: Vec<Option<String>> =
        messages.iter().map(|m| m.answers.as_deref().and_then(|id| name_of(&messages, id))).collect();
    for (mut message, name) in messages.into_iter().zip(names) {
        for call in std::mem::take(&mut message.calls) {
            // Checked to be JSON when it was taken.
            let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_default();
            join(&mut message.content, &json!({ "name": call.name, "arguments": arguments }).to_string());
        }
        let is_result = message.answers.take().is_some();
        if is_result {
            let name = name.or(message.name.take());
            message.content = match name {
                Some(name) => format!("Result of {name}: {}", message.content),
                None => format!("Result: {}", message.content),
            };
            message.role = Role::User;
        }
        match out.last_mut() {
            Some(last) if last.role == Role::User && message.role == Role::User && (is_result || after_result) => {
                join(&mut last.content, &message.content);
            }
            _ => out.push(message),
        }
        after_result = is_result;
    }
    out
}

fn join(text: &mut String, more: &str) {
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(more);
}

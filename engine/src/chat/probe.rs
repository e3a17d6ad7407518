//! What a template makes of tools, calls and their results. Templates do not say it; small conversations
//! with words that stand in no template show it.

use serde_json::{Value as Json, json};

use minijinja::Value;
use minijinja::value::Serde;

use super::{Compiled, Inputs, Shows};

const NAME: &str = "qzvname";
const PLACE: &str = "qzvplace";
const RESULT: &str = "qzvresult";

/// Renders the probes. A template that refuses them shows nothing.
pub(super) fn shows(template: &Compiled) -> Shows {
    let render = |messages: &Json, tools: Option<&Json>| {
        let tools = tools.map(|tools| Value::from(Serde(tools)));
        let messages = Value::from(Serde(messages));
        template.render(&Inputs { tools, add_generation_prompt: true, ..Inputs::new(messages) }).ok()
    };
    let user = json!({ "role": "user", "content": "hi" });
    let described = json!([{ "type": "function", "function": { "name": NAME, "description": "d", "parameters": {
        "type": "object", "properties": { PLACE: { "type": "string", "description": "d" } }, "required": [PLACE] } } }]);
    let asked = json!([user]);
    let told = render(&asked, Some(&described));
    let tools = told.is_some() && told != render(&asked, None);
    let arguments = json!({ PLACE: RESULT });
    let called = |content: Json, as_text: bool| {
        let arguments = if as_text { arguments.to_string().into() } else { arguments.clone() };
        let call = json!({ "id": "abcd12345", "type": "function",
            "function": { "name": NAME, "arguments": arguments } });
        render(
            &json!([user, { "role": "assistant", "content": content, "tool_calls": [call] },
                { "role": "tool", "tool_call_id": "abcd12345", "name": NAME, "content": RESULT }]),
            tools.then_some(&described),
        )
    };
    // Arguments count as shown where their value is; the result has the same, once more.
    let count = |text: &Option<String>, word: &str| text.as_ref().map_or(0, |text| text.matches(word).count());
    let (object, text) = (called("".into(), false), called("".into(), true));
    let arguments_as_text = count(&text, RESULT) > count(&object, RESULT);
    let best = if arguments_as_text { &text } else { &object };
    let without = called(Json::Null, arguments_as_text);
    let nothing = |text: &Option<String>| count(text, "None") + count(text, "null");
    Shows {
        tools,
        calls: count(best, PLACE) > count(&told.filter(|_| tools), PLACE),
        results: count(best, RESULT) > 0,
        arguments_as_text,
        no_content: without.is_some() && nothing(&without) <= nothing(best),
    }
}

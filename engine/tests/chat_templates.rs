//! Chat templates against transformers (`goldens/make_chat.py`): every conversation through every
//! template gives the same text, or is refused where transformers refuses it.
//!
//! `TANDEM_CHAT_GOLDENS=FOLDER` checks other templates (`FOLDER/*.jinja`, `FOLDER/chat.json`) instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::Value;
use serde::Deserialize;
use tandem_engine::chat::{ChatTemplate, Inputs};

#[derive(Deserialize)]
struct Golden {
    now: u64,
    cases: BTreeMap<String, Case>,
    templates: BTreeMap<String, BTreeMap<String, Outcome>>,
}

#[derive(Deserialize)]
struct Case {
    // Not as JSON values, which would sort the keys.
    messages: Value,
    tools: Option<Value>,
    documents: Option<Value>,
    more: Option<Value>,
    add_generation_prompt: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Text(String),
    Error(String),
}

#[test]
fn templates_render_as_in_transformers() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let other = std::env::var_os("TANDEM_CHAT_GOLDENS").map(PathBuf::from);
    let (folder, file) = match &other {
        Some(folder) => (folder.clone(), folder.join("chat.json")),
        None => (own.join("chat"), own.join("chat.json")),
    };
    let golden: Golden = serde_json::from_slice(&std::fs::read(file).expect("goldens")).expect("json");
    let mut wrong = Vec::new();
    for (name, outcomes) in &golden.templates {
        let source = std::fs::read_to_string(folder.join(name)).expect(name);
        let template = match ChatTemplate::new(&source, "<s>", "</s>") {
            Ok(template) => template,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (case, outcome) in outcomes {
            let Case { messages, tools, documents, more, add_generation_prompt } = &golden.cases[case];
            let inputs = Inputs {
                messages: messages.clone(),
                tools: tools.clone(),
                documents: documents.clone(),
                more: more.clone(),
                add_generation_prompt: add_generation_prompt.unwrap_or(true),
                now_unix_s: golden.now,
            };
            match (template.render_with(&inputs).map_err(|e| e.to_string()), outcome) {
                (Ok(text), Outcome::Text(wanted)) => {
                    let differing = text.lines().zip(wanted.lines()).find(|(a, b)| a != b);
                    if &text != wanted {
                        wrong.push(format!("{name}, {case}: {differing:?}"));
                    }
                }
                (Err(got), Outcome::Text(wanted)) => wrong.push(format!("{name}, {case}: {got}, not {wanted:?}")),
                // What a template raises itself reaches the caller; errors of types need only be errors.
                (Err(got), Outcome::Error(wanted)) if source.contains(wanted.as_str()) && !got.contains(wanted) => {
                    wrong.push(format!("{name}, {case}: {got:?} does not say {wanted:?}"));
                }
                (Err(_), Outcome::Error(_)) => {}
                (Ok(text), Outcome::Error(wanted)) => wrong.push(format!("{name}, {case}: {text:?}, not {wanted:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
const TOOL_USE: &str = "{{ bos_token }}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}{% endfor %}";

fn conversation() -> serde_json::Value {
    let call = serde_json::json!({ "id": "a", "type": "function",
        "function": { "name": "now", "arguments": "{\"zone\": \"UTC\"}" } });
    serde_json::json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "", "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "a", "content": "noon" }])
}

fn none() -> serde_json::Map<String, serde_json::Value> {
    serde_json::Map::new()
}

fn tools() -> serde_json::Value {
    serde_json::json!([{ "type": "function", "function": { "name": "now", "description": "d", "parameters": {} } }])
}

/// Files with a template for tools: wherever it stands, it is taken when tools are passed.
#[test]
fn the_template_for_tools_is_taken_for_tools() {
    let user = serde_json::json!([{ "role": "user", "content": "hi" }]);
    let check = |template: &ChatTemplate, what: &str| {
        assert!(template.takes_tools() && template.takes_calls() && template.takes_results(), "{what}");
        assert_eq!(template.source(), TOOL_USE, "{what}");
        let plain = template.render_json(&user, None, &none(), true, 0).expect("renders");
        let told = template.render_json(&user, Some(&tools()), &none(), true, 0).expect("renders");
        assert_eq!((plain.as_str(), told.as_str()), ("<user>hi", "<s>[now]<user>hi"), "{what}");
        // A history of calls needs it too.
        let past = template.render_json(&conversation(), Some(&tools()), &none(), true, 0).expect("renders");
        assert_eq!(past, "<s>[now]<user>hi<assistant>(now)<tool>noon", "{what}");
    };
    let named = serde_json::json!([{ "name": "rag", "template": "{{ documents }}" },
        { "name": "tool_use", "template": TOOL_USE }, { "name": "default", "template": PLAIN }]);
    let config = serde_json::json!({ "bos_token": "<s>", "chat_template": named });
    check(&ChatTemplate::from_tokenizer_config(config.to_string().as_bytes(), None).expect("a template"), "a list");
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("written");
    write("special_tokens_map.json", r#"{ "bos_token": { "content": "<s>" } }"#);
    write("chat_template.json", &serde_json::json!({ "chat_template": named }).to_string());
    check(&ChatTemplate::from_dir(folder.path()).expect("a template"), "chat_template.json");
    write("chat_template.json", &serde_json::json!({ "chat_template": "other" }).to_string());
    write("chat_template.jinja", PLAIN);
    std::fs::create_dir(folder.path().join("additional_chat_templates")).expect("a folder");
    write("additional_chat_templates/tool_use.jinja", TOOL_USE);
    check(&ChatTemplate::from_dir(folder.path()).expect("a template"), "files");
}

/// Which parts of a history a template writes is found out by rendering, not by the names it uses.
#[test]
fn templates_are_asked_what_they_show() {
    let new = |source: &str| ChatTemplate::new(source, "<s>", "</s>").expect("compiles");
    let plain = new(PLAIN);
    assert_eq!((plain.takes_tools(), plain.takes_calls(), plain.takes_results()), (false, false, true));
    // A template that gives the variable a default of its own.
    let assigns = new(
        "{%- set tools = tools or [] -%}{% if tools|length > 0 %}{{ tools|tojson }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    );
    assert!(assigns.takes_tools());
    let user = serde_json::json!([{ "role": "user", "content": "hi" }]);
    assert!(assigns.render_json(&user, Some(&tools()), &none(), true, 0).expect("renders").contains("\"now\""));
    // DeepSeek's way: no descriptions, but histories; arguments as text; content or none.
    let history = new(
        "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% endif %}{% if m['role'] == 'assistant' and m['tool_calls'] %}{% for c in m['tool_calls'] %}<C>{{ c['function']['name'] + ':' + c['function']['arguments'] }}{% endfor %}{% endif %}{% if m['role'] == 'assistant' and m['content'] is not none %}<A>{{ m['content'] }}{% endif %}{% if m['role'] == 'tool' %}<R>{{ m['content'] }}{% endif %}{% endfor %}",
    );
    assert_eq!((history.takes_tools(), history.takes_calls(), history.takes_results()), (false, true, true));
    assert!(history.wants_arguments_as_text() && !plain.wants_arguments_as_text());
    let text = history.render_json(&conversation(), None, &none(), true, 0).expect("renders");
    assert_eq!(text, "<U>hi<C>now:{\"zone\": \"UTC\"}<R>noon");
    // One that cannot do without content keeps the empty text.
    let needs = new(
        "{% for m in messages %}{{ m.content + '.' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}",
    );
    assert_eq!(needs.render_json(&conversation(), None, &none(), true, 0).expect("renders"), "hi..nownoon.");
}

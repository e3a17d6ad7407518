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

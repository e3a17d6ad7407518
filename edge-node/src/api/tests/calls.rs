//! What is found in answers of every family, whole and cut at every character.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use crate::api::call_syntax::{CallSyntax, GENERIC};
use crate::api::reading::{Reader, Reading, Said};
use crate::api::thoughts::ThoughtTags;
use crate::api::tools::Tool;

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Heard {
    reasoning: String,
    content: String,
    /// Names and arguments.
    calls: Vec<(String, String)>,
    complete: bool,
}

fn tools() -> Arc<[Tool]> {
    let parameters = json!({
        "type": "object",
        "properties": {
            "path": { "type": "string" },
            "text": { "type": "string" },
            "n": { "type": "integer" },
            "x": { "type": "number" },
            "on": { "type": "boolean" },
            "list": { "type": "array" },
            "map": { "type": "object" },
            "maybe": { "anyOf": [{ "type": "integer" }, { "type": "null" }] },
        },
    });
    let tool = |name: &str| Tool { name: name.into(), parameters: parameters.clone(), described: json!({}) };
    ["write", "now", "get", "f", "g", "x", "y"].map(tool).into()
}

fn reader(syntax: &'static CallSyntax, tools: &Arc<[Tool]>) -> Reader {
    let thoughts = ThoughtTags::of_template("");
    Reading { syntax: Some(syntax), tools: Arc::clone(tools), thoughts, open: false }.begin()
}

/// What is heard of an answer that its length ended.
fn hear(syntax: &'static CallSyntax, tools: &Arc<[Tool]>, pieces: &[&str]) -> Heard {
    hear_all(reader(syntax, tools), pieces, true)
}

fn hear_all(mut reader: Reader, pieces: &[&str], cut: bool) -> Heard {
    let mut heard = Heard::default();
    let mut said: Vec<Said> = pieces.iter().flat_map(|p| reader.push(p)).collect();
    said.extend(reader.finish(cut));
    for what in said {
        match what {
            Said::Content(text) => heard.content.push_str(&text),
            Said::Reasoning(text) => heard.reasoning.push_str(&text),
            Said::Call { index, name } => {
                assert_eq!(index, heard.calls.len());
                heard.calls.push((name, String::new()));
            }
            Said::Arguments { index, text } => heard.calls[index].1.push_str(&text),
        }
    }
    heard.complete = reader.has_calls();
    heard
}

fn syntax(template: &str) -> &'static CallSyntax {
    CallSyntax::of_template(template).unwrap_or_else(|| panic!("no syntax in {template}"))
}

fn qwen() -> &'static CallSyntax {
    syntax("<tool_call>\n<function=name>\n<parameter=key>\n</tool_call> \"arguments\"")
}

fn glm() -> &'static CallSyntax {
    syntax("<tool_call>{name}\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>")
}

fn harmony() -> &'static CallSyntax {
    syntax("<|start|>assistant<|channel|>analysis<|message|>")
}

type Row = (&'static CallSyntax, &'static str, &'static str, Vec<(&'static str, &'static str)>, bool);

/// (syntax, answer, content, calls, complete)
fn json_rows() -> Vec<Row> {
    let hermes = syntax("<tool_call> </tool_call> {\\\"arguments\\\"}");
    let mistral = syntax("[TOOL_CALLS]");
    let args = syntax("[TOOL_CALLS] [ARGS]");
    let llama = syntax("{\"name\": function name, \"parameters\": dictionary of argument name and its value}");
    let v3 = syntax("<｜tool▁calls▁begin｜><｜tool▁sep｜>```json");
    let v31 = syntax("<｜tool▁calls▁begin｜><｜tool▁sep｜>");
    vec![
        (hermes, "Just text.", "Just text.", vec![], false),
        (hermes, "a < b\n\nc <tool", "a < b\n\nc <tool", vec![], false),
        (
            hermes,
            "Let me see.\n<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": \"}\\\"{\"}}\n</tool_call>",
            "Let me see.",
            vec![("get", "{\"a\": \"}\\\"{\"}")],
            true,
        ),
        (
            hermes,
            "<tool_call>{\"arguments\": {\"é\":[1,{}]}, \"name\": \"x\"}</tool_call>\n<tool_call>\n{\"name\":\"y\",\"arguments\":{}}",
            "",
            vec![("x", "{\"é\":[1,{}]}"), ("y", "{}")],
            true,
        ),
        (hermes, "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": ", "", vec![("get", "{\"a\": ")], false),
        // Only a tool of the request is called; what else looks like a call is text.
        (
            hermes,
            "<tool_call>\n{\"name\": \"rm\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"rm\", \"arguments\": {\"a\": 1}}\n</tool_call>",
            vec![("f", "{}")],
            true,
        ),
        (hermes, "<tool_call> <tool_call>\n{\"name\": \"f\"}", "<tool_call> ", vec![("f", "{}")], true),
        (
            hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": [1]}\n</tool_call>",
            "<tool_call>\n{\"name\": \"f\", \"arguments\": [1]}\n</tool_call>",
            vec![],
            false,
        ),
        // Arguments under the other key, as text, as nothing, and not at all.
        (hermes, "<tool_call>\n{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "", vec![("f", "{\"a\": 1}")], true),
        (
            hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}\n</tool_call>",
            "",
            vec![("f", "{\"a\": 1}")],
            true,
        ),
        (hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": null}", "", vec![("f", "{}")], true),
        (hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": \"\"}", "", vec![("f", "{}")], true),
        (hermes, "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "", vec![("f", "{}")], true),
        // Brackets left open before the tag.
        (
            hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1\n</tool_call>\n<tool_call>\n{\"name\": \"g\"}",
            "",
            vec![("f", "{\"a\": [1\n]}"), ("g", "{}")],
            true,
        ),
        (hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}", "", vec![("f", "{\"a\": 1}")], true),
        (hermes, "x <tool_call> is a tag", "x <tool_call> is a tag", vec![], false),
        (hermes, "<tool_call>{\"nothing\": 1}</tool_call>", "<tool_call>{\"nothing\": 1}</tool_call>", vec![], false),
        (
            mistral,
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"q\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            "",
            vec![("f", "{\"q\": 1}"), ("g", "{}")],
            true,
        ),
        (
            args,
            "ok[TOOL_CALLS]f[ARGS]{\"q\": 1}[TOOL_CALLS]g[ARGS]{}",
            "ok",
            vec![("f", "{\"q\": 1}"), ("g", "{}")],
            true,
        ),
        (llama, " {\"name\": \"f\", \"parameters\": {\"k\": \"v\"}}", "", vec![("f", "{\"k\": \"v\"}")], true),
        (llama, "{\"name\": \"f\", \"arguments\": {\"k\": 1}}", "", vec![("f", "{\"k\": 1}")], true),
        (llama, "{\"name\": \"now\"}", "", vec![("now", "{}")], true),
        (
            llama,
            "{\"name\": \"f\", \"parameters\": {\"k\": 1}}; {\"type\": \"function\", \"name\": \"g\", \"parameters\": {}}\nWell {x}",
            "",
            vec![("f", "{\"k\": 1}"), ("g", "{}")],
            true,
        ),
        // JSON that is an answer.
        (llama, "{\"name\": \"Alice\", \"age\": 30}", "{\"name\": \"Alice\", \"age\": 30}", vec![], false),
        (llama, "{\"name\": \"f\", \"age\": 30}", "{\"name\": \"f\", \"age\": 30}", vec![], false),
        (llama, "{\"name\": \"f\", \"parameters\": 3}", "{\"name\": \"f\", \"parameters\": 3}", vec![], false),
        (
            llama,
            "{\"a\": {\"name\": \"f\", \"parameters\": {}}}",
            "{\"a\": {\"name\": \"f\", \"parameters\": {}}}",
            vec![],
            false,
        ),
        (llama, "{\"a\": 1} is a dict", "{\"a\": 1} is a dict", vec![], false),
        (llama, "{}", "{}", vec![], false),
        (llama, "{x}", "{x}", vec![], false),
        (llama, "The set {1, 2}", "The set {1, 2}", vec![], false),
        (
            llama,
            "So: {\"name\": \"f\", \"parameters\": {}}",
            "So: {\"name\": \"f\", \"parameters\": {}}",
            vec![],
            false,
        ),
        (hermes, "a\n<tool_call> is a tag", "a\n<tool_call> is a tag", vec![], false),
        (
            v3,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": {}}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            vec![("f", "{\"a\": {}}"), ("g", "{}")],
            true,
        ),
        (
            v31,
            "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Sure.",
            vec![("f", "{\"a\": 1}")],
            true,
        ),
        (&GENERIC, "{\"name\": \"f\", \"arguments\": {}}", "", vec![("f", "{}")], true),
    ]
}

/// Calls whose values are raw text.
fn tagged_rows() -> Vec<Row> {
    let glm47 = syntax("<tool_call>{name}<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>");
    assert_eq!((qwen().name, glm().name, glm47.name), ("qwen3-coder", "glm-4.5", "glm-4.7"));
    vec![
        (qwen(), "Just 1 < 2.", "Just 1 < 2.", vec![], false),
        (
            qwen(),
            "I write.\n\n<tool_call>\n<function=write>\n<parameter=path>\nä/ö.rs\n</parameter>\n<parameter=text>\n  fn a() {\n\n    \"\\\" 🦀 < </p\n}\n\n</parameter>\n</function>\n</tool_call>",
            "I write.",
            vec![("write", r#"{"path": "ä/ö.rs", "text": "  fn a() {\n\n    \"\\\" 🦀 < </p\n}\n"}"#)],
            true,
        ),
        (
            qwen(),
            "<tool_call>\n<function=write>\n<parameter=n>\n42\n</parameter>\n<parameter=x>\n-1.50\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n<parameter=list>\n[1, \"é\"]\n</parameter>\n<parameter=map>\n{\n \"a\": {}\n}\n</parameter>\n<parameter=maybe>\nnull\n</parameter>\n<parameter=path>\n42\n</parameter>\n<parameter=unknown>\n42\n</parameter>\n</function>\n</tool_call>",
            "",
            vec![(
                "write",
                "{\"n\": 42, \"x\": -1.50, \"on\": true, \"list\": [1, \"é\"], \"map\": {\n \"a\": {}\n}, \"maybe\": null, \"path\": \"42\", \"unknown\": \"42\"}",
            )],
            true,
        ),
        (
            qwen(),
            "<tool_call>\n<function=write>\n<parameter=n>\nmany\n</parameter>\n<parameter=list>\n[1,\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=unheard-of>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
            "",
            vec![("write", r#"{"n": "many", "list": "[1,"}"#), ("now", "{}")],
            true,
        ),
        // Without breaks, and with an empty value.
        (
            qwen(),
            "<tool_call><function=write><parameter=path>a</parameter><parameter=text></parameter></function></tool_call>",
            "",
            vec![("write", r#"{"path": "a", "text": ""}"#)],
            true,
        ),
        // Tags forgotten: the one around the call, those after values, the function's end.
        (
            qwen(),
            "Well.\n<function=write>\n<parameter=path>\na\n<parameter=n>\n1\n</function>\n</tool_call>",
            "Well.",
            vec![("write", r#"{"path": "a", "n": 1}"#)],
            true,
        ),
        (
            qwen(),
            "<tool_call>\n<function=write>\n<parameter=n>\n1\n</parameter>\n</tool_call>",
            "",
            vec![("write", r#"{"n": 1}"#)],
            true,
        ),
        (
            qwen(),
            "<tool_call>\n<function=now>\n<function=write>\n<parameter=n>\n1\n</parameter>\n</function>",
            "",
            vec![("now", "{}"), ("write", r#"{"n": 1}"#)],
            true,
        ),
        // Cut off.
        (qwen(), "<tool_call>\n<function=now>\n", "<tool_call>\n<function=now>\n", vec![], false),
        (
            qwen(),
            "<tool_call>\n<function=write>\n<parameter=text>\nabc</para",
            "",
            vec![("write", "{\"text\": \"abc")],
            false,
        ),
        (qwen(), "<tool_call>\n<function=write>\n<parameter=n>\n12", "", vec![("write", "{\"n\": ")], false),
        // No calls.
        (qwen(), "a\n<tool_call>\n<function=no", "a\n<tool_call>\n<function=no", vec![], false),
        (qwen(), "The <function=f> tag", "The <function=f> tag", vec![], false),
        (
            qwen(),
            "<tool_call>\n<function=bad name>\n</function> x",
            "<tool_call>\n<function=bad name>\n</function> x",
            vec![],
            false,
        ),
        (
            qwen(),
            "<tool_call>\n{\"name\": \"now\"}\n</tool_call>",
            "<tool_call>\n{\"name\": \"now\"}\n</tool_call>",
            vec![],
            false,
        ),
        (
            glm(),
            "Ich schaue.\n<tool_call>write\n<arg_key>path</arg_key>\n<arg_value>a ü\n<b></arg_value>\n<arg_key>n</arg_key>\n<arg_value>42</arg_value>\n<arg_key>list</arg_key>\n<arg_value>[{\"k\": null}]</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
            "Ich schaue.",
            vec![("write", r#"{"path": "a ü\n<b>", "n": 42, "list": [{"k": null}]}"#), ("now", "{}")],
            true,
        ),
        (
            glm47,
            "<tool_call>write<arg_key>maybe</arg_key><arg_value>7</arg_value><arg_key>text</arg_key><arg_value></arg_value></tool_call><tool_call>now</tool_call>",
            "",
            vec![("write", r#"{"maybe": 7, "text": ""}"#), ("now", "{}")],
            true,
        ),
        (
            glm(),
            "<tool_call>\nwrite\n<arg_key> n </arg_key><arg_value> 1 </arg_value>\n<tool_call>now\n</tool_call>",
            "",
            vec![("write", r#"{"n": 1}"#), ("now", "{}")],
            true,
        ),
        (glm(), "<tool_call>write\n<arg_key>n</arg_key>\n</tool_call>", "", vec![("write", "{\"n\": ")], false),
        (glm(), "<tool_call>write\n<arg_key>te", "<tool_call>write\n<arg_key>te", vec![], false),
        (glm(), "<tool_call>rm\n</tool_call>", "<tool_call>rm\n</tool_call>", vec![], false),
        (glm(), "a <tool_call> b c\n <tool_call", "a <tool_call> b c\n <tool_call", vec![], false),
    ]
}

/// gpt-oss: reasoning before the rest.
fn channel_rows() -> Vec<(&'static str, Row)> {
    let row = |answer, content, calls, complete| (harmony(), answer, content, calls, complete);
    let call = r#"{"path":"é","n":{"a":"}"}}"#;
    vec![
        ("", row("Just text, a <| b.", "Just text, a <| b.", vec![], false)),
        (
            "2 + 2 is easy.",
            row(
                "<|channel|>analysis<|message|>2 + 2 is easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4 < 5 <|.<|return|>",
                "It is 4 < 5 <|.",
                vec![],
                false,
            ),
        ),
        (
            "Ich rufe.",
            row(
                "<|channel|>analysis<|message|>Ich rufe.<|end|><|start|>assistant<|channel|>commentary to=functions.write <|constrain|>json<|message|>{\"path\":\"é\",\"n\":{\"a\":\"}\"}}<|call|>",
                "",
                vec![("write", call)],
                true,
            ),
        ),
        (
            "",
            row(
                " to=functions.write<|channel|>commentary json<|message|>{\"path\":\"é\",\"n\":{\"a\":\"}\"}}",
                "",
                vec![("write", call)],
                true,
            ),
        ),
        (
            "a\nb",
            row(
                "<|channel|>analysis<|message|>a<|end|>\n<|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>commentary<|message|>First I look.<|end|><|start|>assistant to=functions.now<|channel|>commentary<|constrain|>json<|message|><|call|><|start|>assistant<|channel|>analysis to=write code<|message|> {\"n\": 1} <|call|><|start|>assistant<|channel|>final<|message|>Done.",
                "First I look.\nDone.",
                vec![("now", "{}"), ("write", "{\"n\": 1}")],
                true,
            ),
        ),
        // Neither an object nor a tool of the request: text.
        ("", row("<|channel|>commentary to=functions.write<|message|>print(1)<|call|>", "print(1)", vec![], false)),
        ("", row("<|channel|>commentary to=functions.rm<|message|>{\"a\": 1}<|call|>", "{\"a\": 1}", vec![], false)),
        // Cut off.
        ("Hm", row("<|channel|>analysis<|message|>Hm", "", vec![], false)),
        ("", row("<|channel|>comment", "", vec![], false)),
        ("", row("<|start|>assistant to=functions.wr", "", vec![], false)),
        (
            "",
            row("<|channel|>commentary to=functions.write<|message|>{\"n\": ", "", vec![("write", "{\"n\": ")], false),
        ),
        // Malformed: headers without an end, ends without a header, markers where they have no place.
        (
            "think",
            row(
                "<|channel|>analysis<|message|>think<|channel|>final<|message|>x<|constrain|>y<|message|>z",
                "xyz",
                vec![],
                false,
            ),
        ),
        ("", row("Hi.<|end|><|start|>assistant<|message|>Ho.<|end|>rest", "Hi.\nHo.\nrest", vec![], false)),
        ("", row("assistants are <|end|>", "assistants are ", vec![], false)),
        ("", row("to", "to", vec![], false)),
        ("", row("to be", "to be", vec![], false)),
        // Not one of the request's functions.
        ("x = 1", row("<|channel|>analysis to=python code<|message|>x = 1<|call|>", "", vec![], false)),
        ("", row("<|channel|>commentary to=functions.bad.name<|message|>{}<|call|>", "{}", vec![], false)),
    ]
}

fn table() -> Vec<(&'static CallSyntax, &'static str, Heard)> {
    let plain = json_rows().into_iter().chain(tagged_rows()).map(|row| ("", row));
    let heard = |(reasoning, (syntax, answer, content, calls, complete)): (&str, Row)| {
        let calls = calls.iter().map(|(n, a)| ((*n).into(), (*a).into())).collect();
        let heard = Heard { reasoning: reasoning.into(), content: content.into(), calls, complete };
        (syntax, answer, heard)
    };
    plain.chain(channel_rows()).map(heard).collect()
}

#[test]
fn calls_of_every_family_are_found() {
    for (syntax, answer, heard) in table() {
        assert_eq!(hear(syntax, &tools(), &[answer]), heard, "{}: {answer}", syntax.name);
    }
}

#[test]
fn one_cut_or_all_of_them_change_nothing() {
    for (syntax, answer, heard) in table() {
        for (at, _) in answer.char_indices() {
            let (a, b) = answer.split_at(at);
            assert_eq!(hear(syntax, &tools(), &[a, b]), heard, "{}: {a} | {b}", syntax.name);
        }
        let parts: Vec<&str> = answer.split("").collect();
        assert_eq!(hear(syntax, &tools(), &parts), heard, "{}: {answer}", syntax.name);
    }
}

#[test]
fn beginnings_of_answers_never_show_a_marker_nor_take_anything_back() {
    for (syntax, answer, heard) in table() {
        for (at, _) in answer.char_indices() {
            let mut reader = reader(syntax, &tools());
            let (mut content, mut arguments) = (String::new(), String::new());
            for what in reader.push(&answer[..at]) {
                match what {
                    Said::Content(text) => content.push_str(&text),
                    Said::Arguments { text, .. } => arguments.push_str(&text),
                    Said::Reasoning(_) | Said::Call { .. } => {}
                }
            }
            let all: String = heard.calls.iter().map(|(_, arguments)| arguments.as_str()).collect();
            assert!(heard.content.starts_with(&content), "{}: {content}", syntax.name);
            assert!(all.starts_with(&arguments), "{}: {arguments}", syntax.name);
            assert!(!content.contains("<|ch") && !content.contains("<|start"), "{content}");
        }
    }
}

#[test]
fn arguments_come_while_they_are_written() {
    let (_, answer, _) = table().swap_remove(json_rows().len() + 1);
    let mut reader = reader(qwen(), &tools());
    let said = reader.push(&answer[..answer.find("🦀").unwrap_or_default()]);
    assert!(
        matches!(&said[..], [Said::Content(_), Said::Call { .. }, Said::Arguments { text, .. }]
        if text.ends_with(r#""path": "ä/ö.rs", "text": "  fn a() {\n\n    \"\\\" "#)),
        "{said:?}"
    );
}

#[test]
fn what_a_model_left_open_is_closed_where_it_ended_by_itself() {
    let hermes = json_rows()[0].0;
    let table = [
        (hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"x", "{\"a\": \"x\"}"),
        (qwen(), "<tool_call>\n<function=write>\n<parameter=path>\na", "{\"path\": \"a\"}"),
        (harmony(), "<|channel|>commentary to=functions.f<|message|>{\"a\": [", "{\"a\": []}"),
    ];
    for (syntax, answer, arguments) in table {
        let heard = hear_all(reader(syntax, &tools()), &[answer], false);
        assert_eq!((heard.calls[0].1.as_str(), heard.complete), (arguments, true), "{answer}");
        let cut = hear(syntax, &tools(), &[answer]);
        assert!(arguments.starts_with(&cut.calls[0].1) && !cut.complete, "{cut:?}");
    }
}

#[test]
fn calls_in_reasoning_are_none() {
    let hermes = json_rows()[0].0;
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let real = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let begun = |open| Reading { syntax: Some(hermes), tools: tools(), thoughts: ThoughtTags::of_template(""), open };
    let table = [
        (
            false,
            format!("<think>\nI could {call} but no. </think>\n\n{real}"),
            format!("I could {call} but no."),
            "",
            1,
        ),
        (false, format!(" \n<think>{call}</think>It is noon."), call.into(), "It is noon.", 0),
        (false, "<think>\n\n</think>\n\nHi.".into(), String::new(), "Hi.", 0),
        (false, "<think>a</think>\n<think>b</think> c".into(), "ab".into(), "c", 0),
        (false, format!("<think>Hm {call}"), format!("Hm {call}"), "", 0),
        (false, "<thin ice".into(), String::new(), "<thin ice", 0),
        (false, "The tag <think> opens.".into(), String::new(), "The tag <think> opens.", 0),
        (true, format!("maybe {call}</think>\n\n{real}"), format!("maybe {call}"), "", 1),
        (true, "<think>maybe</think>\n\nYes.".into(), "maybe".into(), "Yes.", 0),
        (true, "still at it".into(), "still at it".into(), "", 0),
    ];
    for (open, answer, reasoning, content, calls) in table {
        let heard = hear_all(begun(open).begin(), &[&answer], false);
        let got = (heard.reasoning.clone(), heard.content.as_str(), heard.calls.len());
        assert_eq!(got, (reasoning, content, calls), "{answer}");
        assert!(heard.calls.iter().all(|(name, _)| name == "f"));
        let parts: Vec<&str> = answer.split("").collect();
        assert_eq!(hear_all(begun(open).begin(), &parts, false), heard, "{answer}, character by character");
    }
}

#[test]
fn every_family_has_its_tags() {
    for (begin, end) in [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")] {
        let thoughts = ThoughtTags::of_template(&format!("{{% if x %}}{end}{{% endif %}}"));
        assert!(thoughts.are_open_after(&format!("[assistant]{begin}\n")) && !thoughts.are_open_after(end));
        let reading = Reading { syntax: None, tools: Arc::new([]), thoughts, open: false };
        let heard = hear_all(reading.begin(), &[&format!("{begin}a{end}b")], false);
        assert_eq!((heard.reasoning.as_str(), heard.content.as_str()), ("a", "b"));
    }
}

#[test]
fn where_nothing_can_be_called_a_call_is_text() {
    let none: Arc<[Tool]> = Arc::new([]);
    let answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f json<|message|>{\"a\": 1}<|call|>";
    let heard = Heard { reasoning: "Hm.".into(), content: "{\"a\": 1}".into(), ..Heard::default() };
    assert_eq!(hear(harmony(), &none, &[answer]), heard);
}

#[test]
fn nothing_is_held_for_ever() {
    let long = "é<\n".repeat(200_000);
    let held = |syntax, begin: &str| {
        let mut reader = reader(syntax, &tools());
        reader.push(begin);
        let said = reader.push(&long);
        let passed: usize = said
            .iter()
            .map(|what| match what {
                Said::Content(text) | Said::Reasoning(text) | Said::Arguments { text, .. } => text.len(),
                Said::Call { .. } => 0,
            })
            .sum();
        long.len().saturating_sub(passed)
    };
    let table = [
        (qwen(), "<tool_call>"),
        (qwen(), "<tool_call>\n<function=write>\n<parameter=list>\n"),
        (qwen(), "<tool_call>\n<function=write>\n<parameter=path>\n"),
        (glm(), "<tool_call>write\n<arg_key>list</arg_key>\n<arg_value>"),
        (harmony(), "<|channel|>commentary to=functions.write"),
        (&GENERIC, "{"),
        (&GENERIC, "{\"arguments\": \""),
        (&GENERIC, "{\"name\": \"f\", \"arguments\": \""),
    ];
    for (syntax, begin) in table {
        assert!(held(syntax, begin) < 16, "{}: {begin} holds {}", syntax.name, held(syntax, begin));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cuts_change_nothing(which in any::<prop::sample::Index>(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let table = table();
        let (syntax, answer, heard) = &table[which.index(table.len())];
        let boundaries: Vec<usize> = answer.char_indices().map(|(i, _)| i).chain([answer.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
        cuts.extend([0, answer.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|cut| &answer[cut[0]..cut[1]]).collect();
        prop_assert_eq!(&hear(syntax, &tools(), &pieces), heard);
    }

    #[test]
    fn no_text_is_too_strange(
        which in 0usize..3,
        parts in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "<function=", "write", ">", "\n", "<parameter=", "n", "</parameter>",
            "</function>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|start|>", "assistant",
            "<|channel|>", "final", "commentary", " to=functions.write", "<|message|>", "<|end|>", "<|call|>", "{",
            "}", "\"", "é", "🦀", "<", "|",
        ]), 0..24),
    ) {
        let syntax = [qwen(), glm(), harmony()][which];
        let answer = parts.concat();
        let heard = hear(syntax, &tools(), &[&answer]);
        let pieces: Vec<String> = answer.chars().map(String::from).collect();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        prop_assert_eq!(&hear(syntax, &tools(), &pieces), &heard);
        // Nothing that was complete is other than JSON.
        if heard.complete && heard.calls.len() == 1 {
            prop_assert!(serde_json::from_str::<serde_json::Value>(&heard.calls[0].1).is_ok(), "{:?}", heard);
        }
    }
}

//! What real templates need, in the small. Whole conversations: `tests/chat_templates.rs`.

use super::time::strftime;
use super::{ChatTemplate, Message};
use crate::error::EngineError;
use tandem_models::EDGE;

fn render(source: &str) -> Result<String, EngineError> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(&[Message::new("user", "hi \"é\"")], true, 1_721_000_000)
}

#[test]
fn the_pairs_template() {
    let t = ChatTemplate::new(EDGE.chat_template, "<|bos|>", "<|eos|>").expect("compiles");
    let messages = [Message::new("user", "a"), Message::new("assistant", "b"), Message::new("user", "c")];
    let text = t.render(&messages, true, 0).expect("renders");
    assert_eq!(text, "<|bos|><|user|>a<|assistant|>b<|eos|><|user|>c<|assistant|>");
}

#[test]
fn what_transformers_offers() {
    assert_eq!(render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}").expect("ok"), "<s>hi \"é\"</s>");
    assert_eq!(render("{{ messages[0] | tojson }}").expect("ok"), r#"{"role": "user", "content": "hi \"é\""}"#);
    assert_eq!(render("{{ [1, 2] | tojson(indent=2) }}").expect("ok"), "[\n  1,\n  2\n]");
    assert_eq!(render("{{ ' x '.strip() + 'ab'.upper() }}").expect("ok"), "xAB");
    assert_eq!(render("{% if true %}\n  a\n{% endif %}\nb").expect("ok"), "  a\nb");
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}").expect("ok"), "14 Jul 2024");
    assert_eq!(render("{% for m in messages %}{{ loop.last }}{% endfor %}").expect("ok"), "True");
}

#[test]
fn refusals_are_typed() {
    let e = render("{{ raise_exception('roles must alternate') }}");
    assert!(matches!(&e, Err(EngineError::Template(t)) if t.contains("roles must alternate")), "{e:?}");
    for bad in ["{% for %}", "{{ messages[0].content.nope() }}", "{{ 1 // 0 }}"] {
        assert!(matches!(render(bad), Err(EngineError::Template(_))), "{bad}");
    }
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless), Err(EngineError::Template(_))));
    let none = ChatTemplate::from_tokenizer_config(b"{}", None).expect("a model without a template");
    let refused = none.render(&[Message::new("user", "hi")], true, 0);
    assert!(matches!(&refused, Err(EngineError::Template(t)) if t.contains("/v1/completions")), "{refused:?}");
    assert!(matches!(ChatTemplate::from_tokenizer_config(b"{", None), Err(EngineError::Json { .. })));
}

#[test]
fn dates() {
    assert_eq!(
        strftime("%Y-%m-%d %H:%M:%S %A %a %B %% %q", 951_827_696),
        "2000-02-29 12:34:56 Tuesday Tue February % %q"
    );
    assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
    assert_eq!(strftime("%Y-%m-%d", u64::MAX), "9999-12-31");
}

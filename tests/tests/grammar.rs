//! Answers that must follow a grammar: the same on every way they can take, whole JSON at the end,
//! whatever fails.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tandem_edge_node::node::EdgeNode;
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::{Event, FinishReason, GenerateError, GenerateRequest, Mode, Origin};
use tandem_engine::constraint::{Compiled, json_object, json_schema};
use tandem_lab::cluster::{Cluster, ClusterOptions};
use tandem_proto::message::{Grammar, GrammarSyntax, SamplingParams};
use tandem_router::exchange::Exchange;
use tandem_tests::answers::{Answer, answer, connected, cut, cuts_change_nothing, questions, request};
use tandem_transport::proxy::Faults;

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "answer": { "type": "string", "maxLength": 12 },
            "kind": { "enum": ["fact", "sum", "talk"] },
            "marks": { "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 99 }, "maxItems": 2 },
        },
        "required": ["answer", "kind", "marks"],
        "additionalProperties": false,
    })
}

fn grammars() -> Vec<Grammar> {
    let call = r#"
start: "<tool_call>\n{\"name\": \"look_up\", \"arguments\": " a "}\n</tool_call>"
a: %json { "type": "object", "properties": { "q": { "type": "string", "maxLength": 8 } }, "required": ["q"], "additionalProperties": false }
"#;
    vec![
        json_schema(&schema()).expect("a schema"),
        json_object(),
        Grammar { syntax: GrammarSyntax::Lark, text: call.into() },
    ]
}

fn samplings() -> Vec<SamplingParams> {
    let sampled = SamplingParams { temperature: 1.1, top_p: 0.95, seed: 7, ..SamplingParams::default() };
    let narrow =
        SamplingParams { temperature: 0.8, top_k: 3, frequency_penalty: 0.5, seed: 8, ..SamplingParams::default() };
    vec![SamplingParams::default(), sampled, narrow]
}

fn ask(
    edge: &EdgeNode,
    question: &str,
    mode: Mode,
    sampling: &SamplingParams,
    grammar: &Arc<Compiled>,
) -> Result<GenerateRequest> {
    let request = request(edge, question, mode, sampling)?;
    Ok(GenerateRequest { grammar: Some(grammar.clone()), tokens_max: 96, ..request })
}

fn text(edge: &EdgeNode, answer: &Answer) -> String {
    edge.tokenizer().decode(&answer.ids()).expect("tokens of the vocabulary")
}

/// An answer that ended by itself is whole.
fn check(edge: &EdgeNode, answer: &Answer, grammar: &Grammar, what: &str) {
    let text = text(edge, answer);
    if answer.finish != FinishReason::Stop {
        return;
    }
    let json = text.strip_prefix("<tool_call>\n").map_or(text.as_str(), |t| t.trim_end_matches("\n</tool_call>"));
    let value: Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{what}: {e} in {text:?}"));
    assert!(value.is_object(), "{what}: {text:?}");
    if *grammar == grammars()[0] {
        let keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(keys, ["answer", "kind", "marks"], "{what}");
        assert!(value["answer"].as_str().is_some_and(|s| s.chars().count() <= 12), "{what}: {text:?}");
        assert!(["fact", "sum", "talk"].contains(&value["kind"].as_str().unwrap_or_default()), "{what}: {text:?}");
        let marks = value["marks"].as_array().expect("an array");
        assert!(marks.len() <= 2 && marks.iter().all(|m| m.as_u64().is_some_and(|n| n <= 99)), "{what}: {text:?}");
    }
}

fn options(strategy: ExactStrategy) -> ClusterOptions {
    let mut o = ClusterOptions::default();
    o.edge.exact = strategy;
    o.edge.reconnect_ms_max = 60_000;
    o
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_equals_cloud_under_a_grammar() -> Result<()> {
    let rough = Faults {
        jitter: Duration::from_millis(3),
        loss: 0.02,
        reorder: 0.02,
        ..Faults::rtt(Duration::from_millis(20))
    };
    let hidden = |mut o: ClusterOptions| {
        o.edge.send_hidden = Exchange::Always;
        o
    };
    let mut linked = options(ExactStrategy::Draft);
    linked.link = Some(rough);
    linked.seed = 5;
    let table = [
        ("drafting ahead", options(ExactStrategy::Draft)),
        ("over a rough link", linked),
        ("question by question, with hidden states", hidden(options(ExactStrategy::Synchronous))),
        ("the cloud takes over", options(ExactStrategy::Handover)),
    ];
    let plain = Cluster::start(options(ExactStrategy::Auto)).await?;
    let questions = questions(12)?;
    for (name, options) in table {
        let cluster = Cluster::start(options).await?;
        let (mut accepted, mut whole) = (0, 0);
        for grammar in grammars() {
            let compiled = cluster.edge.constraints().compile(&grammar)?;
            for (question, sampling) in questions.iter().zip(samplings().iter().cycle()) {
                let expected =
                    answer(&plain.edge, ask(&plain.edge, question, Mode::Cloud, sampling, &compiled)?, |_| {}).await?;
                let got =
                    answer(&cluster.edge, ask(&cluster.edge, question, Mode::Exact, sampling, &compiled)?, |_| {})
                        .await?;
                assert!(!got.route.degraded, "{name}: {:?}", got.route.degraded_reason);
                assert_eq!(got.ids(), expected.ids(), "{name}: {question:?} T={}", sampling.temperature);
                assert_eq!(got.finish, expected.finish, "{name}: {question:?}");
                check(&cluster.edge, &got, &grammar, name);
                accepted += got.route.accepted;
                whole += usize::from(got.finish == FinishReason::Stop);
            }
        }
        println!("{name}: {accepted} drafted tokens accepted, {whole} answers ended by themselves");
        assert!(accepted > 0 && whole > 0, "{name}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mode_follows_the_grammar() -> Result<()> {
    let cluster = Cluster::start(options(ExactStrategy::Auto)).await?;
    for grammar in grammars() {
        let compiled = cluster.edge.constraints().compile(&grammar)?;
        for mode in [Mode::Local, Mode::Auto, Mode::Exact, Mode::Cloud] {
            for (question, sampling) in questions(4)?.iter().zip(samplings().iter().cycle()) {
                let got =
                    answer(&cluster.edge, ask(&cluster.edge, question, mode, sampling, &compiled)?, |_| {}).await?;
                check(&cluster.edge, &got, &grammar, mode.name());
                // Where the grammar leaves no choice (at its end at least), the cloud is not asked.
                let forced: Vec<_> = got.tokens.iter().filter(|t| t.reason == "grammar").collect();
                assert!(forced.iter().all(|t| t.edge_top1 == Some(1.0) && t.origin == Origin::Edge), "{got:?}");
                assert!(mode == Mode::Auto || forced.is_empty(), "{got:?}");
                assert!(mode != Mode::Auto || got.finish != FinishReason::Stop || !forced.is_empty(), "{got:?}");
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_at_any_token_changes_nothing_under_a_grammar() -> Result<()> {
    let grammar = grammars().remove(0);
    for (mode, strategy, hidden) in [
        (Mode::Exact, ExactStrategy::Draft, Exchange::Auto),
        (Mode::Exact, ExactStrategy::Draft, Exchange::Always),
        (Mode::Exact, ExactStrategy::Stream, Exchange::Auto),
        (Mode::Cloud, ExactStrategy::Auto, Exchange::Auto),
    ] {
        let mut o = options(strategy);
        o.edge.send_hidden = hidden;
        let cluster = Cluster::start(o).await?;
        let compiled = cluster.edge.constraints().compile(&grammar)?;
        let what = format!("{mode:?} {strategy:?}, hidden states {hidden:?}");
        let make = || ask(&cluster.edge, "Calculate 936 + 181.", mode, &samplings()[1], &compiled);
        cuts_change_nothing(&cluster, &what, 3, make).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_cloud_the_edge_goes_on_under_the_same_grammar() -> Result<()> {
    let grammar = grammars().remove(0);
    for mode in [Mode::Auto, Mode::Exact, Mode::Cloud] {
        let mut o = options(ExactStrategy::Auto);
        o.edge.reconnect_ms_max = 50;
        let cluster = Cluster::start(o).await?;
        let compiled = cluster.edge.constraints().compile(&grammar)?;
        let make = || {
            let mut request = ask(&cluster.edge, "What is the capital of Peru?", mode, &samplings()[1], &compiled)?;
            // Every token is a question.
            request.threshold = Some(0.0);
            anyhow::Ok(request)
        };
        let whole = answer(&cluster.edge, make()?, |_| {}).await?;
        assert!(!whole.route.degraded, "{mode:?}: {:?}", whole.route.degraded_reason);
        for k in [0, 4, 9] {
            let alone = answer(&cluster.edge, make()?, |t| {
                if t.index == k {
                    cut(&cluster, true);
                }
            })
            .await?;
            check(&cluster.edge, &alone, &grammar, mode.name());
            assert_eq!(alone.finish, FinishReason::Stop, "{mode:?}: {}", text(&cluster.edge, &alone));
            // Tokens in flight may complete the answer before the cut is felt.
            if alone.ids() != whole.ids() || alone.tokens.iter().any(|t| t.reason == "cloud-away") {
                assert!(alone.route.degraded, "{mode:?}, cut after token {k}: {alone:?}");
            }
            cut(&cluster, false);
            connected(&cluster).await?;
        }
        cut(&cluster, true);
        let alone = answer(&cluster.edge, make()?, |_| {}).await?;
        check(&cluster.edge, &alone, &grammar, mode.name());
        assert!(alone.route.degraded && alone.route.degraded_reason.is_some(), "{mode:?}, away from the start");
        assert!(alone.route.cloud_tokens == 0 && alone.route.accepted == 0, "{mode:?}: {alone:?}");
    }
    Ok(())
}

/// The cloud has a bound of its own, smaller than the edge's: what it refuses reaches the client.
#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_that_the_cloud_refuses_is_the_clients_to_know() -> Result<()> {
    let mut o = options(ExactStrategy::Draft);
    o.cloud.bounds.grammar_bytes_max = 16;
    let cluster = Cluster::start(o).await?;
    let grammar = grammars().remove(0);
    let compiled = cluster.edge.constraints().compile(&grammar)?;
    for mode in [Mode::Exact, Mode::Cloud] {
        let request = ask(&cluster.edge, "Hi.", mode, &SamplingParams::default(), &compiled)?;
        let mut generation = cluster.edge.submit(request)?;
        let first = generation.events.recv().await;
        let Some(Event::Failed(GenerateError::Grammar(problem))) = first else {
            panic!("{mode:?} was not refused, but {first:?}")
        };
        assert!(problem.contains("at most 16"), "{problem}");
    }
    // `auto` does not need the cloud's: the edge writes it alone and says so.
    let mut request = ask(&cluster.edge, "Hi.", Mode::Auto, &SamplingParams::default(), &compiled)?;
    request.threshold = Some(0.0);
    let alone = answer(&cluster.edge, request, |_| {}).await?;
    check(&cluster.edge, &alone, &grammar, "auto");
    assert!(alone.route.degraded && alone.route.cloud_tokens == 0);
    Ok(())
}

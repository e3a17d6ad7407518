//! `tandem chat`: one question or a conversation with a running node.

use std::io::{BufRead as _, IsTerminal as _};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::args::{ChatArgs, Global};
use crate::failure::{Code, Failure};
use crate::node_client::NodeClient;
use crate::ready::{print, print_line};
use crate::sse::Events;

/// Most messages of a conversation that are sent along; older ones are dropped.
const MESSAGES_MAX: usize = 64;

/// An answer as it arrived.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    text: String,
    ttft: Option<Duration>,
    took: Duration,
    finish: Option<String>,
    usage: Value,
}

/// Asks once, or talks until the input ends.
pub(crate) async fn run(global: &Global, args: &ChatArgs) -> Result<(), Failure> {
    let client = NodeClient::new(global, &args.node)?;
    let work = async {
        match &args.prompt {
            Some(prompt) => once(global, args, &client, prompt).await,
            None => converse(global, args, &client).await,
        }
    };
    tokio::select! {
        ended = work => ended,
        _ = tokio::signal::ctrl_c() => {
            // The half-written line stays; the node stops when the connection goes.
            print_line("");
            Err(Failure::reported(Code::Interrupted))
        }
    }
}

async fn once(global: &Global, args: &ChatArgs, client: &NodeClient, prompt: &str) -> Result<(), Failure> {
    let messages = [json!({ "role": "user", "content": prompt })];
    let answer = ask(args, client, &messages, !global.json).await?;
    if global.json {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let value = json!({
            "text": answer.text,
            "finish_reason": answer.finish,
            "ttft_ms": answer.ttft.map(ms),
            "total_ms": ms(answer.took),
            "usage": answer.usage,
        });
        print_line(&value.to_string());
    } else {
        print_line(&format!("     [{}]", summary(&answer)));
    }
    Ok(())
}

async fn converse(global: &Global, args: &ChatArgs, client: &NodeClient) -> Result<(), Failure> {
    // Fails at once where no node runs, not after the first question was typed.
    client.send(client.get("/ready")).await?;
    let terminal = std::io::stdin().is_terminal();
    if terminal && !global.json {
        print_line("Ask something; an empty line begins anew, Ctrl-D ends.");
    }
    let mut messages: Vec<Value> = Vec::new();
    while let Some(line) = read_line(terminal && !global.json).await? {
        let line = line.trim();
        if line.is_empty() {
            messages.clear();
            continue;
        }
        messages.push(json!({ "role": "user", "content": line }));
        match ask(args, client, &messages, !global.json).await {
            Ok(answer) => {
                if global.json {
                    print_line(&json!({ "text": answer.text, "usage": answer.usage }).to_string());
                } else {
                    print_line(&format!("     [{}]", summary(&answer)));
                }
                messages.push(json!({ "role": "assistant", "content": answer.text }));
                let surplus = messages.len().saturating_sub(MESSAGES_MAX);
                messages.drain(..surplus);
            }
            // The node is there and said no (too long, busy): the conversation can go on.
            Err(failure) if failure.code() == Code::Refused => {
                failure.report(global.json);
                messages.pop();
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

async fn read_line(prompt: bool) -> Result<Option<String>, Failure> {
    let reading = tokio::task::spawn_blocking(move || {
        if prompt {
            // Without a reader the answer will end the conversation.
            let _ = print("> ");
        }
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|read| (read > 0).then_some(line))
    });
    let read = reading.await.map_err(|e| Failure::new(Code::Failed, e))?;
    read.map_err(|e| Failure::new(Code::Failed, format!("standard input: {e}")))
}

async fn ask(args: &ChatArgs, client: &NodeClient, messages: &[Value], show: bool) -> Result<Answer, Failure> {
    let begun = Instant::now();
    let mut response = client.send(client.post("/v1/chat/completions", &body(args, messages))).await?;
    let mut events = Events::default();
    let mut answer = Answer::default();
    while let Some(piece) = response.chunk().await.map_err(|e| client.unreachable(&e))? {
        for event in events.push(&piece).map_err(|e| Failure::new(Code::Refused, e))? {
            if event == "[DONE]" {
                answer.took = begun.elapsed();
                return Ok(answer);
            }
            let new = take(&mut answer, &event, begun)?;
            if show && !new.is_empty() {
                print(&new)?;
            }
        }
    }
    let message = "the node's answer broke off; what was printed is all there is. Ask again, or see its log";
    Err(Failure::new(Code::Refused, message))
}

fn body(args: &ChatArgs, messages: &[Value]) -> Value {
    let mut body = json!({
        "model": args.model,
        "messages": messages,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    if let Some(mode) = args.mode {
        body["tandem"] = json!({ "mode": mode.name() });
    }
    if let Some(tokens) = args.max_tokens {
        body["max_tokens"] = json!(tokens);
    }
    if let Some(temperature) = args.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    body
}

/// Takes one event into the answer; gives the new text.
fn take(answer: &mut Answer, event: &str, begun: Instant) -> Result<String, Failure> {
    let value: Value = serde_json::from_str(event)
        .map_err(|e| Failure::new(Code::Refused, format!("the node sent an event that is no JSON: {e}")))?;
    if let Some(message) = value["error"]["message"].as_str() {
        return Err(Failure::new(Code::Refused, message));
    }
    if value["usage"].is_object() {
        answer.usage = value["usage"].clone();
    }
    let choice = &value["choices"][0];
    if let Some(finish) = choice["finish_reason"].as_str() {
        answer.finish = Some(finish.to_owned());
    }
    let new = choice["delta"]["content"].as_str().unwrap_or_default().to_owned();
    if !new.is_empty() {
        answer.ttft.get_or_insert_with(|| begun.elapsed());
        answer.text.push_str(&new);
    }
    Ok(new)
}

/// What the answer took, for people.
fn summary(answer: &Answer) -> String {
    let route = &answer.usage["tandem"];
    let count = |name: &str| route[name].as_u64().unwrap_or(0);
    let mut parts = vec![format!("{} tokens edge", count("edge_tokens"))];
    if count("accepted") > 0 {
        parts.push(format!("{} verified", count("accepted")));
    }
    parts.push(format!("{} cloud", count("cloud_tokens")));
    if let Some(ttft) = answer.ttft {
        parts.push(format!("ttft {:.0} ms", ttft.as_secs_f64() * 1e3));
    }
    parts.push(format!("{} B sent", count("bytes_up")));
    if route["degraded"] == true {
        let why = route["degraded_reason"].as_str().unwrap_or("the cloud was away");
        parts.push(format!("without the cloud: {why}"));
    }
    if answer.finish.as_deref() == Some("length") {
        parts.push("cut at the token limit".into());
    }
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_becomes_an_answer_and_a_summary() {
        let begun = Instant::now();
        let mut answer = Answer::default();
        for (event, text) in [
            (
                r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}"#,
                "",
            ),
            (r#"{"choices":[{"index":0,"delta":{"content":"Li"},"finish_reason":null}],"usage":null}"#, "Li"),
            (r#"{"choices":[{"index":0,"delta":{"content":"ma."},"finish_reason":null}],"usage":null}"#, "ma."),
            (r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"tandem":{},"usage":null}"#, ""),
            (
                r#"{"choices":[],"usage":{"completion_tokens":4,"tandem":{"edge_tokens":3,"accepted":0,"cloud_tokens":1,"bytes_up":212,"degraded":false}}}"#,
                "",
            ),
        ] {
            assert_eq!(take(&mut answer, event, begun).unwrap(), text);
        }
        assert_eq!(answer.text, "Lima.");
        answer.ttft = Some(Duration::from_millis(9));
        assert_eq!(summary(&answer), "3 tokens edge · 1 cloud · ttft 9 ms · 212 B sent");
        answer.usage["tandem"]["degraded"] = json!(true);
        answer.usage["tandem"]["degraded_reason"] = json!("no link");
        assert!(summary(&answer).ends_with("without the cloud: no link"));
    }

    #[test]
    fn errors_in_the_stream_are_failures() {
        let failure =
            take(&mut Answer::default(), r#"{"error":{"message":"engine gone"}}"#, Instant::now()).unwrap_err();
        assert_eq!((failure.code(), failure.to_string().as_str()), (Code::Refused, "engine gone"));
    }
}

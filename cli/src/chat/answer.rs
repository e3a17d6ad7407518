//! One answer as it arrives: asked, read from the stream, and summed up.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_upstream::sse::Events;

use super::Asking;
use crate::failure::{Code, Failure};
use crate::node_client::NodeClient;
use crate::ready::print;

/// Longest event that a node sends, bytes.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// An answer as it arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) ttft: Option<Duration>,
    pub(super) took: Duration,
    pub(super) finish: Option<String>,
    pub(super) usage: Value,
}

/// Asks, and takes what comes into `answer`, which keeps what has arrived if this is dropped or fails. Shows
/// it meanwhile with `show`.
pub(super) async fn ask(
    asking: &Asking<'_>,
    client: &NodeClient,
    messages: &[Value],
    show: bool,
    answer: &mut Answer,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut response = client.send(client.post("/v1/chat/completions", &body(asking, messages))).await?;
    let mut events = Events::new(EVENT_BYTES_MAX);
    while let Some(piece) = response.chunk().await.map_err(|e| client.unreachable(&e))? {
        for event in events.push(&piece).map_err(|e| Failure::new(Code::Refused, e))? {
            if event == "[DONE]" {
                answer.took = begun.elapsed();
                return Ok(());
            }
            let new = take(answer, &event, begun)?;
            if show && !new.is_empty() {
                print(&new)?;
            }
        }
    }
    let message = "the node's answer broke off; what was printed is all there is. Ask again, or see its log";
    Err(Failure::new(Code::Refused, message))
}

fn body(asking: &Asking<'_>, messages: &[Value]) -> Value {
    let args = asking.args;
    let mut body = json!({
        "model": args.model,
        "messages": messages,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    if let Some(mode) = asking.mode {
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
pub(super) fn summary(answer: &Answer) -> String {
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

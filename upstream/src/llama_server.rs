//! llama-server (llama.cpp): `POST /completion` continues a sequence and returns the distribution before each token
//! that it writes. It scores no tokens that it did not write, so a draft is judged by having it write the same
//! (read and run against b11549).

use serde::Deserialize;
use serde_json::{Value, json};

use crate::ask::{Ask, Row};
use crate::fault::Fault;
use crate::http::Address;

/// Route that everything here speaks to.
pub(crate) const PATH: &str = "/completion";

/// The body that asks for `ask`'s first distribution, and for as many after it as the engine's own continuation
/// yields. `slots` is how many sequences the server keeps.
///
/// The server keeps the probabilities of a token to itself whose text ends inside a character. Where one distribution
/// is asked for, it is made to write `plain_token`, whose text is whole: a bias moves what it writes and not the
/// probabilities, which are those before sampling.
pub(crate) fn body(ask: &Ask<'_>, slots: usize, plain_token: u32) -> Value {
    let bias = if rows_wanted(ask) == 1 { json!([[plain_token, 1000.0]]) } else { json!([]) };
    json!({
        "logit_bias": bias,
        "prompt": ask.tokens[..ask.from],
        "n_predict": rows_wanted(ask),
        "n_probs": ask.top,
        "id_slot": ask.lane % slots.max(1),
        "cache_prompt": true,
        "stream": true,
        "return_tokens": true,
        // The greedy path, whatever the server's flags say: what is chosen is decided from the distributions, which
        // are those before sampling.
        "samplers": ["top_k"],
        "top_k": 1,
        "mirostat": 0,
        "post_sampling_probs": false,
        // The answer's end is the caller's: the path goes on behind a token that ends it.
        "ignore_eos": true,
        "stop": [],
        // Tokens that server-side speculation accepts come without probabilities.
        "speculative.n_max": 0,
    })
}

/// Distributions that a call asks for.
pub(crate) fn rows_wanted(ask: &Ask<'_>) -> usize {
    ask.tokens.len() + 1 - ask.from + ask.ahead
}

/// Token ids of a text.
pub(crate) async fn tokenize(address: &Address, text: &str) -> Result<Vec<u32>, Fault> {
    let body = json!({ "content": text, "add_special": false, "parse_special": true });
    let answer = address.post("/tokenize", &body).await?;
    serde_json::from_value(answer["tokens"].clone()).map_err(|e| Fault::Unexpected(format!("/tokenize: {e}")))
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    stop: bool,
    #[serde(default)]
    completion_probabilities: Vec<Position>,
    /// Tokens written so far.
    #[serde(default)]
    tokens_predicted: usize,
    error: Option<Value>,
    timings: Option<Timings>,
}

#[derive(Deserialize)]
struct Position {
    id: u32,
    logprob: Option<f32>,
    #[serde(default)]
    top_logprobs: Vec<Entry>,
}

/// JSON has no −∞: the server writes null.
#[derive(Deserialize)]
struct Entry {
    id: u32,
    logprob: Option<f32>,
}

#[derive(Deserialize)]
struct Timings {
    #[serde(default)]
    cache_n: usize,
    #[serde(default)]
    prompt_n: usize,
}

/// What an event says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Read {
    /// Distributions, in order.
    pub(crate) rows: Vec<Row>,
    /// Tokens written up to here. If more than there were distributions, some were left out before these.
    pub(crate) written: usize,
    /// At the end: tokens of the prompt that were computed, and those that were found in the cache.
    pub(crate) end: Option<(usize, usize)>,
}

/// Reads the data of an event of a call that asked for `top` tokens of each distribution.
pub(crate) fn read(event: &str, top: usize) -> Result<Read, Fault> {
    let unexpected = |text: String| Fault::Unexpected(format!("{PATH}: {text}"));
    let event: Event = serde_json::from_str(event).map_err(|e| unexpected(e.to_string()))?;
    if let Some(error) = event.error {
        return Err(Fault::of_error(PATH, &error));
    }
    let mut rows = Vec::new();
    // The last event repeats nothing in a stream; where one does, it has no rows that are not known.
    for position in event.completion_probabilities {
        let logprob = |v: Option<f32>| v.unwrap_or(f32::NEG_INFINITY);
        let likeliest: Vec<(u32, f32)> = position.top_logprobs.iter().map(|e| (e.id, logprob(e.logprob))).collect();
        if likeliest.len() < top {
            let text = format!("{} of {top} probabilities; is speculation switched on in the server?", likeliest.len());
            return Err(unexpected(text));
        }
        let named = vec![(position.id, logprob(position.logprob))];
        rows.push(Row { top: likeliest, named, next: Some(position.id) });
    }
    let timings = event.timings.unwrap_or(Timings { cache_n: 0, prompt_n: 0 });
    Ok(Read { rows, written: event.tokens_predicted, end: event.stop.then_some((timings.prompt_n, timings.cache_n)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(tokens: &[u32], from: usize, ahead: usize) -> Ask<'_> {
        Ask { tokens, from, ahead, top: 2, lane: 5 }
    }

    #[test]
    fn a_call_continues_the_sequence_from_the_first_position_wanted() {
        let several = body(&ask(&[1, 2, 3, 4], 2, 3), 4, 9);
        assert_eq!((several["prompt"].clone(), several["n_predict"].clone()), (json!([1, 2]), json!(6)));
        assert_eq!((several["n_probs"].clone(), several["id_slot"].clone()), (json!(2), json!(1)));
        assert_eq!(several["logit_bias"], json!([]));
        let one = body(&ask(&[1, 2, 3, 4], 4, 0), 4, 9);
        assert_eq!((one["n_predict"].clone(), one["logit_bias"].clone()), (json!(1), json!([[9, 1000.0]])));
    }

    /// Events of b11549, shortened.
    #[test]
    fn events_become_distributions() {
        let event = r#"{"index":0,"content":"_","tokens":[79],"stop":false,"id_slot":-1,"tokens_predicted":3,"completion_probabilities":[{"id":79,"token":"_","bytes":[95],"logprob":-3.8743553,"top_logprobs":[{"id":79,"token":"_","bytes":[95],"logprob":-3.8743553},{"id":314,"token":" is","bytes":[32],"logprob":null}]}]}"#;
        let row = Row {
            top: vec![(79, -3.874_355_3), (314, f32::NEG_INFINITY)],
            named: vec![(79, -3.874_355_3)],
            next: Some(79),
        };
        assert_eq!(read(event, 2), Ok(Read { rows: vec![row], written: 3, end: None }));
        let last = r#"{"index":0,"content":"","tokens":[],"stop":true,"stop_type":"limit","timings":{"cache_n":2,"prompt_n":1}}"#;
        assert_eq!(read(last, 2), Ok(Read { rows: vec![], written: 0, end: Some((1, 2)) }));
    }

    #[test]
    fn what_is_no_distribution_is_a_fault() {
        let speculated = r#"{"stop":false,"completion_probabilities":[{"id":7,"logprob":0.0,"top_logprobs":[]}]}"#;
        let error = r#"{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_ctx":64}}"#;
        for (event, words) in [(speculated, "speculation"), ("{\"stop\":fal", "EOF"), (error, "64 tokens")] {
            let fault = read(event, 2).expect_err(event);
            assert!(fault.to_string().contains(words), "{fault}");
        }
    }
}

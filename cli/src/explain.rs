//! `tandem explain`: why each token of an answer stayed on the edge or went to the cloud.

use serde_json::Value;

use crate::args::{ExplainArgs, Global};
use crate::failure::{Code, Failure};
use crate::node_client::NodeClient;
use crate::ready::{print_json, print_line};

/// Longest id that is asked for, bytes.
const ID_BYTES_MAX: usize = 256;

/// Prints the table of an answer.
pub(crate) async fn run(global: &Global, args: &ExplainArgs) -> Result<(), Failure> {
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    if args.id.is_empty() || args.id.len() > ID_BYTES_MAX || !args.id.bytes().all(sound) {
        let message = format!("`{}` is no id of an answer; take it from x-request-id, or try `last`", args.id);
        return Err(Failure::new(Code::Usage, message));
    }
    let client = NodeClient::new(global, &args.node)?;
    let response = client.send(client.get(&format!("/tandem/explain/{}", args.id))).await?;
    let answer = client.json(response).await?;
    if global.json {
        print_json(&answer);
    } else {
        table(&answer).iter().for_each(|line| print_line(line));
    }
    Ok(())
}

fn table(answer: &Value) -> Vec<String> {
    let route = &answer["route"];
    let count = |name: &str| route[name].as_u64().unwrap_or(0);
    let mut lines = vec![
        format!(
            "{}  mode {}  {} prompt tokens ({} held)  {:.0} ms",
            answer["request_id"].as_str().unwrap_or("?"),
            answer["mode"].as_str().unwrap_or("?"),
            answer["prompt_tokens"],
            count("cached_tokens"),
            answer["seconds"].as_f64().unwrap_or(0.0) * 1e3,
        ),
        format!(
            "{} edge · {} verified · {} cloud · {} round trips · {} B up · {} B down · {} drafts rolled back",
            count("edge_tokens"),
            count("accepted"),
            count("cloud_tokens"),
            count("round_trips"),
            count("bytes_up"),
            count("bytes_down"),
            count("rolled_back"),
        ),
    ];
    if route["degraded"] == true {
        let why = route["degraded_reason"].as_str().unwrap_or("the cloud was away");
        lines.push(format!("without the cloud for a part: {why}"));
    }
    lines.push(format!(
        "{:>4}  {:<16}{:<10}{:>6}  {:>6}  {:>7}  {:>6}  {}",
        "#", "token", "origin", "p", "p edge", "entropy", "risk", "reason"
    ));
    for token in answer["tokens"].as_array().into_iter().flatten() {
        let number = |name: &str| token[name].as_f64().map_or_else(|| "–".to_owned(), |n| format!("{n:.3}"));
        let p = token["logprob"].as_f64().map_or_else(|| "–".to_owned(), |logprob| format!("{:.3}", logprob.exp()));
        lines.push(format!(
            "{:>4}  {:<16}{:<10}{:>6}  {:>6}  {:>7}  {:>6}  {}",
            token["index"].as_u64().unwrap_or(0),
            shown(token["text"].as_str().unwrap_or_default()),
            token["origin"].as_str().unwrap_or("?"),
            p,
            number("edge_top1"),
            number("edge_entropy"),
            number("risk"),
            token["reason"].as_str().unwrap_or("?"),
        ));
    }
    lines
}

/// A token's text with its spaces and line ends visible.
fn shown(text: &str) -> String {
    format!("{text:?}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_per_token() {
        let answer = json!({
            "request_id": "r1", "mode": "auto", "prompt_tokens": 9, "seconds": 0.012,
            "route": { "edge_tokens": 1, "cloud_tokens": 1, "cached_tokens": 7, "degraded": true, "degraded_reason": "cut" },
            "tokens": [
                { "index": 0, "text": " Li\n", "origin": "edge", "logprob": 0.0, "edge_top1": 0.99, "edge_entropy": 0.05,
                  "risk": 0.01, "reason": "sure" },
                { "index": 1, "text": "ma", "origin": "cloud", "logprob": -0.5, "edge_top1": null, "edge_entropy": null,
                  "risk": null, "reason": "risk" },
            ],
        });
        let lines = table(&answer);
        assert_eq!(lines.len(), 6);
        assert!(lines[0].contains("9 prompt tokens (7 held)"), "{}", lines[0]);
        assert!(lines[2].contains("cut"));
        assert!(lines[4].contains("\" Li\\n\"") && lines[4].contains("sure") && lines[4].contains("1.000"));
        assert!(lines[5].contains("0.607") && lines[5].contains('–'));
    }
}

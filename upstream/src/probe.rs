//! Finds out what an engine can do by trying it.

use serde_json::Value;

use crate::ask::{Ask, Row};
use crate::engine::{Abilities, Engine, Kind};
use crate::fault::Fault;
use crate::http::Address;

/// Probabilities that the probe asks for.
const PROBED_TOP: usize = 16;

/// Tokens that the probe has the engine write.
const PROBED_ROWS: usize = 6;

/// Differences between logprobs that are more than rounding, nats.
const SPREAD_MAX: f32 = 0.25;

/// Finds out what the engine at `address` can do, with about ten small calls. `sample` are token ids of a text in
/// the model's vocabulary, each of whole characters.
///
/// # Errors
/// [`Fault::Unexpected`] says what it lacks; any other if it cannot be asked now.
pub async fn probe(address: Address, sample: &[u32]) -> Result<Engine, Fault> {
    let mut abilities = identify(&address).await?;
    let Some(&plain_token) = sample.first() else { return Err(Fault::Unexpected("no text to try it with".into())) };
    abilities.plain_token = plain_token;
    let engine = Engine::new(address.clone(), abilities.clone());
    let ask = |tokens: &[u32], ahead| {
        let (engine, tokens) = (engine.clone(), tokens.to_vec());
        async move {
            let from = tokens.len();
            let ask = Ask { tokens: &tokens, from, ahead, top: PROBED_TOP, lane: 0 };
            let mut rows = engine.rows(&ask).await?;
            let mut all = Vec::new();
            while let Some(row) = rows.next().await? {
                all.push(row);
            }
            Ok::<Vec<Row>, Fault>(all)
        }
    };
    let written = ask(sample, PROBED_ROWS - 1).await?;
    if written.len() != PROBED_ROWS {
        return Err(Fault::Unexpected(format!("{} of {PROBED_ROWS} distributions came back", written.len())));
    }
    // The same positions one by one: what it writes ahead must be what it says when asked for it alone.
    let mut tokens = sample.to_vec();
    for row in &written {
        let alone = ask(&tokens, 0).await?;
        let [alone] = alone.as_slice() else {
            return Err(Fault::Unexpected(format!("{} distributions for one position", alone.len())));
        };
        let spread = spread(row, alone);
        abilities.spread = abilities.spread.max(spread);
        if spread > SPREAD_MAX {
            let text = format!("a position's logprobs differ by {spread} nats between two calls");
            return Err(Fault::Unexpected(text));
        }
        let Some(next) = row.next else { return Err(Fault::Unexpected("it writes no token ids".into())) };
        tokens.push(next);
    }
    Ok(Engine::new(address, abilities))
}

/// Largest difference between the logprobs that both have, nats.
fn spread(a: &Row, b: &Row) -> f32 {
    let of = |id: u32| b.top.iter().find(|(other, _)| *other == id).map(|(_, v)| *v);
    a.top.iter().filter_map(|&(id, v)| Some((v - of(id)?).abs())).fold(0.0, f32::max)
}

/// What the engine says that it is.
pub(crate) async fn identify(address: &Address) -> Result<Abilities, Fault> {
    let props = match address.get("/props").await {
        Ok(props) => props,
        Err(Fault::NoRoute { .. }) => {
            let text = "it is no llama-server (no route /props), and no other engine is spoken to yet";
            return Err(Fault::Unexpected(text.into()));
        }
        Err(e) => return Err(e),
    };
    let models = address.get("/v1/models").await?;
    of_llama_server(&props, &models)
}

fn of_llama_server(props: &Value, models: &Value) -> Result<Abilities, Fault> {
    let lacking = |what: &str| Fault::Unexpected(format!("llama-server says no {what}"));
    let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    let settings = &props["default_generation_settings"];
    let model = &models["data"][0];
    Ok(Abilities {
        kind: Kind::LlamaServer,
        version: props["build_info"].as_str().unwrap_or_default().to_owned(),
        model: model["id"].as_str().ok_or_else(|| lacking("model"))?.to_owned(),
        context_tokens: count(&settings["n_ctx"]).ok_or_else(|| lacking("context (n_ctx)"))?,
        vocabulary: count(&model["meta"]["n_vocab"]).ok_or_else(|| lacking("vocabulary (n_vocab)"))?,
        lanes: count(&props["total_slots"]).unwrap_or(1),
        top_max: count(&model["meta"]["n_vocab"]).unwrap_or(1),
        plain_token: 0,
        spread: 0.0,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_llama_server_says_what_it_serves() {
        let props =
            json!({ "default_generation_settings": { "n_ctx": 4096 }, "total_slots": 2, "build_info": "b11549-abc" });
        let models = json!({ "data": [{ "id": "m", "meta": { "n_vocab": 49152, "n_ctx_train": 8192 } }] });
        let found = of_llama_server(&props, &models).expect("all is there");
        assert_eq!((found.context_tokens, found.vocabulary, found.lanes, found.top_max), (4096, 49152, 2, 49152));
        let fault = of_llama_server(&props, &json!({ "data": [] })).expect_err("no model");
        assert!(fault.to_string().contains("no model"), "{fault}");
    }

    #[test]
    fn rows_are_compared_where_they_overlap() {
        let row = |top: &[(u32, f32)]| Row { top: top.to_vec(), ..Row::default() };
        assert_eq!(spread(&row(&[(1, -0.5), (2, -1.0)]), &row(&[(2, -1.25), (1, -0.5)])), 0.25);
        assert_eq!(spread(&row(&[(1, -0.5)]), &row(&[(2, -1.25)])), 0.0);
    }
}

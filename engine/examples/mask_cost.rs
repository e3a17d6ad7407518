//! What masks cost: µs per token over a vocabulary, for grammars that people use.
//!
//!     cargo run --release -p tandem-engine --example mask_cost -- TOKENIZER.json|MODEL.gguf ["text with JSON"]
//!
//! Follows a JSON text token by token and prints one JSON line per grammar.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use tandem_engine::constraint::{Constraints, json_object, json_schema};
use tandem_engine::tokenizer::Tokenizer;

const TEXT: &str = r#"{"city": "Lima", "people": 10092000, "tags": ["capital", "coast", "Über-groß"], "near": [{"city": "Callao", "km": 12.5}, {"city": "Ica", "km": 303}], "about": "Lima is the capital and the largest city of Peru, on the desert coast by the Pacific."}"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args().nth(1).ok_or("give a tokenizer.json or a GGUF file")?;
    let path = Path::new(&file);
    let tokenizer = Arc::new(match path.extension().is_some_and(|e| e == "gguf") {
        true => Tokenizer::from_gguf(path)?,
        false => Tokenizer::from_json(&std::fs::read(path)?)?,
    });
    let schema = json!({
        "type": "object",
        "properties": {
            "city": { "type": "string" },
            "people": { "type": "integer" },
            "tags": { "type": "array", "items": { "type": "string", "maxLength": 20 } },
            "near": { "type": "array", "items": {
                "type": "object",
                "properties": { "city": { "type": "string" }, "km": { "type": "number" } },
                "required": ["city", "km"],
                "additionalProperties": false,
            } },
            "about": { "type": "string" },
        },
        "required": ["city", "people", "tags", "near", "about"],
        "additionalProperties": false,
    });
    let ids = tokenizer.encode(TEXT)?;
    let constraints = Constraints::new(tokenizer.clone());
    let begun = Instant::now();
    constraints.compile(&json_object())?;
    let first_us = begun.elapsed().as_micros();
    for (name, grammar) in [("json_object", json_object()), ("json_schema", json_schema(&schema)?)] {
        let fresh = Constraints::new(tokenizer.clone());
        fresh.compile(&json_object())?;
        let begun = Instant::now();
        let compiled = fresh.compile(&grammar)?;
        let compile_us = begun.elapsed().as_micros();
        let mut us = Vec::new();
        for _ in 0..5 {
            let followed = compiled.follow(&[]);
            for end in 0..ids.len() {
                let begun = Instant::now();
                let mask = followed.allowed(&ids[..end])?;
                us.push(begun.elapsed().as_nanos() as f64 / 1000.0);
                assert!(mask.allows(ids[end]), "token {end} of the text is not in the grammar");
            }
        }
        us.sort_by(f64::total_cmp);
        let at = |share: f64| us[((us.len() - 1) as f64 * share) as usize];
        let line = json!({
            "grammar": name, "vocabulary": tokenizer.vocab_size(), "tokens": us.len(), "trie_us": first_us,
            "compile_us": compile_us, "mean_us": us.iter().sum::<f64>() / us.len() as f64,
            "p50_us": at(0.5), "p95_us": at(0.95), "max_us": at(1.0),
        });
        println!("{line}");
    }
    Ok(())
}

//! `tandem model show`: what a model is, and what of it fits into this machine.

use serde_json::{Value, json};
use tandem_engine::{Inspection, inspect, memory};

use super::human;
use crate::args::{Global, ModelShowArgs};
use crate::failure::{Code, Failure};
use crate::pair;
use crate::ready::{print_json, print_line};

/// What memory allows.
struct Fits {
    available: Option<u64>,
    /// Longest context of one sequence, tokens.
    context: usize,
    /// Sequences of that length at once.
    sessions: usize,
}

fn fits(model: &Inspection) -> Fits {
    let available = memory::available_bytes();
    let rest = available.map(|bytes| bytes.saturating_sub(model.weight_bytes));
    if rest == Some(0) {
        return Fits { available, context: 0, sessions: 0 };
    }
    let context = memory::context_tokens(&model.spec, memory::kv_blocks(&model.spec, 1, rest));
    let blocks = memory::kv_blocks(&model.spec, usize::MAX, rest);
    let per_session = context.div_ceil(tandem_proto::limits::KV_BLOCK_TOKENS).max(1);
    Fits { available, context, sessions: blocks / per_session }
}

/// Prints it.
pub(super) fn run(global: &Global, args: &ModelShowArgs) -> Result<(), Failure> {
    let found = pair::find(&args.name, Code::Usage)?;
    let model = inspect(&found.files())
        .map_err(|e| Failure::new(Code::Failed, format!("the model {} cannot be read: {e}", found.name)))?;
    let fits = fits(&model);
    if global.json {
        print_json(&to_json(&found.name, &model, &fits));
        return Ok(());
    }
    let spec = &model.spec;
    let line = |name: &str, text: String| print_line(&format!("{name:<14} {text}"));
    line("model", found.name);
    line(
        "architecture",
        format!(
            "{:?}, {} layers, width {}, vocabulary {}",
            spec.family, spec.layers, spec.hidden_size, spec.vocab_size
        ),
    );
    let active = match model.active_parameters {
        all if all == model.parameters => String::new(),
        active => format!(", {} of them for one token", count(active)),
    };
    line("parameters", count(model.parameters) + &active);
    line("weights", format!("{}, {} read for one token", human(model.weight_bytes), human(model.token_weight_bytes)));
    for (name, share) in &model.formats {
        line("", format!("{name:<6} {:>5} tensors {:>10}", share.tensors, human(share.bytes)));
    }
    line("KV state", format!("{} for one token", human(model.token_kv_bytes)));
    line("context", format!("{} tokens", spec.context_tokens));
    line(
        "fits here",
        match (fits.available, fits.context) {
            (Some(free), 0) => {
                format!("no: {} are free, the weights alone take {}", human(free), human(model.weight_bytes))
            }
            (free, context) => format!(
                "{context} tokens of context{}; {} such sessions at once",
                free.map(|free| format!(" in {} of free memory", human(free))).unwrap_or_default(),
                fits.sessions
            ),
        },
    );
    Ok(())
}

fn to_json(name: &str, model: &Inspection, fits: &Fits) -> Value {
    let spec = &model.spec;
    let formats = model.formats.iter().map(|(name, share)| {
        (name.clone(), json!({ "tensors": share.tensors, "parameters": share.parameters, "bytes": share.bytes }))
    });
    json!({
        "model": name,
        "architecture": format!("{:?}", spec.family),
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "vocabulary": spec.vocab_size,
        "context_tokens": spec.context_tokens,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "weight_bytes": model.weight_bytes,
        "weight_bytes_per_token": model.token_weight_bytes,
        "kv_bytes_per_token": model.token_kv_bytes,
        "formats": formats.collect::<serde_json::Map<_, _>>(),
        "memory": {
            "available_bytes": fits.available,
            "fits": fits.context > 0,
            "context_tokens": fits.context,
            "sessions": fits.sessions,
        },
    })
}

/// Parameters for people.
fn count(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

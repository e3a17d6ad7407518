//! How well a model predicts a text: the measure by which two engines on one file are compared.

use crate::error::EngineError;
use crate::kv::KvPool;
use crate::model::{HEAD_ROWS_MAX, Model, ROWS_MAX, Rows};
use tandem_proto::limits::KV_BLOCK_TOKENS;

/// Sum over `tokens[1..]` of −ln p(token | the tokens before it), in nats; the tokens run as one pass
/// from an empty cache.
///
/// # Errors
/// [`EngineError::Shape`] for more than [`ROWS_MAX`] tokens, and what the model says.
pub fn negative_log_likelihood(model: &Model, tokens: &[u32]) -> Result<f64, EngineError> {
    let Some(predicting) = tokens.len().checked_sub(1).filter(|n| *n > 0) else { return Ok(0.0) };
    if tokens.len() > ROWS_MAX {
        return Err(EngineError::Shape(format!("{} tokens in one pass; at most {ROWS_MAX} are taken", tokens.len())));
    }
    let layers = 0..model.spec().layers;
    let mut pool = KvPool::new(model.kv_layout(), layers.clone(), predicting.div_ceil(KV_BLOCK_TOKENS))?;
    let mut seq = pool.sequence();
    let hidden = model.embed(&tokens[..predicting])?;
    let hidden = model.layers(layers, &mut pool, &mut [Rows { seq: &mut seq, rows: predicting }], hidden)?;
    let rows: Vec<usize> = (0..predicting).collect();
    let mut sum = 0.0;
    for rows in rows.chunks(HEAD_ROWS_MAX) {
        let logits = model.head(&hidden, rows)?;
        for (row, logits) in rows.iter().zip(logits.data.chunks_exact(logits.vocab)) {
            // `embed` has checked all tokens but the last.
            let token = tokens[row + 1];
            let chosen = logits.get(token as usize).ok_or(EngineError::BadToken { token, vocab: logits.len() })?;
            sum += log_sum_exp(logits) - f64::from(*chosen);
        }
    }
    Ok(sum)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + logits.iter().map(|l| (f64::from(*l) - top).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LoadOptions;
    use crate::sampling::argmax;

    #[test]
    fn log_sum_exp_neither_overflows_nor_vanishes() {
        assert!((log_sum_exp(&[1000.0; 4]) - (1000.0 + 4f64.ln())).abs() < 1e-9);
        assert!((log_sum_exp(&[-1000.0, f32::NEG_INFINITY]) + 1000.0).abs() < 1e-9);
    }

    #[test]
    fn a_text_costs_what_its_tokens_cost_one_by_one() {
        let embedded = &tandem_models::ALL[0];
        let files = crate::ModelFiles::Embedded { config: embedded.config, weights: embedded.weights };
        let model = Model::load(&files, &LoadOptions { threads: 1, ..LoadOptions::default() }).expect("loads");
        let layers = 0..model.spec().layers;
        let mut pool = KvPool::new(model.kv_layout(), layers.clone(), 8).expect("pool");
        let mut seq = pool.sequence();
        let (mut tokens, mut sum) = (vec![5u32], 0.0);
        for step in 0..80u32 {
            let last = &tokens[tokens.len() - 1..];
            let hidden = model.embed(last).expect("embeds");
            let items = &mut [Rows { seq: &mut seq, rows: 1 }];
            let hidden = model.layers(layers.clone(), &mut pool, items, hidden).expect("runs");
            let logits = model.head(&hidden, &[0]).expect("logits").data;
            let next = if step % 3 == 0 { step } else { argmax(&logits) };
            let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            sum -= (f64::from(logits[next as usize]).exp() / total).ln();
            tokens.push(next);
        }
        let whole = negative_log_likelihood(&model, &tokens).expect("scores");
        assert!((whole - sum).abs() < 1e-3 * sum.abs(), "{whole} as a whole, {sum} step by step");
        assert!(negative_log_likelihood(&model, &[]).expect("nothing").abs() < 1e-12);
        assert!(negative_log_likelihood(&model, &[1, u32::MAX]).is_err());
    }
}

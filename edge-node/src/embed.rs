//! Embeddings of texts by the edge model.

use std::sync::Arc;

use tandem_engine::runner::{Job, Runner, RunnerError};
use tandem_engine::{EngineError, Model};
use tandem_proto::ids::SessionId;
use tandem_proto::message::SamplingParams;
use tokio::sync::oneshot;

use crate::choice::EdgeChoice;
use crate::request::GenerateError;

/// Drops the engine's state of the text, also when the request for the embedding was cancelled.
struct Forget<'a>(&'a Runner<EdgeChoice>, SessionId);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.0.forget(self.1) {
            tracing::warn!("the state of a text could not be dropped: {e}");
        }
    }
}

/// The hidden state of the last token after the final norm, of length 1. The last token is the one that has
/// seen all others: a decoder's mean over tokens would weigh what the first ones could not know.
pub(crate) async fn embed(
    runner: &Runner<EdgeChoice>,
    model: &Model,
    tokens: Vec<u32>,
) -> Result<Vec<f32>, GenerateError> {
    let failed = |e: &dyn std::fmt::Display| GenerateError::Engine(e.to_string());
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|e| failed(&format!("the system gives no random numbers: {e}")))?;
    let key = SessionId(id);
    let length = tokens.len();
    let job = Job {
        key,
        sequence: tokens,
        feed_from: 0,
        trunk_layers: 0,
        hidden: None,
        outputs_from: length,
        prompt_len: length,
        sampling: Arc::new(SamplingParams::default()),
        top_logprobs: 0,
        is_prefill: true,
        keep_hidden_from: None,
        constraint: None,
        prefix: None,
    };
    let (done, result) = oneshot::channel();
    let _forget = Forget(runner, key);
    runner.submit(job, Box::new(move |r| drop(done.send(r)))).map_err(|e| failed(&e))?;
    let result = result.await.unwrap_or_else(|_| Err(RunnerError::Stopped("it has ended".into())));
    let last = result.map_err(|e| failed(&e))?.outputs.pop().ok_or_else(|| failed(&"the text has no last token"))?;
    unit(model.final_norm(&last.hidden)).map_err(|e| failed(&e))
}

/// Scales to length 1.
fn unit(values: Result<Vec<f32>, EngineError>) -> Result<Vec<f32>, EngineError> {
    let mut values = values?;
    let length = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    if !length.is_finite() || length == 0.0 {
        return Err(EngineError::Shape(format!("the embedding has length {length}")));
    }
    values.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_have_length_one() {
        assert_eq!(unit(Ok(vec![3.0, -4.0])).unwrap(), [0.6, -0.8]);
        for bad in [vec![0.0, 0.0], vec![f32::NAN], vec![f32::INFINITY, 1.0], vec![]] {
            assert!(unit(Ok(bad)).is_err());
        }
    }
}

//! `echo` of text completions: the prompt before the answer, with its own log probabilities where those
//! are asked for.

use std::sync::Arc;

use tandem_proto::message::Alternative;

use super::backend::Backend;
use super::error::ApiError;
use super::respond::{Plan, choose_mode};
use crate::request::{GenerateError, Mode, Scored};

/// A prompt as it is handed out again.
#[derive(Clone, Debug)]
pub(crate) struct Echoed {
    pub(crate) text: String,
    /// Characters of it.
    pub(crate) chars: usize,
    /// Its tokens, if log probabilities are asked for.
    pub(crate) tokens: Vec<EchoedToken>,
}

/// A token of a prompt.
#[derive(Clone, Debug)]
pub(crate) struct EchoedToken {
    pub(crate) id: u32,
    /// Natural log of its probability after the tokens before it; the first has none.
    pub(crate) logprob: Option<f32>,
    pub(crate) alternatives: Vec<Alternative>,
    /// Characters of the prompt before it.
    pub(crate) chars_before: usize,
}

/// The prompts of a plan, scored by the edge's model if log probabilities are asked for.
pub(crate) async fn of_prompts(backend: &Arc<dyn Backend>, plan: &Plan) -> Result<Vec<Echoed>, ApiError> {
    let Plan { prompts, params, logprobs, .. } = plan;
    let (mode, _) = choose_mode(plan, &backend.status())?;
    if logprobs.is_some() && matches!(mode, Mode::Exact | Mode::Cloud) {
        let message = format!(
            "`echo` with `logprobs` scores the prompt on the device; mode `{}` has the cloud's log probabilities: \
             leave one out, or ask for `tandem:local`",
            mode.name()
        );
        return Err(ApiError::bad_request("unsupported_field", message).about("echo"));
    }
    let failed = |error: GenerateError| ApiError::from_generation(&error, *params);
    let mut all = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let scores = match logprobs {
            Some(alternatives) => {
                let scores = backend.score(prompt.clone(), *alternatives).map_err(failed)?;
                let gone = |_| GenerateError::Engine("the prompt was not scored".into());
                scores.await.unwrap_or_else(|e| Err(gone(e))).map_err(failed)?
            }
            None => Vec::new(),
        };
        all.push(echoed(backend.as_ref(), prompt, logprobs.map(|_| scores)).map_err(failed)?);
    }
    Ok(all)
}

/// `scores` are those of all tokens but the first.
fn echoed(backend: &dyn Backend, prompt: &[u32], scores: Option<Vec<Scored>>) -> Result<Echoed, GenerateError> {
    let tokenizer = backend.tokenizer();
    let mut decoder = tokenizer.stream();
    let (mut text, mut chars, mut tokens) = (String::new(), 0, Vec::new());
    let mut scores = scores.map(|scores| std::iter::once(None).chain(scores.into_iter().map(Some)));
    for &id in prompt {
        let piece = decoder.push(tokenizer, id).map_err(|error| GenerateError::Engine(error.to_string()))?;
        if let Some(score) = scores.as_mut().map(|scores| scores.next().flatten()) {
            let logprob = score.as_ref().map(|score| score.logprob);
            let alternatives = score.map(|score| score.alternatives).unwrap_or_default();
            tokens.push(EchoedToken { id, logprob, alternatives, chars_before: chars });
        }
        chars += piece.chars().count();
        text.push_str(&piece);
    }
    let rest = decoder.finish();
    chars += rest.chars().count();
    text.push_str(&rest);
    Ok(Echoed { text, chars, tokens })
}

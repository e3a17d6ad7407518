//! Writes the answers of `/v1/chat/completions` and `/v1/completions`.

use std::sync::Arc;

use super::backend::Backend;
use super::error::ApiError;
use super::pieces::WrittenToken;
use super::reading::Said;
use super::reply::{Body, Shape, Usage, finish_word};
use super::writer::{Ended, Frames, WholeChoice, Writer, encode};

/// Marks the end of a stream.
const DONE: &str = "[DONE]";

/// The writer.
pub(crate) struct CompletionWriter {
    /// For the spelling of tokens.
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) shape: Shape,
    /// What the request has taken so far, if every chunk is to say so.
    pub(crate) usage: Option<Usage>,
}

impl CompletionWriter {
    /// A writer for bodies of this shape.
    pub(crate) fn new(backend: Arc<dyn Backend>, shape: Shape) -> Self {
        Self { backend, shape, usage: None }
    }

    fn push(&self, chunk: Body<'_>, out: &mut Frames) -> Result<(), ApiError> {
        match &self.usage {
            Some(usage) => out.push(&chunk.with_usage(usage.clone())),
            None => out.push(&chunk),
        }
    }
}

impl Writer for CompletionWriter {
    fn begin(&mut self, choices: usize, _: &Usage, out: &mut Frames) -> Result<(), ApiError> {
        let first = |index| [self.shape.role_chunk(index), self.shape.echo_chunk(index, self.backend.tokenizer())];
        (0..choices).flat_map(first).flatten().try_for_each(|chunk| out.push(&chunk))
    }

    fn count(&mut self, usage: &Usage) {
        if self.shape.stream_options.continuous_usage {
            self.usage = Some(usage.clone());
        }
    }

    fn say(
        &mut self,
        choice: usize,
        said: Vec<Said>,
        tokens: &[WrittenToken],
        out: &mut Frames,
    ) -> Result<(), ApiError> {
        let silent = said.iter().all(|s| matches!(s, Said::Content(text) if text.is_empty()));
        if silent && (tokens.is_empty() || !self.shape.reports_tokens()) {
            return Ok(());
        }
        self.push(self.shape.piece_chunk(choice, said, tokens, self.backend.tokenizer()), out)
    }

    fn end(&mut self, choice: usize, ended: Ended, out: &mut Frames) -> Result<(), ApiError> {
        let finish = finish_word(ended.finish, ended.called, self.shape.legacy);
        self.push(self.shape.finish_chunk(choice, finish, ended.route), out)
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) -> Result<(), ApiError> {
        if self.shape.stream_options.include_usage {
            out.push(&self.shape.usage_chunk(usage))?;
        }
        out.push_text(DONE);
        Ok(())
    }

    fn fail(&mut self, error: &ApiError, out: &mut Frames) {
        out.push_text(&error.body().to_string());
        // Clients that wait for it must not take the end for a broken connection.
        out.push_text(DONE);
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> Result<Vec<u8>, ApiError> {
        let choice = |(index, WholeChoice { said, tokens, ended })| {
            let finish = finish_word(ended.finish, ended.called, self.shape.legacy);
            self.shape.whole_choice(index, said, &tokens, finish, self.backend.tokenizer())
        };
        encode(&self.shape.whole(choices.into_iter().enumerate().map(choice).collect(), usage))
    }
}

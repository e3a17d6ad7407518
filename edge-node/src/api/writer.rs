//! How an endpoint writes answers. What [`respond`](super::respond) reads out of the tokens goes through
//! a [`Writer`], whole or event by event; there is one per API whose bodies differ.

use std::collections::VecDeque;

use axum::response::sse::Event as SseEvent;
use serde::Serialize;

use super::error::ApiError;
use super::pieces::WrittenToken;
use super::reading::Said;
use super::reply::Usage;
use crate::request::{FinishReason, RouteSummary};

/// The end of a choice.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// Why it ended.
    pub(crate) finish: FinishReason,
    /// It has a complete call.
    pub(crate) called: bool,
    /// The stop string that ended it.
    pub(crate) stop: Option<String>,
    /// What it took.
    pub(crate) route: RouteSummary,
}

/// A choice from beginning to end.
#[derive(Debug)]
pub(crate) struct WholeChoice {
    /// What it says.
    pub(crate) said: Vec<Said>,
    /// The tokens of its text.
    pub(crate) tokens: Vec<WrittenToken>,
    /// Its end.
    pub(crate) ended: Ended,
}

/// Events of a stream that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct Frames(VecDeque<Frame>);

#[derive(Debug)]
struct Frame {
    event: Option<&'static str>,
    data: String,
}

impl Frames {
    /// Queues an event without a name.
    pub(crate) fn push(&mut self, body: &impl Serialize) -> Result<(), ApiError> {
        self.queue(None, body)
    }

    /// Queues the event called `event`.
    pub(crate) fn push_named(&mut self, event: &'static str, body: &impl Serialize) -> Result<(), ApiError> {
        self.queue(Some(event), body)
    }

    /// Queues text that is no JSON.
    pub(crate) fn push_text(&mut self, data: &str) {
        self.0.push_back(Frame { event: None, data: data.to_owned() });
    }

    fn queue(&mut self, event: Option<&'static str>, body: &impl Serialize) -> Result<(), ApiError> {
        self.0.push_back(Frame { event, data: serde_json::to_string(body).map_err(|e| encoding_failed(&e))? });
        Ok(())
    }

    /// Takes the next event.
    pub(crate) fn pop(&mut self) -> Option<SseEvent> {
        self.0.pop_front().map(|Frame { event, data }| match event {
            Some(event) => SseEvent::default().event(event).data(data),
            None => SseEvent::default().data(data),
        })
    }
}

/// Writes the answers to one request.
pub(crate) trait Writer: Send + 'static {
    /// Queues what a stream begins with; `usage` counts the prompt.
    fn begin(&mut self, choices: usize, usage: &Usage, out: &mut Frames) -> Result<(), ApiError>;

    /// What the request has taken until what is written next.
    fn count(&mut self, _usage: &Usage) {}

    /// Queues what a choice says next.
    fn say(
        &mut self,
        choice: usize,
        said: Vec<Said>,
        tokens: &[WrittenToken],
        out: &mut Frames,
    ) -> Result<(), ApiError>;

    /// Queues the end of a choice.
    fn end(&mut self, choice: usize, ended: Ended, out: &mut Frames) -> Result<(), ApiError>;

    /// Queues the end of the stream.
    fn close(&mut self, usage: Usage, out: &mut Frames) -> Result<(), ApiError>;

    /// Queues the error that ends the stream.
    fn fail(&mut self, error: &ApiError, out: &mut Frames);

    /// The body of a whole answer.
    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> Result<Vec<u8>, ApiError>;

    /// What a silent stream sends, if it is not a comment.
    fn keep_alive(&self) -> Option<SseEvent> {
        None
    }
}

/// JSON text of a body.
pub(crate) fn encode(body: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(body).map_err(|error| encoding_failed(&error))
}

fn encoding_failed(error: &serde_json::Error) -> ApiError {
    ApiError::internal(format!("the answer could not be encoded: {error}"))
}

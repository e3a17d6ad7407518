//! The choices of one request under way: their events, interleaved as they come, turned into text
//! that can be sent, and counted.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tandem_engine::tokenizer::StreamDecoder;

use super::backend::Backend;
use super::meter::Meter;
use super::pieces::{Assembler, Piece};
use super::reply::Usage;
use crate::request::{
    Event, FinishReason, GenerateError, GenerateRequest, Generation, Origin, RouteSummary, TokenEvent,
};

/// What happens next in a request.
#[derive(Debug)]
pub(crate) enum Update {
    /// A choice goes on.
    Piece {
        /// Index of the choice.
        choice: usize,
        piece: Piece,
    },
    /// A choice has ended; its last piece came before.
    End { choice: usize, finish: FinishReason, route: RouteSummary },
    /// The request has failed; nothing follows.
    Failed(GenerateError),
}

/// The choices of one request. Dropping it stops those that still run.
pub(crate) struct Answers {
    backend: Arc<dyn Backend>,
    choices: Vec<Running>,
    /// Choice that is asked first, so that none starves the others.
    turn: usize,
    /// The end of a choice whose last piece was just handed out.
    ended: Option<Update>,
    prompt_tokens: u64,
    completion_tokens: u64,
    route: RouteSummary,
    meter: Meter,
}

struct Running {
    request_id: String,
    /// `None` once the choice has ended.
    generation: Option<Generation>,
    decoder: StreamDecoder,
    assembler: Assembler,
    /// Tokens by origin, for an answer that a stop string ends.
    counted: RouteSummary,
    last_token: Option<Instant>,
}

impl Answers {
    /// Begins every choice or none.
    pub(crate) fn begin(
        backend: Arc<dyn Backend>,
        requests: Vec<GenerateRequest>,
        stops: &[String],
        prompt_tokens: u64,
        meter: Meter,
    ) -> Result<Self, GenerateError> {
        let mut choices = Vec::with_capacity(requests.len());
        for request in requests {
            let request_id = request.request_id.clone();
            choices.push(Running {
                request_id,
                generation: Some(backend.submit(request)?),
                decoder: backend.tokenizer().stream(),
                assembler: Assembler::new(stops),
                counted: RouteSummary::default(),
                last_token: None,
            });
        }
        meter.begin(prompt_tokens);
        let route = RouteSummary::default();
        Ok(Self { backend, choices, turn: 0, ended: None, prompt_tokens, completion_tokens: 0, route, meter })
    }

    /// Number of choices.
    pub(crate) fn len(&self) -> usize {
        self.choices.len()
    }

    /// The next update; `None` after every choice has ended or one has failed.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        if let Some(update) = self.ended.take() {
            return Some(update);
        }
        loop {
            let (choice, event) = poll_fn(|cx| self.poll_event(cx)).await?;
            let updates = match event {
                Some(Event::Token(event)) => self.on_token(choice, event),
                Some(Event::Done(done)) => self.on_end(choice, done.finish, done.route),
                Some(Event::Failed(error)) => Some(self.on_failure(error)),
                None => Some(self.on_failure(GenerateError::Engine("the answer ended without a result".into()))),
            };
            if updates.is_some() {
                return updates;
            }
        }
    }

    /// Tokens so far and what they took.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            tandem: self.route.clone(),
        }
    }

    /// The next event of any running choice; ready with `None` if no choice runs.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Option<Event>)>> {
        let count = self.choices.len();
        let mut running = false;
        for offset in 0..count {
            let choice = (self.turn + offset) % count;
            let Some(generation) = &mut self.choices[choice].generation else { continue };
            running = true;
            if let Poll::Ready(event) = generation.events.poll_recv(cx) {
                self.turn = (choice + 1) % count;
                return Poll::Ready(Some((choice, event)));
            }
        }
        if running { Poll::Pending } else { Poll::Ready(None) }
    }

    fn on_token(&mut self, choice: usize, event: TokenEvent) -> Option<Update> {
        let running = &mut self.choices[choice];
        self.completion_tokens += 1;
        match event.origin {
            Origin::Edge => running.counted.edge_tokens += 1,
            Origin::Verified => running.counted.accepted += 1,
            Origin::Cloud => running.counted.cloud_tokens += 1,
        }
        running.last_token = Some(self.meter.token(event.origin, running.last_token));
        let text = match running.decoder.push(self.backend.tokenizer(), event.id) {
            Ok(text) => text,
            Err(error) => return Some(self.on_failure(GenerateError::Engine(error.to_string()))),
        };
        let (piece, stopped) = running.assembler.push(event, &text);
        if stopped {
            let route = self.backend.route_so_far(&running.request_id).unwrap_or_else(|| running.counted.clone());
            let end = self.end(choice, FinishReason::Stop, route);
            return Some(self.with_last_piece(choice, piece, end));
        }
        (!piece.is_empty()).then_some(Update::Piece { choice, piece })
    }

    fn on_end(&mut self, choice: usize, finish: FinishReason, route: RouteSummary) -> Option<Update> {
        let running = &mut self.choices[choice];
        let rest = running.decoder.finish();
        let piece = running.assembler.finish(&rest);
        let end = self.end(choice, finish, route);
        Some(self.with_last_piece(choice, piece, end))
    }

    fn on_failure(&mut self, error: GenerateError) -> Update {
        for choice in &mut self.choices {
            if choice.generation.take().is_some() {
                self.meter.end("error", None);
            }
        }
        Update::Failed(error)
    }

    fn end(&mut self, choice: usize, finish: FinishReason, route: RouteSummary) -> Update {
        self.choices[choice].generation = None;
        let outcome = match finish {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        self.meter.end(outcome, Some(&route));
        add(&mut self.route, &route);
        Update::End { choice, finish, route }
    }

    fn with_last_piece(&mut self, choice: usize, piece: Piece, end: Update) -> Update {
        if piece.is_empty() {
            return end;
        }
        self.ended = Some(end);
        Update::Piece { choice, piece }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        for _ in self.choices.iter().filter(|choice| choice.generation.is_some()) {
            self.meter.end("gone", None);
        }
    }
}

/// Adds what one choice took to the sum.
fn add(sum: &mut RouteSummary, one: &RouteSummary) {
    sum.edge_tokens = sum.edge_tokens.saturating_add(one.edge_tokens);
    sum.accepted = sum.accepted.saturating_add(one.accepted);
    sum.cloud_tokens = sum.cloud_tokens.saturating_add(one.cloud_tokens);
    sum.round_trips = sum.round_trips.saturating_add(one.round_trips);
    sum.bytes_up = sum.bytes_up.saturating_add(one.bytes_up);
    sum.bytes_down = sum.bytes_down.saturating_add(one.bytes_down);
    sum.rolled_back = sum.rolled_back.saturating_add(one.rolled_back);
    sum.degraded |= one.degraded;
    if sum.degraded_reason.is_none() {
        sum.degraded_reason.clone_from(&one.degraded_reason);
    }
}

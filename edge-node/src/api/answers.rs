//! The choices of one request under way: their events, interleaved as they come, turned into text
//! that can be sent, and counted.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tandem_engine::tokenizer::StreamDecoder;
use tokio::sync::oneshot;
use tokio::time::{Timeout, timeout};

use super::backend::Backend;
use super::meter::Meter;
use super::pieces::{Assembler, Piece};
use super::reply::{PromptTokens, Usage};
use crate::admission::Slots;
use crate::request::{
    Event, FinishReason, GenerateError, GenerateRequest, Generation, Origin, RouteSummary, TokenEvent,
};

/// Longest wait for what an answer took after a stop string ended it, milliseconds. Beyond it the
/// tokens counted here are reported, without bytes and round trips.
const WIND_DOWN_MS_MAX: u64 = 1000;

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
    End {
        choice: usize,
        finish: FinishReason,
        /// The stop string that ended it.
        stop: Option<String>,
        route: RouteSummary,
    },
    /// The request has failed; nothing follows.
    Failed(GenerateError),
}

/// Where a choice stands.
enum State {
    /// Tokens come.
    Open(Generation),
    /// A stop string has ended it; the node says what it took.
    WindingDown(Pin<Box<Timeout<oneshot::Receiver<RouteSummary>>>>),
    /// Over.
    Ended,
}

/// What a choice says next.
enum Heard {
    /// An event; `None` if the node has gone silent for good.
    Event(Option<Event>),
    /// What it took until the stop string, if the node said so in time.
    WoundDown(Option<RouteSummary>),
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
    /// Special tokens whose spelling is wanted in the text.
    spelt: Vec<u32>,
}

struct Running {
    state: State,
    decoder: StreamDecoder,
    assembler: Assembler,
    /// Tokens by origin, for an answer that a stop string ends.
    counted: RouteSummary,
    last_token: Option<Instant>,
    /// Which of the request's prompts it answers.
    prompt: usize,
    /// Tokens of the prompt whose state was held, once it is over.
    cached: u64,
}

impl Answers {
    /// Begins every choice or none. `goes_on` says that the text of an answer goes on where its prompt ends.
    pub(crate) fn begin(
        backend: Arc<dyn Backend>,
        mut slots: Slots,
        requests: Vec<GenerateRequest>,
        stops: &[String],
        spelt: Vec<u32>,
        (prompt_tokens, goes_on): (u64, bool),
        meter: Meter,
    ) -> Result<Self, GenerateError> {
        meter.begin(prompt_tokens);
        // Dropped with what it has begun where the node takes one of them and not the next.
        let mut all = Self {
            choices: Vec::with_capacity(requests.len()),
            turn: 0,
            ended: None,
            prompt_tokens,
            completion_tokens: 0,
            route: RouteSummary::default(),
            meter,
            spelt,
            backend,
        };
        let mut last_prompt = Vec::new();
        for request in requests {
            // The answers to one prompt follow each other.
            let prompt = all.choices.last().map_or(0, |last| last.prompt + usize::from(request.prompt != last_prompt));
            last_prompt.clone_from(&request.prompt);
            let tokenizer = all.backend.tokenizer();
            let decoder = match goes_on {
                true => tokenizer.stream_after(&request.prompt).map_err(|e| GenerateError::Engine(e.to_string()))?,
                false => tokenizer.stream(),
            };
            // As many were asked for as there are choices.
            let Some(slot) = slots.take() else {
                return Err(GenerateError::Engine("a choice has no slot".into()));
            };
            all.choices.push(Running {
                state: State::Open(all.backend.submit(request, slot)?),
                decoder,
                assembler: Assembler::new(stops),
                counted: RouteSummary::default(),
                last_token: None,
                prompt,
                cached: 0,
            });
        }
        Ok(all)
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
            let (choice, said) = poll_fn(|cx| self.poll_choices(cx)).await?;
            let update = match said {
                Heard::Event(Some(Event::Token(event))) => self.on_token(choice, event),
                Heard::Event(Some(Event::Done(done))) => Some(self.on_end(choice, done.finish, done.route)),
                Heard::Event(Some(Event::Failed(error))) => Some(self.on_failure(error)),
                Heard::Event(None) => {
                    Some(self.on_failure(GenerateError::Engine("the answer ended without a result".into())))
                }
                Heard::WoundDown(route) => Some(self.on_wound_down(choice, route)),
            };
            if update.is_some() {
                return update;
            }
        }
    }

    /// Tokens so far and what they took.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: PromptTokens { cached_tokens: self.cached_tokens() },
            reasoning_tokens: 0,
            tandem: self.route.clone(),
        }
    }

    /// Tokens of the prompts whose state was there before the request: a prompt is computed once for all its
    /// answers, so of these the one that found least counts.
    fn cached_tokens(&self) -> u64 {
        let prompts = self.choices.chunk_by(|a, b| a.prompt == b.prompt);
        prompts.filter_map(|answers| answers.iter().map(|answer| answer.cached).min()).sum()
    }

    /// What any choice says next; ready with `None` if all have ended.
    fn poll_choices(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Heard)>> {
        let count = self.choices.len();
        let mut running = false;
        for offset in 0..count {
            let choice = (self.turn + offset) % count;
            let said = match &mut self.choices[choice].state {
                State::Open(generation) => generation.events.poll_recv(cx).map(Heard::Event),
                State::WindingDown(route) => {
                    route.as_mut().poll(cx).map(|route| Heard::WoundDown(route.ok().and_then(Result::ok)))
                }
                State::Ended => continue,
            };
            running = true;
            if let Poll::Ready(said) = said {
                self.turn = (choice + 1) % count;
                return Poll::Ready(Some((choice, said)));
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
        let tokenizer = self.backend.tokenizer();
        let text = match running.decoder.push(tokenizer, event.id) {
            Ok(text) if self.spelt.contains(&event.id) => text + tokenizer.token(event.id).unwrap_or_default(),
            Ok(text) => text,
            Err(error) => return Some(self.on_failure(GenerateError::Engine(error.to_string()))),
        };
        let (piece, stopped) = running.assembler.push(event, &text);
        if stopped {
            running.state.wind_down();
        }
        (!piece.is_empty()).then_some(Update::Piece { choice, piece })
    }

    fn on_end(&mut self, choice: usize, finish: FinishReason, route: RouteSummary) -> Update {
        let running = &mut self.choices[choice];
        let rest = running.decoder.finish();
        let piece = running.assembler.finish(&rest);
        let end = self.end(choice, finish, route);
        if piece.is_empty() {
            return end;
        }
        self.ended = Some(end);
        Update::Piece { choice, piece }
    }

    fn on_wound_down(&mut self, choice: usize, route: Option<RouteSummary>) -> Update {
        let counted = &self.choices[choice].counted;
        // The node may have been ahead of the stop string; those tokens are not in the answer.
        let RouteSummary { edge_tokens, accepted, cloud_tokens, .. } = *counted;
        let route = RouteSummary { edge_tokens, accepted, cloud_tokens, ..route.unwrap_or_default() };
        self.end(choice, FinishReason::Stop, route)
    }

    fn on_failure(&mut self, error: GenerateError) -> Update {
        for running in &mut self.choices {
            if !matches!(std::mem::replace(&mut running.state, State::Ended), State::Ended) {
                self.meter.end("error");
            }
        }
        Update::Failed(error)
    }

    fn end(&mut self, choice: usize, finish: FinishReason, route: RouteSummary) -> Update {
        self.choices[choice].state = State::Ended;
        let outcome = match finish {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        self.meter.end(outcome);
        self.choices[choice].cached = u64::from(route.cached_tokens);
        self.route.add(&route);
        Update::End { choice, finish, stop: self.choices[choice].assembler.stopped_by().map(str::to_owned), route }
    }
}

impl State {
    /// Stops the work and waits for what it took.
    fn wind_down(&mut self) {
        if let Self::Open(Generation { route, .. }) = std::mem::replace(self, Self::Ended) {
            let most = Duration::from_millis(WIND_DOWN_MS_MAX);
            *self = Self::WindingDown(Box::pin(timeout(most, route)));
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        for _ in self.choices.iter().filter(|running| !matches!(running.state, State::Ended)) {
            self.meter.end("gone");
        }
    }
}

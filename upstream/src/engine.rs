//! One engine behind a URL.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ask::{Ask, Row};
use crate::fault::Fault;
use crate::http::{Address, EventStream};
use crate::llama_server;
use crate::pace::Pace;
use crate::probe;

/// What an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// llama.cpp's server.
    LlamaServer,
}

impl Kind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LlamaServer => "llama-server",
        }
    }
}

/// What an engine can do, as it was found by trying ([`crate::probe()`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Abilities {
    /// What it is.
    pub kind: Kind,
    /// Its version, as it says; empty if it does not.
    pub version: String,
    /// Name of the model that it serves.
    pub model: String,
    /// Context of a sequence, tokens.
    pub context_tokens: usize,
    /// Rows of the model's head: ids below it are taken.
    pub vocabulary: usize,
    /// Sequences whose computed state it keeps.
    pub lanes: usize,
    /// The most probabilities that it returns of a distribution.
    pub top_max: usize,
    /// A token whose text is whole characters.
    pub plain_token: u32,
    /// Largest difference between the logprobs of equal calls, nats: 0 if the engine repeats itself bit for bit.
    pub spread: f32,
}

/// Work that an engine did for us.
#[derive(Debug, Default)]
pub struct Counters {
    /// Calls begun.
    pub calls: AtomicU64,
    /// Tokens of prompts that it computed, as far as it says so.
    pub prompt_computed: AtomicU64,
    /// Tokens of prompts that it had in its cache.
    pub prompt_cached: AtomicU64,
    /// Distributions returned.
    pub rows: AtomicU64,
}

/// An engine that was found, and what it can do.
#[derive(Clone, Debug)]
pub struct Engine {
    address: Address,
    abilities: Abilities,
    counters: Arc<Counters>,
    pace: Arc<Mutex<Pace>>,
}

impl Engine {
    /// The engine at an address, which can do this.
    pub(crate) fn new(address: Address, abilities: Abilities) -> Self {
        Self { address, abilities, counters: Arc::default(), pace: Arc::default() }
    }

    /// What it can do.
    #[must_use]
    pub fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What it did.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How long the engine has been silent though it has calls, if that is longer than it may take.
    #[must_use]
    pub fn stalled(&self) -> Option<Duration> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).stalled(Instant::now())
    }

    /// Whether the engine still serves the model that it served when it was probed.
    ///
    /// # Errors
    /// [`Fault::Unexpected`] names the model that it serves now; others if it cannot be asked.
    pub async fn still_serves(&self) -> Result<(), Fault> {
        let now = probe::identify(&self.address).await?;
        let then = &self.abilities;
        let same = now.model == then.model && now.vocabulary == then.vocabulary;
        if !same || now.context_tokens < then.context_tokens {
            let text = format!("it serves {} now, no longer {}; start this node again", now.model, then.model);
            return Err(Fault::Unexpected(text));
        }
        Ok(())
    }

    /// Token ids of a text, no special ones around it.
    ///
    /// # Errors
    /// What the engine says, or that it cannot be reached.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<u32>, Fault> {
        match self.abilities.kind {
            Kind::LlamaServer => llama_server::tokenize(&self.address, text).await,
        }
    }

    /// Asks for distributions. They come one by one; dropping the result cancels the rest.
    ///
    /// # Errors
    /// What the engine says, or that it cannot be reached.
    pub async fn rows(&self, ask: &Ask<'_>) -> Result<Rows, Fault> {
        self.counters.calls.fetch_add(1, Ordering::Relaxed);
        let top = ask.top.min(self.abilities.top_max);
        let body = match self.abilities.kind {
            Kind::LlamaServer => {
                llama_server::body(&Ask { top, ..ask.clone() }, self.abilities.lanes, self.abilities.plain_token)
            }
        };
        let call = Call::begin(&self.pace);
        let limit = call.pace().first_max(ask.from);
        let events = self.address.stream(llama_server::PATH, &body, limit).await?;
        let counters = self.counters.clone();
        Ok(Rows { events, top, counters, call, limit, ready: VecDeque::new(), read: 0, ended: false })
    }
}

/// A call that is under way.
#[derive(Debug)]
struct Call {
    pace: Arc<Mutex<Pace>>,
    since: Instant,
    has_events: bool,
}

impl Call {
    fn begin(pace: &Arc<Mutex<Pace>>) -> Self {
        let call = Self { pace: pace.clone(), since: Instant::now(), has_events: false };
        call.pace().begin(call.since);
        call
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event came; returns how long the next one may take. Time in which the caller did not read does not count.
    fn event(&mut self, asked: Instant) -> Duration {
        let now = Instant::now();
        let since = if self.has_events { asked } else { self.since };
        let mut pace = self.pace();
        pace.event(!self.has_events, now - since, now);
        let limit = pace.next_max();
        drop(pace);
        self.has_events = true;
        limit
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.pace().end();
    }
}

/// Distributions of a call, in the order of their positions.
#[derive(Debug)]
pub struct Rows {
    events: EventStream,
    top: usize,
    counters: Arc<Counters>,
    call: Call,
    /// How long the next event may take.
    limit: Duration,
    ready: VecDeque<Row>,
    read: usize,
    ended: bool,
}

impl Rows {
    /// The next one; none after the last, and where the engine left one out: asked for alone, it may come.
    ///
    /// # Errors
    /// The engine died or hung, or its answer is not understood.
    pub async fn next(&mut self) -> Result<Option<Row>, Fault> {
        loop {
            if let Some(row) = self.ready.pop_front() {
                self.counters.rows.fetch_add(1, Ordering::Relaxed);
                return Ok(Some(row));
            }
            if self.ended {
                return Ok(None);
            }
            let asked = Instant::now();
            let event = self.events.next(self.limit).await?;
            self.limit = self.call.event(asked);
            let Some(event) = event else {
                // A server that dies in the middle of a stream ends it with status 200 all the same.
                return Err(Fault::Gone("the answer broke off".into()));
            };
            if event == "[DONE]" {
                continue;
            }
            let read = llama_server::read(&event, self.top)?;
            self.read += read.rows.len();
            if read.end.is_none() && read.written > self.read {
                self.ended = true;
                return Ok(None);
            }
            self.ready.extend(read.rows);
            if let Some((computed, cached)) = read.end {
                self.counters.prompt_computed.fetch_add(computed as u64, Ordering::Relaxed);
                self.counters.prompt_cached.fetch_add(cached as u64, Ordering::Relaxed);
                self.ended = true;
            }
        }
    }
}

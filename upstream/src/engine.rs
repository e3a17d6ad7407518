//! One engine behind a URL.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ask::{Ask, Row};
use crate::fault::Fault;
use crate::http::{Address, EventStream};
use crate::llama_server;

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
}

impl Engine {
    /// The engine at an address, which can do this.
    pub(crate) fn new(address: Address, abilities: Abilities) -> Self {
        Self { address, abilities, counters: Arc::default() }
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
            Kind::LlamaServer => llama_server::body(&Ask { top, ..ask.clone() }, self.abilities.lanes),
        };
        let events = self.address.stream(llama_server::PATH, &body, ask.from).await?;
        let counters = self.counters.clone();
        Ok(Rows { events, top, counters, ready: VecDeque::new(), ended: false })
    }
}

/// Distributions of a call, in the order of their positions.
#[derive(Debug)]
pub struct Rows {
    events: EventStream,
    top: usize,
    counters: Arc<Counters>,
    ready: VecDeque<Row>,
    ended: bool,
}

impl Rows {
    /// The next one; none after the last.
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
            let Some(event) = self.events.next().await? else {
                // A server that dies in the middle of a stream ends it with status 200 all the same.
                return Err(Fault::Gone("the answer broke off".into()));
            };
            if event == "[DONE]" {
                continue;
            }
            let read = llama_server::read(&event, self.top)?;
            self.ready.extend(read.rows);
            if let Some((computed, cached)) = read.end {
                self.counters.prompt_computed.fetch_add(computed as u64, Ordering::Relaxed);
                self.counters.prompt_cached.fetch_add(cached as u64, Ordering::Relaxed);
                self.ended = true;
            }
        }
    }
}

//! The tickets that an edge keeps, so that it can go on when no router answers.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{ClientError, RouterClient, Ticket};
use crate::control::PlaceCommand;

/// Most models whose last ticket is kept.
pub const CACHED_TICKETS_MAX: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    ticket: Ticket,
    taken_at_ms: u64,
}

/// A ticket from the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedTicket {
    /// The ticket.
    pub ticket: Ticket,
    /// True: its time has passed. The node may have been given to another owner meanwhile and then
    /// refuses its epoch; it is still the best guess while no router answers.
    pub stale: bool,
    /// True: more than half of its time has passed, so ask for the next one now; the epoch stays
    /// the same if the node does.
    pub refresh_due: bool,
}

/// The last ticket per model. Pure: the time is passed in, ms on one clock of the caller's (the
/// wall clock, if the cache is to be stored).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TicketCache {
    entries: BTreeMap<String, Entry>,
}

impl TicketCache {
    /// Keeps `ticket` for `model`. A full cache drops its oldest entry.
    pub fn keep(&mut self, model: &str, ticket: Ticket, now_ms: u64) {
        if !self.entries.contains_key(model) && self.entries.len() >= CACHED_TICKETS_MAX {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.taken_at_ms);
            if let Some(name) = oldest.map(|(name, _)| name.clone()) {
                self.entries.remove(&name);
            }
        }
        self.entries.insert(model.to_owned(), Entry { ticket, taken_at_ms: now_ms });
    }

    /// The last ticket for `model`.
    #[must_use]
    pub fn get(&self, model: &str, now_ms: u64) -> Option<CachedTicket> {
        let entry = self.entries.get(model)?;
        // A clock that stepped back says nothing about the ticket's age: treat it as old.
        let age_ms = now_ms.checked_sub(entry.taken_at_ms);
        let valid_ms = entry.ticket.expires_in_ms;
        Some(CachedTicket {
            ticket: entry.ticket.clone(),
            stale: age_ms.is_none_or(|age| age >= valid_ms),
            refresh_due: age_ms.is_none_or(|age| age >= valid_ms / 2),
        })
    }

    /// Drops the ticket for `model`: its node has refused the epoch.
    pub fn forget(&mut self, model: &str) {
        self.entries.remove(model);
    }
}

/// Tickets from the cache while they are fresh, from a router when they are not, and from the
/// cache again while no router answers.
#[derive(Debug)]
pub struct TicketSource {
    client: RouterClient,
    cache: Mutex<TicketCache>,
}

impl TicketSource {
    /// Starts with what `cache` holds.
    #[must_use]
    pub fn new(client: RouterClient, cache: TicketCache) -> Self {
        Self { client, cache: Mutex::new(cache) }
    }

    fn cache(&self) -> MutexGuard<'_, TicketCache> {
        // The cache is consistent between any two statements under the lock.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the cache, to be stored.
    #[must_use]
    pub fn cached(&self) -> TicketCache {
        self.cache().clone()
    }

    /// Drops the ticket for `model`: its node has refused the epoch.
    pub fn forget(&self, model: &str) {
        self.cache().forget(model);
    }

    /// The last ticket for `model`, however old.
    #[must_use]
    pub fn last(&self, model: &str) -> Option<Ticket> {
        self.cache().get(model, 0).map(|cached| cached.ticket)
    }

    /// A ticket for `place`. One for a node to avoid is used only while no router answers: the node may be
    /// back, and no router can name another.
    pub async fn ticket(&self, place: &PlaceCommand, now_ms: u64) -> Result<CachedTicket, ClientError> {
        let cached = self.cache().get(&place.model, now_ms);
        let avoided = |cached: &CachedTicket| place.avoid.contains(&cached.ticket.node);
        if let Some(fresh) = cached.as_ref().filter(|cached| !cached.refresh_due && !avoided(cached)) {
            return Ok(fresh.clone());
        }
        match (self.client.place(place).await, cached) {
            (Ok(ticket), _) => {
                self.cache().keep(&place.model, ticket.clone(), now_ms);
                Ok(CachedTicket { ticket, stale: false, refresh_due: false })
            }
            (Err(ClientError::Unreachable { .. }), Some(last)) => Ok(last),
            (Err(error), _) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;

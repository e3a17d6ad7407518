//! Answers that are kept, so that `previous_response_id` and `GET /v1/responses/{id}` find them: in
//! memory, the oldest leave first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::items::Item;
use crate::api::messages::ChatMessage;
use crate::api::request_id::random_u64;

/// Most answers kept.
pub(crate) const STORED_MAX: usize = 512;
/// Most bytes of all that is kept. A single answer with its conversation that is larger is not kept.
pub(crate) const STORED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Estimate of what a message or an item takes beside its text, bytes.
const OVERHEAD_BYTES: usize = 256;

/// An answer with the conversation that it ends.
#[derive(Debug)]
pub(crate) struct Stored {
    /// The whole conversation, the answer included, without instructions.
    pub(crate) messages: Vec<ChatMessage>,
    /// The answer's items.
    pub(crate) output: Vec<Item>,
    /// The response object as JSON text.
    pub(crate) response: Vec<u8>,
}

impl Stored {
    fn bytes(&self) -> usize {
        let text: usize = self.messages.iter().map(ChatMessage::bytes).sum();
        // Items repeat what stands in the response.
        text + 2 * self.response.len() + OVERHEAD_BYTES * (1 + self.messages.len() + self.output.len())
    }
}

/// The answers that are kept.
#[derive(Debug, Default)]
pub(crate) struct ResponseStore(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kept: HashMap<String, Arc<Stored>>,
    /// Ids, oldest first.
    order: VecDeque<String>,
    bytes: usize,
}

impl ResponseStore {
    /// The answer with this id.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<Stored>> {
        self.lock().kept.get(id).cloned()
    }

    /// An item of an answer that is kept.
    pub(crate) fn item(&self, id: &str) -> Option<Item> {
        let (key, _) = id.split_once('_')?.1.rsplit_once('_')?;
        self.get(&response_id(key))?.output.iter().find(|item| item.id == id).cloned()
    }

    /// Keeps an answer.
    pub(crate) fn put(&self, id: &str, stored: Stored) {
        let bytes = stored.bytes();
        if bytes > STORED_BYTES_MAX {
            return;
        }
        let mut inner = self.lock();
        inner.remove(id);
        while inner.order.len() >= STORED_MAX || inner.bytes + bytes > STORED_BYTES_MAX {
            let Some(oldest) = inner.order.front().cloned() else { break };
            inner.remove(&oldest);
        }
        inner.bytes += bytes;
        inner.order.push_back(id.to_owned());
        inner.kept.insert(id.to_owned(), Arc::new(stored));
    }

    /// Forgets an answer; false if it was not there.
    pub(crate) fn remove(&self, id: &str) -> bool {
        self.lock().remove(id)
    }

    /// What the ids of an answer and its items end in: the request's id, unless an answer under it is kept.
    pub(crate) fn key(&self, request_id: &str) -> String {
        if self.lock().kept.contains_key(&response_id(request_id)) {
            format!("{:016x}{:016x}", random_u64(), random_u64())
        } else {
            request_id.to_owned()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every operation leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, id: &str) -> bool {
        let Some(stored) = self.kept.remove(id) else { return false };
        self.bytes -= stored.bytes();
        self.order.retain(|kept| kept != id);
        true
    }
}

/// Id of the answer with this key.
pub(crate) fn response_id(key: &str) -> String {
    format!("resp_{key}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::responses::items::Spoken;

    fn stored(bytes: usize) -> Stored {
        Stored { messages: Vec::new(), output: Vec::new(), response: vec![b' '; bytes] }
    }

    #[test]
    fn the_oldest_leave_first() {
        let store = ResponseStore::default();
        for i in 0..STORED_MAX + 3 {
            store.put(&format!("resp_{i}"), stored(10));
        }
        assert!(store.get("resp_2").is_none() && store.get("resp_3").is_some());
        assert_eq!(store.lock().order.len(), STORED_MAX);
        for i in 0..10 {
            store.put(&format!("large_{i}"), stored(STORED_BYTES_MAX / 8));
            assert!(store.lock().bytes <= STORED_BYTES_MAX);
        }
        assert!(store.get("large_9").is_some() && store.get("large_0").is_none());
        store.put("huge", stored(STORED_BYTES_MAX));
        assert!(store.get("huge").is_none() && store.get("large_9").is_some(), "what is too large displaces nothing");
        for i in 0..10 {
            store.remove(&format!("large_{i}"));
        }
        let inner = store.lock();
        assert_eq!((inner.bytes, inner.order.len(), inner.kept.len()), (0, 0, 0));
    }

    #[test]
    fn items_are_found_by_their_ids() {
        let store = ResponseStore::default();
        let said = Spoken::Reasoning { text: "hm".into() };
        let item = Item { id: "rs_a_b_0".into(), status: "completed", said };
        store.put("resp_a_b", Stored { output: vec![item.clone()], ..stored(2) });
        assert_eq!(store.item("rs_a_b_0"), Some(item));
        for id in ["rs_a_b_1", "msg_a_b_0", "rs_a_0", "rs", "", "_"] {
            assert_eq!(store.item(id), None, "{id}");
        }
        assert_ne!(store.key("a_b"), "a_b", "an id in use is not given again");
        assert!(store.remove("resp_a_b") && !store.remove("resp_a_b"));
        assert_eq!(store.key("a_b"), "a_b");
    }
}

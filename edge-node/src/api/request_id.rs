//! Request ids: the caller's own if it is sane and not in use, else a fresh one.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::HeaderMap;

/// Name of the header in both directions.
pub(crate) const HEADER: &str = "x-request-id";
/// Longest id taken from a caller, bytes.
pub(crate) const ID_BYTES_MAX: usize = 128;
/// Most ids watched for reuse; beyond it callers get fresh ones.
pub(crate) const IDS_MAX: usize = 4096;

/// The ids in use, so that two answers under way never share one.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestIds(Arc<Mutex<HashSet<Arc<str>>>>);

/// An id in use; free again once every clone is gone.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(Arc<Held>);

#[derive(Debug)]
struct Held {
    id: Arc<str>,
    ids: RequestIds,
}

impl RequestIds {
    /// The id for a request with these headers.
    pub(crate) fn claim(&self, headers: &HeaderMap) -> RequestId {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok()).filter(|id| is_sane(id));
        let mut ids = self.lock();
        let id: Arc<str> = match given {
            Some(id) if ids.len() < IDS_MAX && !ids.contains(id) => id.into(),
            _ => fresh().into(),
        };
        if ids.len() < IDS_MAX {
            ids.insert(Arc::clone(&id));
        }
        RequestId(Arc::new(Held { id, ids: self.clone() }))
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Arc<str>>> {
        // The set is whole after every operation, a panic elsewhere does not change that.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RequestId {
    /// The id.
    pub(crate) fn as_str(&self) -> &str {
        &self.0.id
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.ids.lock().remove(&self.id);
    }
}

/// 64 unpredictable bits: std seeds each thread's hasher keys from the system.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn fresh() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

fn is_sane(id: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':');
    (1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(id: &str) -> HeaderMap {
        HeaderMap::from_iter([(HEADER.parse().unwrap(), id.parse().unwrap())])
    }

    #[test]
    fn sane_ids_are_honoured() {
        let ids = RequestIds::default();
        assert_eq!(ids.claim(&headers("run-7.a:b_C")).as_str(), "run-7.a:b_C");
        let long = "x".repeat(ID_BYTES_MAX + 1);
        for bad in ["", "a b", "a/b", "<script>", long.as_str()] {
            let id = ids.claim(&headers(bad));
            assert_ne!(id.as_str(), bad);
            assert!(is_sane(id.as_str()));
        }
    }

    #[test]
    fn an_id_in_use_is_not_given_twice() {
        let ids = RequestIds::default();
        let first = ids.claim(&headers("same"));
        let second = ids.claim(&headers("same"));
        assert_ne!(first.as_str(), second.as_str());
        drop((first, second));
        assert_eq!(ids.claim(&headers("same")).as_str(), "same");
        assert!(ids.lock().is_empty());
    }

    #[test]
    fn the_set_is_bounded() {
        let ids = RequestIds::default();
        let held: Vec<RequestId> = (0..IDS_MAX + 10).map(|_| ids.claim(&HeaderMap::new())).collect();
        assert_eq!(ids.lock().len(), IDS_MAX);
        assert_ne!(ids.claim(&headers("mine")).as_str(), "mine");
        drop(held);
    }
}

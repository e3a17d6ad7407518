//! Hands KV blocks that arrive on a link to the session they belong to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tandem_proto::frame::Message;
use tandem_proto::ids::SessionId;
use tandem_proto::limits::KV_OFFER_BLOCKS_MAX;
use tandem_proto::message::KvBlock;
use tokio::sync::mpsc;

use crate::link::Link;

type Routes = HashMap<SessionId, mpsc::Sender<(KvBlock, Bytes)>>;

/// Sessions that expect blocks. Cheap to clone; one per node.
#[derive(Clone, Debug, Default)]
pub struct BulkInbox {
    routes: Arc<Mutex<Routes>>,
}

/// Blocks of one session; unregisters when dropped.
#[derive(Debug)]
pub struct BulkReceiver {
    inbox: BulkInbox,
    session: SessionId,
    blocks: mpsc::Receiver<(KvBlock, Bytes)>,
}

impl BulkInbox {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a session; an earlier registration of it gets nothing any more. At most the blocks
    /// of one offer wait here.
    #[must_use]
    pub fn register(&self, session: SessionId) -> BulkReceiver {
        let (tx, blocks) = mpsc::channel(KV_OFFER_BLOCKS_MAX);
        self.routes().insert(session, tx);
        BulkReceiver { inbox: self.clone(), session, blocks }
    }

    /// Reads a link's bulk frames until it ends. Blocks that no exchange waits for are dropped; returns
    /// how many those were.
    pub async fn serve(&self, link: &Link) -> u64 {
        let mut unclaimed = 0;
        while let Some(frame) = link.accept_bulk().await {
            let Message::KvBlock(block) = frame.message else {
                unclaimed += 1;
                continue;
            };
            let route = self.routes().get(&block.session).cloned();
            if route.is_none_or(|r| r.try_send((block, frame.payload)).is_err()) {
                unclaimed += 1;
            }
        }
        unclaimed
    }
}

impl BulkReceiver {
    /// The session the blocks are for.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The next block. Cancel-safe.
    pub async fn next(&mut self) -> Option<(KvBlock, Bytes)> {
        self.blocks.recv().await
    }
}

impl Drop for BulkReceiver {
    fn drop(&mut self) {
        self.blocks.close();
        let mut routes = self.inbox.routes();
        // A newer registration of the same session has an open channel and stays.
        if routes.get(&self.session).is_some_and(mpsc::Sender::is_closed) {
            routes.remove(&self.session);
        }
    }
}

//! Grammars of the sessions: compiled off the runtime's and the engine's threads, a few at a time.

use std::sync::Arc;

use tandem_engine::constraint::{ConstraintError, Constraints, Followed};
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::Open;
use tokio::sync::Semaphore;

/// Most grammars compiled at a time; further sessions wait.
const COMPILING_MAX: usize = 2;

/// The compiler of a node.
#[derive(Debug)]
pub(crate) struct Grammars {
    constraints: Constraints,
    turns: Semaphore,
    bytes_max: usize,
}

impl Grammars {
    pub(crate) fn new(tokenizer: Tokenizer, bytes_max: usize) -> Self {
        Self { constraints: Constraints::new(Arc::new(tokenizer)), turns: Semaphore::new(COMPILING_MAX), bytes_max }
    }

    /// Follows the grammar of a session, if it has one, over `answer`, the tokens that are final
    /// already. Only sessions that were let in wait here, so their number bounds the queue.
    pub(crate) async fn follow(
        self: &Arc<Self>,
        open: &Open,
        answer: &[u32],
    ) -> Result<Option<Followed>, ConstraintError> {
        let Some(grammar) = open.grammar.clone() else { return Ok(None) };
        let bytes = grammar.text.len();
        if bytes > self.bytes_max {
            return Err(ConstraintError::TooLong { bytes, max: self.bytes_max });
        }
        let gone = |e: &dyn std::fmt::Display| ConstraintError::Failed(e.to_string());
        let _turn = self.turns.acquire().await.map_err(|e| gone(&e))?;
        let (this, stop_tokens, answer) = (self.clone(), open.stop_tokens.clone(), answer.to_vec());
        let work = move || {
            let followed = this.constraints.compile(&grammar)?.follow(&stop_tokens);
            followed.allowed(&answer)?;
            Ok(Some(followed))
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| gone(&e))?
    }
}

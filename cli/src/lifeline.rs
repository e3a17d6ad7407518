//! A child that ends with its parent: the parent holds the other end of the child's standard input,
//! and the system closes it however the parent ends, SIGKILL included.

use std::io::Read as _;

use tokio_util::sync::CancellationToken;

/// Cancels `shutdown` once standard input ends.
pub(crate) fn watch(shutdown: CancellationToken) {
    // A thread of its own: it blocks for as long as the process runs.
    let watching = std::thread::Builder::new().name("lifeline".into()).spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut sink = [0; 256];
        while matches!(input.read(&mut sink), Ok(read) if read > 0) {}
        shutdown.cancel();
    });
    if let Err(error) = watching {
        tracing::warn!(%error, "this process may outlive the one that started it");
    }
}

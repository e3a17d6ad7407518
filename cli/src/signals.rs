//! What ends a long-running process.

use tokio_util::sync::CancellationToken;

use crate::failure::{Code, Failure, OrFail as _};
use crate::lifeline;

/// A token that SIGTERM cancels; also SIGINT, unless `lifeline`: then the end of standard input
/// does, and Ctrl-C is for the parent, which ends its children in order.
pub(crate) fn shutdown(lifeline: bool) -> Result<CancellationToken, Failure> {
    let token = CancellationToken::new();
    let ends = listen(lifeline)?;
    if lifeline {
        lifeline::watch(token.clone());
    }
    let cancel = token.clone();
    tokio::spawn(async move {
        ends.await;
        cancel.cancel();
    });
    Ok(token)
}

#[cfg(unix)]
fn listen(lifeline: bool) -> Result<impl Future<Output = ()>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).or_fail(Code::Failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).or_fail(Code::Failed)?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => return,
                _ = interrupt.recv() => if !lifeline { return },
            }
        }
    })
}

#[cfg(not(unix))]
fn listen(lifeline: bool) -> Result<impl Future<Output = ()>, Failure> {
    Ok(async move {
        if lifeline || tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}

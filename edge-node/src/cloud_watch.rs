//! Says in the log how the cloud stands: once at each change, not at each attempt.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tandem_transport::DialState;
use tokio::sync::watch;

use crate::context::{NodeContext, PATIENCE};
use crate::diagnosis::{CloudState, LinkState};

/// Watches the link of a node until the node or its link is dropped.
pub(crate) fn start(node: &Arc<NodeContext>) {
    match node.uplinks.dialing() {
        Some(dialing) => drop(tokio::spawn(watch(Arc::downgrade(node), dialing))),
        None => tracing::info!("no cloud is configured: this device answers alone"),
    }
}

async fn watch(node: Weak<NodeContext>, mut dialing: watch::Receiver<DialState>) {
    let mut said: Option<CloudState> = None;
    loop {
        dialing.mark_unchanged();
        let patience = {
            let Some(node) = node.upgrade() else { return };
            let now = node.cloud_state();
            let undecided = now.state == LinkState::Connecting;
            if is_news(said.as_ref(), &now) {
                say(&node, &now);
                said = Some(now);
            }
            if undecided { node.uplinks.patience_left(PATIENCE).unwrap_or(PATIENCE) } else { Duration::MAX }
        };
        tokio::select! {
            changed = dialing.changed() => if changed.is_err() { return },
            // A state that lasts becomes a failure without a change of the dialing.
            () = tokio::time::sleep(patience.max(Duration::from_millis(1))) => {}
        }
    }
}

/// Whether the state differs from what was said last. An attempt in between is none; a link that is lost is.
fn is_news(said: Option<&CloudState>, now: &CloudState) -> bool {
    match (said, now.state) {
        (None, LinkState::Connecting) => false,
        (Some(said), LinkState::Connecting) => said.state == LinkState::Connected,
        (None, _) => true,
        (Some(said), _) => (said.state, &said.code) != (now.state, &now.code),
    }
}

fn say(node: &NodeContext, now: &CloudState) {
    let code = now.code.as_deref().unwrap_or_default();
    match now.state {
        LinkState::None => {}
        LinkState::Connected => {
            let cloud = node.uplinks.current().map(|link| link.peer_identity().to_string()).unwrap_or_default();
            tracing::info!(cloud, "connected to a cloud node");
        }
        LinkState::Connecting => {
            let why = now.problem.as_deref().unwrap_or("the link ended");
            tracing::info!("connecting to the cloud again: {why}");
        }
        LinkState::Cut => tracing::info!("the cloud is cut off by the operator"),
        LinkState::Failed => {
            let failure = now.failure().unwrap_or_default();
            tracing::warn!(code, "the cloud cannot take part, this device answers alone: {failure}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_said_once() {
        let failed =
            |code: &str| CloudState { state: LinkState::Failed, code: Some(code.into()), ..CloudState::default() };
        let of = CloudState::of;
        let steps = [
            (of(LinkState::Connecting), false),
            (failed("untrusted_ca"), true),
            (failed("untrusted_ca"), false),
            (of(LinkState::Connecting), false),
            (failed("untrusted_ca"), false),
            (failed("wrong_server_name"), true),
            (of(LinkState::Connected), true),
            (of(LinkState::Connected), false),
            (of(LinkState::Connecting), true),
            (of(LinkState::Connecting), false),
            (of(LinkState::Cut), true),
        ];
        let mut said: Option<CloudState> = None;
        for (at, (now, expected)) in steps.into_iter().enumerate() {
            let news = is_news(said.as_ref(), &now);
            assert_eq!(news, expected, "step {at}: {now:?}");
            if news {
                said = Some(now);
            }
        }
    }
}

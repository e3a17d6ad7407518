//! Who may open a session: what is cheap to check comes first, then the place among the live ones.

use bytes::Bytes;
use metrics::counter;
use tandem_engine::trunk::{SharedLayers, Trunk};
use tandem_proto::message::{Hello, Open, RefuseCode};
use tandem_proto::session::SessionError;
use tandem_proto::session::cloud::{CloudSession, TargetShape};
use tandem_transport::link::Link;

use super::Ending;
use crate::admission::Refusal;
use crate::context::NodeContext;
use crate::metric_definitions as m;
use crate::registry::{Claim, Seat};
use crate::target::TrunkState;

/// When an edge whose earlier stream is still held may ask again, milliseconds: about a long job.
const HELD_RETRY_MS: u32 = 500;

/// A session that was let in.
pub(super) struct Entered {
    pub(super) seat: Seat,
    pub(super) session: Box<CloudSession>,
    /// The layers for which the edge's numbers stand in for ours.
    pub(super) trunk: Option<Trunk>,
}

/// Finds the session's earlier state, if any, and lets it in.
pub(super) async fn enter(node: &NodeContext, link: &Link, open: &Open, payload: &Bytes) -> Result<Entered, Ending> {
    let refuse = |code, text: String| Ending::Refused(code, text, 0);
    if open.model != node.settings.model {
        let text = format!("no model `{}` here, there is `{}`", open.model, node.settings.model);
        return Err(refuse(RefuseCode::UnknownModel, text));
    }
    let target = node.target.capabilities();
    target.allow(open)?;
    // A session that resumes passes admission, but a stalled engine cannot serve it either.
    if let stalled_ms @ 1.. = node.target.load().stalled_ms {
        let r = Refusal::Stalled(stalled_ms);
        return Err(Ending::Refused(r.code(), r.to_string(), r.retry_after_ms()));
    }
    if !payload.len().is_multiple_of(4) {
        return Err(refuse(RefuseCode::Malformed, format!("{} bytes of token ids", payload.len())));
    }
    let tokens: Vec<u32> = payload.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let context = target.context_tokens;
    if tokens.len() >= context {
        return Err(refuse(RefuseCode::TooLong, format!("{} tokens, the model's context is {context}", tokens.len())));
    }
    let layers = node.target.trunk().map(TrunkState::layers);
    let trunk = layers.and_then(|layers| standing_in(layers, link.peer_hello(), open.trunk_layers as usize));
    let hidden_row_bytes = trunk.as_ref().map_or(0, |t| t.hidden_size * size_of::<f32>());
    let shape = TargetShape { context_tokens: context, vocabulary: target.vocabulary, hidden_row_bytes };
    let mut session = CloudSession::open(open, tokens, shape)?;
    let device = link.peer_identity().to_string();
    let wanted = (open.prompt_tokens as usize + open.answer_tokens_max as usize).min(context);
    let claim = node.registry.claim(open.session, &device, open.epoch, |live| node.admit(live, wanted)).await;
    let (seat, resumed) = match claim {
        Claim::New(seat) => (seat, false),
        Claim::Resumed(earlier, seat) => {
            session.adopt(&earlier);
            (seat, true)
        }
        Claim::Foreign => return Err(refuse(RefuseCode::OutOfOrder, "the session belongs to another device".into())),
        Claim::Stale(current) => return Err(Ending::from(SessionError::StaleEpoch { got: open.epoch, current })),
        Claim::Held => {
            let text = "the session's earlier stream has not ended yet".into();
            return Err(Ending::Refused(RefuseCode::Busy, text, HELD_RETRY_MS));
        }
        Claim::Refused(r) => return Err(Ending::Refused(r.code(), r.to_string(), r.retry_after_ms())),
    };
    counter!(m::SESSIONS_OPENED, m::LABEL_RESUMED => if resumed { "true" } else { "false" }).increment(1);
    Ok(Entered { seat, session: Box::new(session), trunk })
}

/// The first `asked` layers, if all of them are in a model of the edge's: then its numbers above them are ours.
fn standing_in(layers: &SharedLayers, edge: &Hello, asked: usize) -> Option<Trunk> {
    let shared = edge.models.iter().filter_map(|card| layers.with(card).ok()).map(|trunk| trunk.layers).max()?;
    layers.at(asked).filter(|_| asked <= shared)
}

#[cfg(test)]
mod tests {
    use tandem_engine::trunk::announced;
    use tandem_models::{CLOUD, EDGE, TRUNK_LAYERS};

    use super::*;

    #[test]
    fn an_edges_numbers_stand_in_above_layers_that_both_models_have() {
        let (big, small) = (CLOUD.load(1).expect("the cloud model"), EDGE.load(1).expect("the edge model"));
        assert_eq!(TRUNK_LAYERS, 2, "the table");
        // (bound of our settings, of the edge's, layers the edge names, whether they stand in)
        let table = [
            (None, None, 2, true),
            (None, None, 1, true),
            (None, None, 0, false),
            (None, None, 3, false),
            (Some(1), None, 2, false),
            (Some(1), None, 1, true),
            (None, Some(1), 2, false),
            (None, Some(1), 1, true),
            (Some(0), None, 1, false),
            (None, Some(0), 1, false),
        ];
        for (ours, theirs, asked, expected) in table {
            let layers = SharedLayers::of(&big.model, ours);
            let hello = Hello::new("edge", 1, vec![announced(small.card.clone(), theirs)]);
            let found = standing_in(&layers, &hello, asked).map(|trunk| trunk.layers);
            assert_eq!(found, expected.then_some(asked), "ours {ours:?}, theirs {theirs:?}, asked {asked}");
        }
        assert!(standing_in(&SharedLayers::of(&big.model, None), &Hello::new("edge", 1, Vec::new()), 1).is_none());
    }
}

//! Who may open a session: what is cheap to check comes first, then the place among the live ones.

use bytes::Bytes;
use metrics::counter;
use tandem_engine::trunk::Trunk;
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
    /// Layers for which the edge's numbers stand in for ours; 0 for none.
    pub(super) trunk_layers: usize,
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
    let trunk =
        node.target.trunk().map(TrunkState::trunk).filter(|t| stands_in(t, link.peer_hello(), open.trunk_layers));
    let hidden_row_bytes = trunk.map_or(0, |t| t.hidden_size * size_of::<f32>());
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
    Ok(Entered { seat, session: Box::new(session), trunk_layers: trunk.map_or(0, |t| t.layers) })
}

/// Whether an edge's numbers above its first `asked` layers are ours above our trunk. A trunk of
/// another depth has other numbers, however alike the layers are.
fn stands_in(trunk: &Trunk, edge: &Hello, asked: u32) -> bool {
    trunk.layers == asked as usize && trunk.is_shared_with(edge)
}

#[cfg(test)]
mod tests {
    use tandem_models::{CLOUD, EDGE};

    use super::*;

    #[test]
    fn only_a_trunk_of_the_same_depth_stands_in() {
        let (big, small) = (CLOUD.load(1).expect("the cloud model"), EDGE.load(1).expect("the edge model"));
        let hello = Hello::new("edge", 1, vec![small.card]);
        // (layers of our trunk, layers the edge names, whether they stand in); the pair shares two.
        let table = [(2, 2, true), (1, 1, true), (2, 1, false), (1, 2, false), (2, 0, false), (3, 3, false)];
        for (ours, asked, expected) in table {
            let trunk = Trunk::of(&big.model, ours).expect("the model has the layers");
            assert_eq!(stands_in(&trunk, &hello, asked), expected, "ours {ours}, asked {asked}");
        }
    }
}

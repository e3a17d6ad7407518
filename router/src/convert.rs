//! Between the messages of the wire and the crate's own types. Everything that comes in is bounded.

use tandem_proto::{ids::Digest, limits::MODELS_MAX, rpc};

use crate::{
    control::{AVOID_MAX, LATENCIES_MAX, PREFIX_BLOCKS_MAX, PlaceCommand, Refusal, RequestId},
    node::{InvalidField, LoadReport, ModelCard, NodeCard, PREFIXES_PER_NODE_MAX},
};

fn bounded(field: &'static str, len: usize, max: usize) -> Result<(), InvalidField> {
    if len <= max {
        return Ok(());
    }
    Err(InvalidField { field, problem: format!("has {len} entries, at most {max} are allowed") })
}

fn digest(field: &'static str, bytes: &[u8]) -> Result<Digest, InvalidField> {
    let bytes = bytes.try_into();
    bytes.map(Digest).map_err(|_| InvalidField { field, problem: "is not a digest of 32 bytes".into() })
}

fn digests(field: &'static str, list: &[bytes::Bytes], max: usize) -> Result<Vec<Digest>, InvalidField> {
    bounded(field, list.len(), max)?;
    list.iter().map(|bytes| digest(field, bytes)).collect()
}

fn digests_to_wire(list: &[Digest]) -> Vec<bytes::Bytes> {
    list.iter().map(|digest| bytes::Bytes::copy_from_slice(&digest.0)).collect()
}

#[cfg(feature = "server")]
pub(crate) fn request_id(bytes: &[u8]) -> Result<RequestId, InvalidField> {
    let bytes = bytes.try_into();
    bytes.map(RequestId).map_err(|_| InvalidField { field: "request_id", problem: "is not 16 bytes".into() })
}

pub(crate) fn card(card: Option<rpc::NodeCard>) -> Result<NodeCard, InvalidField> {
    let card = card.ok_or_else(|| InvalidField { field: "card", problem: "is missing".into() })?;
    bounded("models", card.models.len(), MODELS_MAX)?;
    let models = card
        .models
        .into_iter()
        .map(|model| Ok(ModelCard { digest: digest("models.digest", &model.digest)?, name: model.name }));
    let card = NodeCard {
        models: models.collect::<Result<_, InvalidField>>()?,
        name: card.name,
        address: card.address,
        server_name: card.server_name,
        region: card.region,
        boot_epoch: card.boot_epoch,
    };
    card.check()?;
    Ok(card)
}

pub(crate) fn card_to_wire(card: &NodeCard) -> rpc::NodeCard {
    let models = card
        .models
        .iter()
        .map(|model| rpc::Model { name: model.name.clone(), digest: bytes::Bytes::copy_from_slice(&model.digest.0) });
    rpc::NodeCard {
        name: card.name.clone(),
        address: card.address.clone(),
        server_name: card.server_name.clone(),
        region: card.region.clone(),
        models: models.collect(),
        boot_epoch: card.boot_epoch,
    }
}

/// A missing report is an idle node.
pub(crate) fn load(load: Option<rpc::LoadReport>) -> Result<LoadReport, InvalidField> {
    let load = load.unwrap_or_default();
    let prefixes = digests("prefixes", &load.prefixes, PREFIXES_PER_NODE_MAX)?;
    LoadReport {
        sessions: load.sessions,
        sessions_max: load.sessions_max,
        queued_tokens: load.queued_tokens,
        tokens_per_second: load.tokens_per_second,
        kv_blocks_used: load.kv_blocks_used,
        kv_blocks_max: load.kv_blocks_max,
        stalled_ms: load.stalled_ms,
        prefixes,
    }
    .checked()
}

pub(crate) fn load_to_wire(load: &LoadReport) -> rpc::LoadReport {
    rpc::LoadReport {
        sessions: load.sessions,
        sessions_max: load.sessions_max,
        queued_tokens: load.queued_tokens,
        tokens_per_second: load.tokens_per_second,
        kv_blocks_used: load.kv_blocks_used,
        kv_blocks_max: load.kv_blocks_max,
        stalled_ms: load.stalled_ms,
        prefixes: digests_to_wire(&load.prefixes),
    }
}

#[cfg(feature = "server")]
pub(crate) fn place(request: rpc::PlaceRequest) -> Result<PlaceCommand, InvalidField> {
    bounded("latencies", request.latencies.len(), LATENCIES_MAX)?;
    bounded("avoid", request.avoid.len(), AVOID_MAX)?;
    Ok(PlaceCommand {
        prefix: digests("prefix", &request.prefix, PREFIX_BLOCKS_MAX)?,
        device: request.device,
        model: request.model,
        region: request.region,
        latencies_us: request.latencies.into_iter().map(|latency| (latency.node, latency.rtt_us)).collect(),
        avoid: request.avoid,
    })
}

#[cfg(feature = "client")]
pub(crate) fn place_to_wire(id: RequestId, place: &PlaceCommand) -> rpc::PlaceRequest {
    let latencies = place.latencies_us.iter().take(LATENCIES_MAX);
    rpc::PlaceRequest {
        request_id: bytes::Bytes::copy_from_slice(&id.0),
        device: place.device.clone(),
        model: place.model.clone(),
        prefix: digests_to_wire(&place.prefix[..place.prefix.len().min(PREFIX_BLOCKS_MAX)]),
        region: place.region.clone(),
        latencies: latencies.map(|(node, rtt_us)| rpc::Latency { node: node.clone(), rtt_us: *rtt_us }).collect(),
        avoid: place.avoid.iter().take(AVOID_MAX).cloned().collect(),
    }
}

#[cfg(feature = "server")]
pub(crate) fn refusal_to_wire(refusal: &Refusal) -> rpc::Refusal {
    use rpc::refusal::Code;
    let (code, models, excluded) = match refusal {
        Refusal::UnknownModel { known, .. } => (Code::UnknownModel, known.clone(), Vec::new()),
        Refusal::NoNode { excluded, .. } => (Code::NoNode, Vec::new(), excluded.clone()),
        // The wire has one code for what may work later.
        Refusal::Full { .. } | Refusal::Taken { .. } => (Code::Full, Vec::new(), Vec::new()),
        Refusal::Invalid { .. } => (Code::Invalid, Vec::new(), Vec::new()),
    };
    rpc::Refusal {
        code: code.into(),
        message: refusal.to_string(),
        models,
        excluded: excluded.into_iter().map(|(node, reason)| rpc::Excluded { node, reason }).collect(),
    }
}

/// `model` is what was asked for; the wire does not repeat it.
#[cfg(feature = "client")]
pub(crate) fn refusal(refusal: rpc::Refusal, model: &str) -> Refusal {
    use rpc::refusal::Code;
    match refusal.code() {
        Code::UnknownModel => Refusal::UnknownModel { model: model.into(), known: refusal.models },
        Code::NoNode => {
            let excluded = refusal.excluded.into_iter().map(|other| (other.node, other.reason));
            Refusal::NoNode { model: model.into(), excluded: excluded.collect() }
        }
        Code::Full => Refusal::Full { message: refusal.message },
        Code::Invalid | Code::Unspecified => Refusal::Invalid { message: refusal.message },
    }
}

#[cfg(all(test, feature = "client", feature = "server"))]
mod tests;

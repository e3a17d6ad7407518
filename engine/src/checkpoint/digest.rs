//! Fingerprints of models: over the stored bytes and the configuration that shapes them, so that two
//! files with the same layers are recognised whatever lies above.

use tandem_proto::ids::Digest;

use super::Checkpoint;
use super::names::Role;
use super::spec::FeedForward;

/// Separates fingerprints of this kind and version from all others.
const DOMAIN: &str = "tandem model fingerprint 3";

/// Bytes that are hashed before their pages are given back.
const PIECE_BYTES: usize = 1 << 20;

/// Digest of the whole model and cumulative digests of its layers. Gives the files' pages back on the way.
pub(crate) fn of(file: &Checkpoint) -> (Digest, Vec<Digest>) {
    let spec = &file.spec;
    let release = file.tensors().releaser();
    let add = |hash: &mut blake3::Hasher, layer, role| add(hash, file, layer, role, &release);
    let mut hash = blake3::Hasher::new();
    hash.update(DOMAIN.as_bytes());
    add(&mut hash, 0, Role::Embedding);
    let mut layers = Vec::with_capacity(spec.layers);
    for layer in 0..spec.layers {
        hash.update(spec.shaping(layer).as_bytes());
        for role in roles(spec.feed_forward[layer]) {
            add(&mut hash, layer, role);
        }
        layers.push(Digest(*hash.finalize().as_bytes()));
    }
    add(&mut hash, 0, Role::FinalNorm);
    if !spec.tied_head {
        add(&mut hash, 0, Role::Head);
    }
    release(usize::MAX);
    hash.update(spec.canonical().as_bytes());
    (Digest(*hash.finalize().as_bytes()), layers)
}

/// Adds a tensor, if the file has it: whether it must is checked when the weights are loaded.
fn add(hash: &mut blake3::Hasher, file: &Checkpoint, layer: usize, role: Role, release: &dyn Fn(usize)) {
    let Ok(Some(t)) = file.find(layer, role) else { return };
    hash.update(format!("{} {} {:?} {};", key(role), t.stored.name(), t.shape, t.bytes.len()).as_bytes());
    for piece in t.bytes.chunks(PIECE_BYTES) {
        hash.update(piece);
        release(piece.len());
    }
}

/// What a role is called in fingerprints; the name in the code may change.
fn key(role: Role) -> String {
    let key = match role {
        Role::Embedding => "embedding",
        Role::FinalNorm => "final-norm",
        Role::Head => "head",
        Role::AttentionNorm => "attention-norm",
        Role::AttentionPostNorm => "attention-post-norm",
        Role::FeedForwardNorm => "feed-forward-norm",
        Role::FeedForwardPostNorm => "feed-forward-post-norm",
        Role::Query => "query",
        Role::Key => "key",
        Role::Value => "value",
        Role::Output => "output",
        Role::QueryBias => "query-bias",
        Role::KeyBias => "key-bias",
        Role::ValueBias => "value-bias",
        Role::OutputBias => "output-bias",
        Role::QueryNorm => "query-norm",
        Role::KeyNorm => "key-norm",
        Role::Sinks => "sinks",
        Role::QueryDown => "query-down",
        Role::QueryUp => "query-up",
        Role::LatentDown => "latent-down",
        Role::LatentNorm => "latent-norm",
        Role::LatentUp => "latent-up",
        Role::LatentKeyUp => "latent-key-up",
        Role::LatentValueUp => "latent-value-up",
        Role::Gate => "gate",
        Role::Up => "up",
        Role::Down => "down",
        Role::GateBias => "gate-bias",
        Role::UpBias => "up-bias",
        Role::DownBias => "down-bias",
        Role::Router => "router",
        Role::RouterBias => "router-bias",
        Role::RouterCorrection => "router-correction",
        Role::SharedGate => "shared-gate",
        Role::SharedUp => "shared-up",
        Role::SharedDown => "shared-down",
        Role::SharedScore => "shared-score",
        Role::ExpertGate(e) => return format!("expert-gate {e}"),
        Role::ExpertUp(e) => return format!("expert-up {e}"),
        Role::ExpertDown(e) => return format!("expert-down {e}"),
        Role::ExpertGateBias(e) => return format!("expert-gate-bias {e}"),
        Role::ExpertUpBias(e) => return format!("expert-up-bias {e}"),
        Role::ExpertDownBias(e) => return format!("expert-down-bias {e}"),
    };
    key.to_owned()
}

/// Every role a layer may have; those it lacks add nothing.
fn roles(feed_forward: FeedForward) -> Vec<Role> {
    let mut roles = vec![
        Role::AttentionNorm,
        Role::AttentionPostNorm,
        Role::FeedForwardNorm,
        Role::FeedForwardPostNorm,
        Role::Output,
        Role::OutputBias,
        Role::Query,
        Role::QueryBias,
        Role::QueryNorm,
        Role::QueryDown,
        Role::QueryUp,
        Role::Key,
        Role::KeyBias,
        Role::KeyNorm,
        Role::Value,
        Role::ValueBias,
        Role::Sinks,
        Role::LatentDown,
        Role::LatentNorm,
        Role::LatentUp,
        Role::LatentKeyUp,
        Role::LatentValueUp,
    ];
    match feed_forward {
        FeedForward::Dense { .. } => {
            roles.extend([Role::Gate, Role::Up, Role::Down, Role::GateBias, Role::UpBias, Role::DownBias]);
        }
        FeedForward::Experts(e) => {
            roles.extend([Role::Router, Role::RouterBias, Role::RouterCorrection]);
            roles.extend([Role::SharedGate, Role::SharedUp, Role::SharedDown, Role::SharedScore]);
            for i in 0..e.experts {
                roles.extend([Role::ExpertGate(i), Role::ExpertUp(i), Role::ExpertDown(i)]);
                roles.extend([Role::ExpertGateBias(i), Role::ExpertUpBias(i), Role::ExpertDownBias(i)]);
            }
        }
    }
    roles
}

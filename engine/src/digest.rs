//! Fingerprints of models: over the stored bytes and the configuration that shapes them, so that two
//! files with the same layers are recognised whatever lies above.

use tandem_proto::ids::Digest;

use crate::error::EngineError;
use crate::load::Checkpoint;
use crate::names::Role;
use crate::spec::{Attention, FeedForward};

/// Separates fingerprints of this kind and version from all others.
const DOMAIN: &str = "tandem model fingerprint 1";

/// Digest of the whole model and cumulative digests of its layers.
pub(crate) fn of(file: &Checkpoint) -> Result<(Digest, Vec<Digest>), EngineError> {
    let spec = &file.spec;
    let mut hash = blake3::Hasher::new();
    hash.update(DOMAIN.as_bytes());
    add(&mut hash, file, 0, Role::Embedding)?;
    let mut layers = Vec::with_capacity(spec.layers);
    for layer in 0..spec.layers {
        hash.update(spec.shaping(layer).as_bytes());
        for role in roles(spec.attention, spec.feed_forward[layer]) {
            add(&mut hash, file, layer, role)?;
        }
        layers.push(Digest(*hash.finalize().as_bytes()));
    }
    add(&mut hash, file, 0, Role::FinalNorm)?;
    if !spec.tied_head {
        add(&mut hash, file, 0, Role::Head)?;
    }
    hash.update(format!("{spec:?}").as_bytes());
    Ok((Digest(*hash.finalize().as_bytes()), layers))
}

fn add(hash: &mut blake3::Hasher, file: &Checkpoint, layer: usize, role: Role) -> Result<(), EngineError> {
    let t = file.require(layer, role)?;
    hash.update(format!("{role:?} {:?} {:?} {}", t.stored, t.shape, t.bytes.len()).as_bytes());
    hash.update(t.bytes);
    Ok(())
}

fn roles(attention: Attention, feed_forward: FeedForward) -> Vec<Role> {
    let mut roles = vec![Role::AttentionNorm, Role::FeedForwardNorm, Role::Output];
    match attention {
        Attention::Grouped { .. } => roles.extend([Role::Query, Role::Key, Role::Value]),
        Attention::Latent { q_rank, .. } => {
            roles.extend([Role::LatentDown, Role::LatentNorm, Role::LatentUp]);
            match q_rank {
                Some(_) => roles.extend([Role::QueryDown, Role::QueryNorm, Role::QueryUp]),
                None => roles.push(Role::Query),
            }
        }
    }
    match feed_forward {
        FeedForward::Dense { .. } => roles.extend([Role::Gate, Role::Up, Role::Down]),
        FeedForward::Experts(e) => {
            roles.extend([Role::Router, Role::RouterBias]);
            if e.shared_width > 0 {
                roles.extend([Role::SharedGate, Role::SharedUp, Role::SharedDown]);
            }
            for i in 0..e.experts {
                roles.extend([Role::ExpertGate(i), Role::ExpertUp(i), Role::ExpertDown(i)]);
            }
        }
    }
    roles
}

//! The layers an edge and a cloud model share, as both ends of a KV exchange see them.

use tandem_proto::block::BlockChain;
use tandem_proto::exchange::{ExchangeError, StateRun};
use tandem_proto::ids::Digest;
use tandem_proto::message::{KvShape, ModelCard};

use crate::model::{Model, trunk_layers};

/// Why a model has no trunk with a peer's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTrunk {
    /// This node's settings.
    #[error("`trunk_layers` is 0 on this node")]
    OffHere,
    /// The peer's settings, or an engine that hands out no state.
    #[error("the peer shares no layers")]
    OffThere,
    /// Equal layers compute other bits.
    #[error("the models run on different arithmetic (`{here}` here, `{there}` there)")]
    Numerics {
        /// Ours.
        here: String,
        /// The peer's.
        there: String,
    },
    /// Two models.
    #[error("the models differ in their embedding or their first layer")]
    Layers,
}

/// The leading layers of a model that its node shares with peers whose model has them too.
#[derive(Clone, Debug)]
pub struct SharedLayers {
    /// See [`Model::layer_digests`].
    digests: Vec<Digest>,
    numerics: String,
    hidden_size: usize,
    width: usize,
    layers_of_model: usize,
}

impl SharedLayers {
    /// All layers of `model`, or at most `layers_max`.
    #[must_use]
    pub fn of(model: &Model, layers_max: Option<usize>) -> Self {
        Self {
            digests: model.layer_digests().iter().take(layers_max.unwrap_or(usize::MAX)).copied().collect(),
            numerics: model.numerics().to_owned(),
            hidden_size: model.spec().hidden_size,
            width: model.spec().kv_width(),
            layers_of_model: model.spec().layers,
        }
    }

    /// Whether there are any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The trunk of `layers` layers; none for 0 or more than are shared.
    #[must_use]
    pub fn at(&self, layers: usize) -> Option<Trunk> {
        Some(Trunk {
            layers,
            hidden_size: self.hidden_size,
            share: layers as f64 / self.layers_of_model.max(1) as f64,
            width: self.width,
            digest: *self.digests.get(layers.checked_sub(1)?)?,
            numerics: self.numerics.clone(),
        })
    }

    /// The trunk with a peer's model: as many leading layers as have the same weights and the same arithmetic in
    /// both, so the same bits.
    ///
    /// # Errors
    /// Why there is none.
    pub fn with(&self, peer: &ModelCard) -> Result<Trunk, NoTrunk> {
        if self.is_empty() {
            return Err(NoTrunk::OffHere);
        }
        if peer.layers.is_empty() {
            return Err(NoTrunk::OffThere);
        }
        if peer.numerics != self.numerics {
            return Err(NoTrunk::Numerics { here: self.numerics.clone(), there: peer.numerics.clone() });
        }
        self.at(trunk_layers(&self.digests, &peer.layers)).ok_or(NoTrunk::Layers)
    }
}

/// What a node says of its model to peers with which it shares at most `layers_max` layers: with no digests of the
/// others both ends find the same trunk.
#[must_use]
pub fn announced(mut card: ModelCard, layers_max: Option<usize>) -> ModelCard {
    card.layers.truncate(layers_max.unwrap_or(usize::MAX));
    card
}

/// The leading layers that the models of two nodes have in common.
#[derive(Clone, Debug)]
pub struct Trunk {
    /// Number of layers.
    pub layers: usize,
    /// Numbers of a hidden state.
    pub hidden_size: usize,
    /// Part of the model's layers.
    pub share: f64,
    width: usize,
    digest: Digest,
    numerics: String,
}

impl Trunk {
    /// Shape of the trunk's blocks, with or without the hidden states above it.
    #[must_use]
    pub fn shape(&self, with_hidden: bool) -> KvShape {
        KvShape {
            layer_from: 0,
            layer_to: self.layers as u32,
            width: self.width as u32,
            hidden: if with_hidden { self.hidden_size as u32 } else { 0 },
        }
    }

    /// Whether the wire carries the state of `tokens` tokens.
    #[must_use]
    pub fn fits(&self, tokens: usize, with_hidden: bool) -> bool {
        StateRun::check(&self.shape(with_hidden), tokens).is_ok()
    }

    /// The run of state of `tokens` for a tenant.
    ///
    /// # Errors
    /// The run passes the wire's bounds.
    pub fn run(&self, tenant_key: [u8; 32], tokens: &[u32], with_hidden: bool) -> Result<StateRun, ExchangeError> {
        let shape = self.shape(with_hidden);
        let chain = BlockChain::new(tenant_key, self.digest, &self.numerics, &shape);
        StateRun::new(chain, shape, tokens)
    }
}

/// Numbers of a payload, f32 little-endian; a trailing part of a number is ignored.
#[must_use]
pub fn numbers(payload: &[u8]) -> Vec<f32> {
    payload.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Payload of numbers, f32 little-endian.
pub fn payload<'a>(numbers: impl IntoIterator<Item = &'a f32>) -> Vec<u8> {
    numbers.into_iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The payloads of a run's blocks, made of their KV state and, if the run has them, the hidden states above it.
#[must_use]
pub fn payloads(run: &StateRun, state: &[Vec<f32>], hidden: &[f32]) -> Vec<Vec<u8>> {
    let width = run.shape.hidden as usize;
    let mut rows = hidden;
    let blocks = state.iter().enumerate().map(|(index, kv)| {
        let own;
        (own, rows) = rows.split_at((run.block_tokens(index) * width).min(rows.len()));
        payload(kv.iter().chain(own))
    });
    blocks.collect()
}

/// KV state per block and hidden states of a run's payloads, whose lengths have been checked.
#[must_use]
pub fn parts(run: &StateRun, payloads: &[impl AsRef<[u8]>]) -> (Vec<Vec<f32>>, Vec<f32>) {
    let (width, mut hidden) = (run.shape.hidden as usize, Vec::new());
    let state = payloads.iter().enumerate().map(|(index, payload)| {
        let mut kv = numbers(payload.as_ref());
        hidden.append(&mut kv.split_off(kv.len().saturating_sub(run.block_tokens(index) * width)));
        kv
    });
    let state = state.collect();
    (state, hidden)
}

#[cfg(test)]
mod tests {
    use tandem_proto::message::Exactness;

    use super::*;

    fn layers(digests: &[u8]) -> Vec<Digest> {
        digests.iter().map(|n| Digest([*n; 32])).collect()
    }

    fn ours(digests: &[u8]) -> SharedLayers {
        SharedLayers {
            digests: layers(digests),
            numerics: "f32-a".into(),
            hidden_size: 8,
            width: 4,
            layers_of_model: 4,
        }
    }

    fn card(digests: &[u8], numerics: &str) -> ModelCard {
        ModelCard {
            name: "peer".into(),
            digest: Digest([9; 32]),
            tokenizer: Digest([8; 32]),
            tokenizer_marks: Vec::new(),
            layers: layers(digests),
            numerics: numerics.into(),
            hidden_size: 8,
            context_tokens: 64,
            exactness: Exactness::Bitwise,
        }
    }

    #[test]
    fn the_trunk_is_as_many_leading_layers_as_are_equal() {
        let other_numerics = || NoTrunk::Numerics { here: "f32-a".into(), there: "f32-b".into() };
        // (our layers, the peer's, its arithmetic, layers of the trunk)
        type Row = (&'static [u8], &'static [u8], &'static str, Result<usize, NoTrunk>);
        let table: [Row; 10] = [
            (&[1, 2, 3, 4], &[1, 2, 7, 8, 9], "f32-a", Ok(2)),
            (&[1, 2, 3, 4], &[1, 2, 3, 4], "f32-a", Ok(4)),
            // One is the first layers of the other.
            (&[1, 2], &[1, 2, 3, 4], "f32-a", Ok(2)),
            (&[1, 2, 3, 4], &[1], "f32-a", Ok(1)),
            // Digests are cumulative: what is equal above a difference counts for nothing.
            (&[1, 2, 3, 4], &[7, 2, 3, 4], "f32-a", Err(NoTrunk::Layers)),
            (&[1, 2, 3, 4], &[1, 2, 3, 4], "f32-b", Err(other_numerics())),
            (&[], &[1, 2], "f32-a", Err(NoTrunk::OffHere)),
            (&[1, 2], &[], "f32-a", Err(NoTrunk::OffThere)),
            (&[], &[], "f32-a", Err(NoTrunk::OffHere)),
            (&[1, 2], &[], "", Err(NoTrunk::OffThere)),
        ];
        for (own, theirs, numerics, expected) in table {
            let found = ours(own).with(&card(theirs, numerics));
            assert_eq!(found.map(|trunk| trunk.layers), expected, "{own:?} {theirs:?}");
        }
    }

    #[test]
    fn a_bound_on_either_end_bounds_both() {
        for (here, there, expected) in [(None, None, 3), (Some(2), None, 2), (None, Some(1), 1), (Some(1), Some(2), 1)]
        {
            let (big, small) = ([1, 2, 3, 4], [1, 2, 3, 8]);
            let own = |all: &[u8], max: Option<usize>| ours(&all[..max.unwrap_or(all.len()).min(all.len())]);
            let (edge, cloud) = (own(&small, here), own(&big, there));
            let (to_cloud, to_edge) = (announced(card(&small, "f32-a"), here), announced(card(&big, "f32-a"), there));
            let found = (edge.with(&to_edge).map(|t| t.layers), cloud.with(&to_cloud).map(|t| t.layers));
            assert_eq!(found, (Ok(expected), Ok(expected)), "{here:?} {there:?}");
        }
    }

    #[test]
    fn payloads_are_taken_apart_as_they_were_put_together() {
        let trunk = ours(&[1, 2]).at(2).expect("two layers");
        let tokens: Vec<u32> = (0..40).collect();
        let state = vec![(0..2 * 32 * 4).map(|n| n as f32).collect(), (0..2 * 8 * 4).map(|n| -(n as f32)).collect()];
        for hidden in [Vec::new(), (0..40 * 8).map(|n| n as f32 + 0.5).collect::<Vec<f32>>()] {
            let run = trunk.run([1; 32], &tokens, !hidden.is_empty()).expect("fits");
            let payloads = payloads(&run, &state, &hidden);
            assert!(payloads.iter().enumerate().all(|(i, payload)| payload.len() == run.payload_bytes(i)));
            assert_eq!(parts(&run, &payloads), (state.clone(), hidden));
        }
    }

    #[test]
    fn a_trunk_has_one_to_all_of_the_shared_layers() {
        let shared = ours(&[1, 2]);
        for (layers, share) in [(0, None), (1, Some(0.25)), (2, Some(0.5)), (3, None)] {
            assert_eq!(shared.at(layers).map(|trunk| trunk.share), share, "{layers}");
        }
    }
}

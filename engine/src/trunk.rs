//! The layers an edge and a cloud model share, as both ends of a KV exchange see them.

use tandem_proto::block::BlockChain;
use tandem_proto::exchange::{ExchangeError, StateRun};
use tandem_proto::ids::Digest;
use tandem_proto::message::{Hello, KvShape};

use crate::model::Model;

/// A setting asks for more layers than a model has below its last one.
#[derive(Debug, thiserror::Error)]
#[error("trunk_layers is {asked}, the model has {layers} layers; use 0 or the number the pair shares")]
pub struct TooManyLayers {
    asked: usize,
    layers: usize,
}

/// The leading layers of a model that may be shared.
#[derive(Clone, Debug)]
pub struct Trunk {
    /// Number of layers.
    pub layers: usize,
    /// Numbers of a hidden state.
    pub hidden_size: usize,
    width: usize,
    digest: Digest,
    numerics: String,
}

impl Trunk {
    /// The first `layers` layers of `model`; none for 0 or more than it has.
    #[must_use]
    pub fn of(model: &Model, layers: usize) -> Option<Self> {
        Some(Self {
            layers,
            hidden_size: model.spec().hidden_size,
            width: model.spec().kv_width(),
            digest: *model.layer_digests().get(layers.checked_sub(1)?)?,
            numerics: model.numerics().to_owned(),
        })
    }

    /// As [`Self::of`], for a number of layers out of a node's settings.
    ///
    /// # Errors
    /// The trunk leaves the model no layer above it.
    pub fn of_setting(model: &Model, asked: usize) -> Result<Option<Self>, TooManyLayers> {
        let layers = model.spec().layers;
        if asked >= layers { Err(TooManyLayers { asked, layers }) } else { Ok(Self::of(model, asked)) }
    }

    /// True if a peer has this trunk in some model: the same weights and the same arithmetic, so the
    /// same bits.
    #[must_use]
    pub fn is_shared_with(&self, peer: &Hello) -> bool {
        let same = |m: &tandem_proto::message::ModelCard| {
            m.numerics == self.numerics && m.layers.get(self.layers - 1) == Some(&self.digest)
        };
        peer.models.iter().any(same)
    }

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

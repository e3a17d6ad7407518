//! What a model's files mean: which decoder they describe (`spec`), which tensor has which job (`names`),
//! and the digests that tell one model from another (`digest`).

pub(crate) mod digest;
mod inspect;
pub(crate) mod names;
pub mod spec;

pub use inspect::{FormatShare, Inspection, inspect};

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use names::{Location, Role, Scheme};
use spec::{DecoderSpec, RopeScaling};

use crate::container::{RawTensor, Tensors, read_small};
use crate::error::EngineError;

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// Files inside the program: `config.json` and `model.safetensors`.
    Embedded {
        /// `config.json`.
        config: &'static [u8],
        /// `model.safetensors`.
        weights: &'static [u8],
    },
    /// A folder in Hugging Face layout: `config.json` and `*.safetensors`.
    HfDir(PathBuf),
    /// A GGUF file; of a split model, any part.
    Gguf(PathBuf),
}

/// An opened model: its spec and its tensors by role.
pub(crate) struct Checkpoint {
    pub(crate) spec: DecoderSpec,
    scheme: Scheme,
    tensors: Tensors,
    /// Names of the tensors that the weights are made of.
    used: Mutex<HashSet<String>>,
}

impl Checkpoint {
    fn new(spec: DecoderSpec, scheme: Scheme, tensors: Tensors) -> Self {
        Self { spec, scheme, tensors, used: Mutex::default() }
    }

    pub(crate) fn open(files: &ModelFiles) -> Result<Self, EngineError> {
        match files {
            ModelFiles::Embedded { config, weights } => {
                let spec = DecoderSpec::from_hf(config)?;
                Ok(Self::new(spec, Scheme::HuggingFace, Tensors::safetensors_in_program(weights)?))
            }
            ModelFiles::HfDir(dir) => {
                let spec = DecoderSpec::from_hf(&read_small(&dir.join("config.json"))?)?;
                Ok(Self::new(spec, Scheme::HuggingFace, Tensors::safetensors_in_dir(dir)?))
            }
            ModelFiles::Gguf(path) => {
                let (tensors, spec) = Tensors::gguf_file(path, spec::from_gguf)?;
                Ok(Self::new(spec, Scheme::Gguf, tensors))
            }
        }
    }

    /// The bytes of a whole GGUF model.
    pub(crate) fn of_gguf(bytes: Vec<u8>) -> Result<Self, EngineError> {
        let (tensors, spec) = Tensors::gguf_in_memory(bytes, spec::from_gguf)?;
        Ok(Self::new(spec, Scheme::Gguf, tensors))
    }

    /// The bytes of a `config.json` and a `model.safetensors`.
    pub(crate) fn of_safetensors(config: &[u8], weights: Vec<u8>) -> Result<Self, EngineError> {
        let spec = DecoderSpec::from_hf(config)?;
        Ok(Self::new(spec, Scheme::HuggingFace, Tensors::safetensors_in_memory(weights)?))
    }

    /// The tensors, whatever they are for.
    pub(crate) fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The tensor for a role, if the file has it.
    pub(crate) fn find(&self, layer: usize, role: Role) -> Result<Option<RawTensor<'_>>, EngineError> {
        for Location { name, part } in names::locations(self.scheme, self.spec.family, layer, role) {
            if let Some(t) = self.tensors.part(name, part)? {
                return Ok(Some(t));
            }
        }
        Ok(None)
    }

    /// The tensor for a role, of whatever shape. It counts as used.
    pub(crate) fn require(&self, layer: usize, role: Role) -> Result<RawTensor<'_>, EngineError> {
        let Some(t) = self.find(layer, role)? else {
            let place = names::locations(self.scheme, self.spec.family, layer, role).into_iter().next();
            let name = place.map_or_else(|| format!("{role:?}"), |l| l.name);
            return Err(EngineError::tensor(name, "is missing from the file"));
        };
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(t.name.clone());
        Ok(t)
    }

    /// Checks that the weights are made of all that the file has: a tensor that is not asked for (a bias,
    /// a norm) belongs to a computation that is not the one described, and the answers would be wrong.
    pub(crate) fn check_all_used(&self) -> Result<(), EngineError> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |name: &&str| !used.contains(*name) && !self.may_lie_idle(name, &used);
        match self.tensors.entries().map(|(name, _)| name).filter(idle).min() {
            None => Ok(()),
            Some(name) => {
                Err(EngineError::tensor(name, "is in the file, but nothing that the configuration describes uses it"))
            }
        }
    }

    /// What files have that weights need not be made of.
    fn may_lie_idle(&self, name: &str, used: &HashSet<String>) -> bool {
        match self.scheme {
            // Divisors are part of the spec, which has taken those for the model's context.
            Scheme::Gguf if name.starts_with("rope_f") => self
                .spec
                .ropes
                .iter()
                .any(|rope| matches!(rope.scaling, RopeScaling::Factors { .. } | RopeScaling::Divided { .. })),
            // Files for more than one engine have it beside its halves.
            Scheme::Gguf => {
                name.strip_suffix("attn_kv_b.weight").is_some_and(|at| used.contains(&format!("{at}attn_k_b.weight")))
            }
            Scheme::HuggingFace => {
                // Layers above the last predict further tokens (DeepSeek-V3).
                let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
                name.ends_with("rotary_emb.inv_freq")
                    || (self.spec.tied_head && name == "lm_head.weight")
                    || name.strip_suffix("_scale_inv").is_some_and(|of| used.contains(of))
                    || name.strip_suffix("_scales").is_some_and(|of| used.contains(&format!("{of}_blocks")))
                    || layer.is_some_and(|layer: usize| layer >= self.spec.layers)
            }
        }
    }

    /// The tensor for a role, of exactly this shape.
    pub(crate) fn tensor(&self, layer: usize, role: Role, shape: &[usize]) -> Result<RawTensor<'_>, EngineError> {
        let t = self.require(layer, role)?;
        if t.shape != shape {
            let problem = format!("has shape {:?}, the configuration asks for {shape:?}", t.shape);
            return Err(EngineError::tensor(t.name, problem));
        }
        Ok(t)
    }
}

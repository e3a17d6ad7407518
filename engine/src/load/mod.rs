//! Model files as an index of checked tensors: safetensors (embedded, one file or shards) and GGUF.
//! Nothing is allocated by what a file claims before the claim is checked against its size.

mod convert;
mod fp8;
pub(crate) mod gguf;
mod inspect;
mod mxfp4;
mod safetensors;
pub(crate) mod split;
#[cfg(test)]
mod tests;

pub use inspect::{FormatShare, Inspection, inspect};
pub use split::{SplitPart, split_part};

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::EngineError;
use crate::names::{self, Location, Part, Role, Scheme};
use crate::spec::{self, DecoderSpec, RopeScaling};

/// Largest JSON file read, bytes (tokenizers of large vocabularies have tens of MiB).
pub(crate) const JSON_BYTES_MAX: u64 = 256 << 20;

/// Bytes of files that stay mapped in while weights are packed.
const HELD_BYTES_MAX: usize = 1 << 20;

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

/// Number format of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Fp4,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl Stored {
    /// The format's name, as llama.cpp spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Fp4 => "FP4",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }
}

/// One tensor as stored. Shape is outermost first; `bytes` fits type and shape.
#[derive(Clone)]
pub(crate) struct RawTensor<'a> {
    pub(crate) name: String,
    pub(crate) stored: Stored,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
}

/// How the numbers of a file's tensor are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As they are.
    Plain(Stored),
    /// GGUF's blocks of four-bit floats, see `mxfp4`.
    Mxfp4,
    /// Codes and scales of gpt-oss's own experts (see `mxfp4`).
    Bytes,
    /// E4M3 codes whose block factors are in `NAME_scale_inv`.
    Fp8,
}

impl Encoding {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain(stored) => stored.name(),
            Self::Mxfp4 => "MXFP4",
            Self::Bytes => "U8",
            Self::Fp8 => "F8_E4M3",
        }
    }
}

/// Shape and bytes of slab `i` along the first dimension; none if there is no such slab.
fn slab<'a, 'b>(shape: &'a [usize], bytes: &'b [u8], i: usize) -> Option<(&'a [usize], &'b [u8])> {
    let (&count, rest) = shape.split_first()?;
    let each = bytes.len().checked_div(count)?;
    Some((rest, bytes.get(each.checked_mul(i)?..each.checked_mul(i + 1)?)?))
}

struct Entry {
    storage: usize,
    encoding: Encoding,
    shape: Vec<usize>,
    range: Range<usize>,
}

enum Storage {
    Static(&'static [u8]),
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Static(b) => b,
            Self::Mapped(m) => m,
            Self::Owned(v) => v,
        }
    }
}

/// An opened model: its spec and its tensors by name.
pub(crate) struct Checkpoint {
    pub(crate) spec: DecoderSpec,
    scheme: Scheme,
    storages: Vec<Arc<Storage>>,
    entries: HashMap<String, Entry>,
    /// Names of the tensors that the weights are made of.
    used: Mutex<HashSet<String>>,
}

impl Storage {
    /// Gives the pages of a mapped file that were read back to the system; reading maps them again.
    fn release(&self) {
        #[cfg(unix)]
        if let Self::Mapped(m) = self {
            // SAFETY: the map is read-only and backed by a file, so whoever reads on finds the same
            // bytes.
            #[allow(unsafe_code)]
            let _ = unsafe { m.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, 0, m.len()) };
        }
    }
}

impl Checkpoint {
    /// Bytes of all tensors.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.range.len()).sum()
    }

    /// A call that is told the bytes read since the last one and gives the pages of the files back
    /// every [`HELD_BYTES_MAX`], so that a load does not hold the file beside the packed weights.
    pub(crate) fn releaser(&self) -> impl Fn(usize) + Send + Sync + 'static {
        let storages: Vec<_> = self.storages.iter().map(Arc::downgrade).collect();
        let held = AtomicUsize::new(0);
        move |bytes| {
            if held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) >= HELD_BYTES_MAX {
                held.store(0, Ordering::Relaxed);
                storages.iter().filter_map(Weak::upgrade).for_each(|s| s.release());
            }
        }
    }

    pub(crate) fn open(files: &ModelFiles) -> Result<Self, EngineError> {
        match files {
            ModelFiles::Embedded { config, weights } => {
                let mut c = Self::empty(DecoderSpec::from_hf(config)?, Scheme::HuggingFace);
                c.add_safetensors(Storage::Static(weights))?;
                Ok(c)
            }
            ModelFiles::HfDir(dir) => {
                let spec = DecoderSpec::from_hf(&read_small(&dir.join("config.json"))?)?;
                let mut c = Self::empty(spec, Scheme::HuggingFace);
                for path in safetensors::shards(dir)? {
                    c.add_safetensors(map(&path)?)?;
                }
                Ok(c)
            }
            ModelFiles::Gguf(path) => Self::gguf_parts(&split::first(path)),
        }
    }

    /// A model in one file or in several; `path` is the first.
    fn gguf_parts(path: &Path) -> Result<Self, EngineError> {
        let storage = map(path)?;
        let first = gguf::Gguf::parse(storage.bytes())?;
        let others = split::others(path, &first)?;
        let mut maps = Vec::with_capacity(others.len());
        for path in &others {
            maps.push(map(path)?);
        }
        let mut parts = vec![first];
        for (index, map) in (1..).zip(&maps) {
            let part = gguf::Gguf::parse(map.bytes())?;
            split::check(&part, index, 1 + others.len() as u64)?;
            parts.push(part);
        }
        let files: Vec<&[u8]> = std::iter::once(&storage).chain(&maps).map(Storage::bytes).collect();
        let mut c = Self::gguf(&mut parts, &files)?;
        c.storages = std::iter::once(storage).chain(maps).map(Arc::new).collect();
        Ok(c)
    }

    /// The index over the parts of a model, the first of which has the metadata; `files` are their
    /// bytes. The caller adds the storages, in the same order.
    fn gguf(parts: &mut [gguf::Gguf<'_>], files: &[&[u8]]) -> Result<Self, EngineError> {
        // The tensors' names tell the spec what the model has, whichever file they are in.
        let mut all = BTreeMap::new();
        let mut entries: HashMap<String, Entry> = HashMap::new();
        for (storage, part) in parts.iter_mut().enumerate() {
            for (name, t) in std::mem::take(&mut part.tensors) {
                let entry = Entry { storage, encoding: t.encoding, shape: t.shape.clone(), range: t.range.clone() };
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(EngineError::tensor(name, "is stored twice"));
                }
                all.insert(name, t);
            }
        }
        let Some(first) = parts.first_mut() else {
            return Err(EngineError::Format { format: "gguf", problem: "no file".into() });
        };
        first.tensors = all;
        split::check_tensors(first, first.tensors.len())?;
        let stored = |name: &str| entries.get(name).and_then(|e| files.get(e.storage)?.get(e.range.clone()));
        let spec = spec::from_gguf(first, &stored)?;
        Ok(Self { entries, ..Self::empty(spec, Scheme::Gguf) })
    }

    fn empty(spec: DecoderSpec, scheme: Scheme) -> Self {
        Self { spec, scheme, storages: Vec::new(), entries: HashMap::new(), used: Mutex::default() }
    }

    fn add_safetensors(&mut self, storage: Storage) -> Result<(), EngineError> {
        let at = self.storages.len();
        for (name, encoding, shape, range) in safetensors::index(storage.bytes())? {
            let entry = Entry { storage: at, encoding, shape, range };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(EngineError::tensor(name, "is stored twice"));
            }
        }
        self.storages.push(Arc::new(storage));
        Ok(())
    }

    /// The tensor for a role, if the file has it.
    pub(crate) fn find(&self, layer: usize, role: Role) -> Result<Option<RawTensor<'_>>, EngineError> {
        for Location { name, part } in names::locations(self.scheme, self.spec.family, layer, role) {
            if let Some(e) = self.entries.get(&name) {
                return self.part(name, e, &part).map(Some);
            }
        }
        Ok(None)
    }

    fn part(&self, name: String, e: &Entry, part: &Part) -> Result<RawTensor<'_>, EngineError> {
        let none = |name: &str| EngineError::tensor(name, format!("of shape {:?} has no part {part:?}", e.shape));
        match *part {
            Part::Whole => self.decoded(name, e.encoding, &e.shape, self.bytes(e)?),
            Part::Row => {
                let t = self.decoded(name, e.encoding, &e.shape, self.bytes(e)?)?;
                Ok(RawTensor { shape: [&[1], &t.shape[..]].concat(), ..t })
            }
            Part::Slab(i) => {
                let (shape, bytes) = slab(&e.shape, self.bytes(e)?, i).ok_or_else(|| none(&name))?;
                self.decoded(name, e.encoding, shape, bytes)
            }
            Part::Columns { slab: i, offset, step } => {
                let (shape, bytes) = slab(&e.shape, self.bytes(e)?, i).ok_or_else(|| none(&name))?;
                let t = self.decoded(name.clone(), e.encoding, shape, bytes)?;
                t.columns(offset, step).ok_or_else(|| none(&name))
            }
            Part::Mxfp4Rows { slab: i, offset, step } => {
                let scales = name.replace("_blocks", "_scales");
                let missing =
                    || EngineError::tensor(scales.clone(), format!("is missing from the file, but `{name}` is MXFP4"));
                let s = self.entries.get(&scales).ok_or_else(missing)?;
                let codes = slab(&e.shape, self.bytes(e)?, i).filter(|_| e.encoding == Encoding::Bytes);
                let exponents = slab(&s.shape, self.bytes(s)?, i).filter(|_| s.encoding == Encoding::Bytes);
                match (codes, exponents) {
                    (Some((&[rows, blocks, 16], codes)), Some((shape, exponents))) if *shape == [rows, blocks] => {
                        mxfp4::rows_of(name, [rows, blocks], codes, exponents, (offset, step))
                    }
                    _ => {
                        let problem = format!("of shape {:?} does not fit `{scales}` of {:?}", e.shape, s.shape);
                        Err(EngineError::tensor(name, problem))
                    }
                }
            }
        }
    }

    fn bytes(&self, e: &Entry) -> Result<&[u8], EngineError> {
        let bytes = self.storages.get(e.storage).and_then(|s| s.bytes().get(e.range.clone()));
        bytes.ok_or_else(|| EngineError::Format { format: "weights", problem: "a tensor lies outside its file".into() })
    }

    /// A tensor or a slab of one, as plain numbers.
    fn decoded<'a>(
        &self,
        name: String,
        encoding: Encoding,
        shape: &[usize],
        bytes: &'a [u8],
    ) -> Result<RawTensor<'a>, EngineError> {
        match encoding {
            Encoding::Plain(stored) => Ok(RawTensor { name, stored, shape: shape.to_vec(), bytes: bytes.into() }),
            Encoding::Mxfp4 => mxfp4::from_gguf(name, shape.to_vec(), bytes),
            Encoding::Bytes => Err(EngineError::tensor(name, "is stored as bytes (U8), numbers are needed")),
            Encoding::Fp8 => {
                let factors = format!("{name}_scale_inv");
                let scales = match self.entries.get(&factors) {
                    Some(e @ Entry { encoding: Encoding::Plain(_), .. }) => {
                        Some(self.decoded(factors.clone(), e.encoding, &e.shape, self.bytes(e)?)?)
                    }
                    _ => None,
                };
                let problem = format!("is missing from the file, but `{name}` is FP8");
                let scales = scales.ok_or_else(|| EngineError::tensor(factors, problem))?;
                fp8::unpack(name, shape, bytes, &scales)
            }
        }
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

    /// Checks that the weights are made of all that the file has: a tensor that nobody asks for (a bias,
    /// a norm) belongs to a computation that is not the one described, and the answers would be wrong.
    pub(crate) fn check_all_used(&self) -> Result<(), EngineError> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |name: &&String| !used.contains(*name) && !self.may_lie_idle(name, &used);
        match self.entries.keys().filter(idle).min() {
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

/// Checks the bytes of a GGUF file as a load would, tensors included, and returns its spec.
///
/// # Errors
/// What is wrong, naming the field or tensor.
pub fn check_gguf(bytes: &[u8]) -> Result<DecoderSpec, EngineError> {
    let storage = Storage::Owned(bytes.to_vec());
    let first = gguf::Gguf::parse(storage.bytes())?;
    // The other parts of a split model are files, and there are only these bytes.
    split::check(&first, 0, 1)?;
    let mut file = Checkpoint::gguf(&mut [first], &[storage.bytes()])?;
    file.storages.push(Arc::new(storage));
    check(&file)
}

/// Checks the bytes of a `config.json` and a `model.safetensors` as a load would.
///
/// # Errors
/// What is wrong, naming the field or tensor.
pub fn check_safetensors(config: &[u8], weights: &[u8]) -> Result<DecoderSpec, EngineError> {
    let mut file = Checkpoint::empty(DecoderSpec::from_hf(config)?, Scheme::HuggingFace);
    file.add_safetensors(Storage::Owned(weights.to_vec()))?;
    check(&file)
}

/// Loads everything and throws it away.
fn check(file: &Checkpoint) -> Result<DecoderSpec, EngineError> {
    crate::digest::of(file);
    crate::decoder::Weights::load(&crate::backend::cpu::Cpu::new(1)?, file)?;
    Ok(file.spec.clone())
}

/// Reads a whole small file (JSON, templates).
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, EngineError> {
    let io = |source| EngineError::Io { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > JSON_BYTES_MAX {
        let problem = format!("{} has {bytes} bytes, more than {JSON_BYTES_MAX}", path.display());
        return Err(EngineError::Format { format: "json", problem });
    }
    std::fs::read(path).map_err(io)
}

fn map(path: &Path) -> Result<Storage, EngineError> {
    Ok(Storage::Mapped(map_file(path)?))
}

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<memmap2::Mmap, EngineError> {
    let io = |source| EngineError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read-only and private. A file that shrinks under it raises SIGBUS, which no
    // check can exclude; weights are expected not to be rewritten in place while they are loaded.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::Mmap::map(&file) };
    map.map_err(io)
}

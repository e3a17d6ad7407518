//! The index of a model's tensors over all its files.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use super::gguf::Gguf;
use super::storage::Storage;
use super::{Encoding, RawTensor, fp8, mxfp4, safetensors, slab, split};
use crate::error::EngineError;

/// Bytes of files that stay mapped in while weights are packed.
const HELD_BYTES_MAX: usize = 1 << 20;

/// Which part of a stored tensor is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// One slab along the first dimension.
    Slab(usize),
    /// Every `step`th column of a slab from `offset` on, as the rows of a matrix (or as a vector).
    Columns { slab: usize, offset: usize, step: usize },
    /// Every `step`th row of a slab from `offset` on, in MXFP4 with scales of their own.
    Mxfp4Rows { slab: usize, offset: usize, step: usize },
    /// All of it, a vector that stands for a matrix of one row.
    Row,
}

/// The bytes of a tensor by its name, in whichever file of the model it is.
pub(crate) type StoredBytes<'a> = &'a dyn Fn(&str) -> Option<&'a [u8]>;

/// A tensor as its file has it.
pub(crate) struct Entry {
    storage: usize,
    pub(crate) encoding: Encoding,
    pub(crate) shape: Vec<usize>,
    range: Range<usize>,
}

impl Entry {
    /// Bytes in the file.
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }
}

/// The tensors of a model's files, by name.
#[derive(Default)]
pub(crate) struct Tensors {
    storages: Vec<Arc<Storage>>,
    entries: HashMap<String, Entry>,
}

impl Tensors {
    /// Those of a safetensors file inside the program.
    pub(crate) fn safetensors_in_program(bytes: &'static [u8]) -> Result<Self, EngineError> {
        let mut tensors = Self::default();
        tensors.add_safetensors(Storage::Static(bytes))?;
        Ok(tensors)
    }

    /// Those of a safetensors file in memory.
    pub(crate) fn safetensors_in_memory(bytes: Vec<u8>) -> Result<Self, EngineError> {
        let mut tensors = Self::default();
        tensors.add_safetensors(Storage::Owned(bytes))?;
        Ok(tensors)
    }

    /// Those of a folder's safetensors files.
    pub(crate) fn safetensors_in_dir(dir: &Path) -> Result<Self, EngineError> {
        let mut tensors = Self::default();
        for path in safetensors::shards(dir)? {
            tensors.add_safetensors(Storage::map(&path)?)?;
        }
        Ok(tensors)
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

    /// Those of a GGUF model in one file or in several, of which `path` is any. `read` makes of the metadata
    /// what the caller needs, see [`Self::index_gguf`].
    pub(crate) fn gguf_file<T>(
        path: &Path,
        read: impl for<'a> FnOnce(&'a Gguf<'_>, StoredBytes<'a>) -> Result<T, EngineError>,
    ) -> Result<(Self, T), EngineError> {
        let path = split::first(path);
        let storage = Storage::map(&path)?;
        let first = Gguf::parse(storage.bytes())?;
        let others = split::others(&path, &first)?;
        let mut maps = Vec::with_capacity(others.len());
        for path in &others {
            maps.push(Storage::map(path)?);
        }
        let mut parts = vec![first];
        for (index, map) in (1..).zip(&maps) {
            let part = Gguf::parse(map.bytes())?;
            split::check(&part, index, 1 + others.len() as u64)?;
            parts.push(part);
        }
        let files: Vec<&[u8]> = std::iter::once(&storage).chain(&maps).map(Storage::bytes).collect();
        let (entries, read) = Self::index_gguf(&mut parts, &files, read)?;
        let storages = std::iter::once(storage).chain(maps).map(Arc::new).collect();
        Ok((Self { storages, entries }, read))
    }

    /// Those of a whole GGUF model in memory, as [`Self::gguf_file`].
    pub(crate) fn gguf_in_memory<T>(
        bytes: Vec<u8>,
        read: impl for<'a> FnOnce(&'a Gguf<'_>, StoredBytes<'a>) -> Result<T, EngineError>,
    ) -> Result<(Self, T), EngineError> {
        let file = Gguf::parse(&bytes)?;
        // The other parts of a split model are files, and there are only these bytes.
        split::check(&file, 0, 1)?;
        let (entries, read) = Self::index_gguf(&mut [file], &[&bytes], read)?;
        Ok((Self { storages: vec![Arc::new(Storage::Owned(bytes))], entries }, read))
    }

    /// The index over the parts of a model, the first of which has the metadata; `files` are their bytes.
    /// `read` is given the metadata together with the places of the tensors of all parts.
    fn index_gguf<T>(
        parts: &mut [Gguf<'_>],
        files: &[&[u8]],
        read: impl for<'a> FnOnce(&'a Gguf<'_>, StoredBytes<'a>) -> Result<T, EngineError>,
    ) -> Result<(HashMap<String, Entry>, T), EngineError> {
        // The tensors' names tell the reader what the model has, whichever file they are in.
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
        let read = read(first, &stored)?;
        Ok((entries, read))
    }

    /// Bytes of all tensors.
    pub(crate) fn len_bytes(&self) -> usize {
        self.entries.values().map(Entry::len).sum()
    }

    /// All tensors, in no order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
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

    /// A part of a tensor, as plain numbers; none if there is no such tensor.
    pub(crate) fn part(&self, name: String, part: Part) -> Result<Option<RawTensor<'_>>, EngineError> {
        self.entries.get(&name).map(|entry| self.part_of(name, entry, part)).transpose()
    }

    fn part_of(&self, name: String, e: &Entry, part: Part) -> Result<RawTensor<'_>, EngineError> {
        let none = |name: &str| EngineError::tensor(name, format!("of shape {:?} has no part {part:?}", e.shape));
        match part {
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
}

//! A strict reader of GGUF (v2, v3) headers. Every count is checked against the bytes that are
//! there before anything is allocated for it, so a hostile header costs no more than its own size.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::{Encoding, Stored, mxfp4};
use crate::error::EngineError;

/// Deepest nesting of arrays in metadata.
const NESTING_MAX: usize = 4;
/// Most dimensions of a tensor.
const DIMS_MAX: usize = 4;
/// Longest tensor name, bytes (the format says 64).
const NAME_BYTES_MAX: usize = 256;
/// Largest alignment of the data.
const ALIGNMENT_MAX: u64 = 1 << 16;

/// A metadata value. Strings borrow from the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    /// Text that is not UTF-8.
    Bytes(&'a [u8]),
    /// An array of texts, as stored: a vocabulary is walked when it is needed, not kept as a list.
    Texts(Texts<'a>),
    /// An array of numbers of one GGUF type, as stored.
    Numbers {
        ty: u32,
        bytes: &'a [u8],
    },
    /// An array of arrays; nothing here needs one.
    Nested,
}

/// An array of texts as the file has it: a length and its bytes, again and again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Texts<'a> {
    count: usize,
    bytes: &'a [u8],
}

impl<'a> Texts<'a> {
    fn iter(self) -> impl Iterator<Item = &'a [u8]> {
        let mut r = Reader { bytes: self.bytes, at: 0 };
        // A reader has checked the lengths, so none ends the list early.
        (0..self.count).map_while(move |_| r.text().ok())
    }
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) encoding: Encoding,
    /// Outermost first (the file has them innermost first).
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<usize>,
}

/// A parsed header.
#[derive(Debug)]
pub(crate) struct Gguf<'a> {
    pub(crate) meta: HashMap<&'a str, Value<'a>>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

fn broken(problem: impl Into<String>) -> EngineError {
    EngineError::Format { format: "gguf", problem: problem.into() }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], EngineError> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        let end = end.ok_or_else(|| broken(format!("file ends at byte {} inside the header", self.bytes.len())))?;
        let out = &self.bytes[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], EngineError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, EngineError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, EngineError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `each` bytes of the rest of the file.
    fn count(&mut self, each: usize, what: &str) -> Result<usize, EngineError> {
        let n = self.u64()?;
        let room = (self.bytes.len() - self.at) / each;
        usize::try_from(n).ok().filter(|&n| n <= room).ok_or_else(|| {
            broken(format!("claims {n} {what} at byte {}, the rest of the file has room for {room}", self.at - 8))
        })
    }

    fn text(&mut self) -> Result<&'a [u8], EngineError> {
        let n = self.count(1, "bytes of text")?;
        self.take(n)
    }

    fn name(&mut self, what: &str) -> Result<&'a str, EngineError> {
        let at = self.at;
        let bytes = self.text()?;
        if bytes.len() > NAME_BYTES_MAX {
            return Err(broken(format!("{what} at byte {at} has {} bytes", bytes.len())));
        }
        std::str::from_utf8(bytes).map_err(|_| broken(format!("{what} at byte {at} is not UTF-8")))
    }

    fn value(&mut self, ty: u32, depth: usize) -> Result<Value<'a>, EngineError> {
        Ok(match ty {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => {
                let bytes = self.text()?;
                std::str::from_utf8(bytes).map_or(Value::Bytes(bytes), Value::Text)
            }
            9 => self.list(depth)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(broken(format!("unknown metadata type {other}"))),
        })
    }

    fn list(&mut self, depth: usize) -> Result<Value<'a>, EngineError> {
        if depth >= NESTING_MAX {
            return Err(broken("arrays are nested too deep"));
        }
        let ty = self.u32()?;
        match ty {
            8 => {
                let count = self.count(8, "texts")?;
                let from = self.at;
                for _ in 0..count {
                    self.text()?;
                }
                Ok(Value::Texts(Texts { count, bytes: &self.bytes[from..self.at] }))
            }
            9 => {
                let n = self.count(12, "arrays")?;
                for _ in 0..n {
                    self.list(depth + 1)?;
                }
                Ok(Value::Nested)
            }
            other => {
                let Some(each) = number_bytes(other) else {
                    return Err(broken(format!("unknown metadata type {other}")));
                };
                let n = self.count(each, "numbers")?;
                Ok(Value::Numbers { ty, bytes: self.take(n * each)? })
            }
        }
    }
}

/// Bytes of a metadata number.
fn number_bytes(ty: u32) -> Option<usize> {
    match ty {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Values and bytes per block of a GGML type.
fn encoding(ty: u32, name: &str) -> Result<(Encoding, usize, usize), EngineError> {
    let (stored, block, bytes) = match ty {
        0 => (Stored::F32, 1, 4),
        1 => (Stored::F16, 1, 2),
        2 => (Stored::Q4_0, 32, 18),
        3 => (Stored::Q4_1, 32, 20),
        6 => (Stored::Q5_0, 32, 22),
        7 => (Stored::Q5_1, 32, 24),
        8 => (Stored::Q8_0, 32, 34),
        10 => (Stored::Q2K, 256, 84),
        11 => (Stored::Q3K, 256, 110),
        12 => (Stored::Q4K, 256, 144),
        13 => (Stored::Q5K, 256, 176),
        14 => (Stored::Q6K, 256, 210),
        30 => (Stored::Bf16, 1, 2),
        39 => return Ok((Encoding::Mxfp4, mxfp4::BLOCK, mxfp4::BLOCK_BYTES)),
        _ => {
            let known = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K … Q6_K, MXFP4";
            return Err(EngineError::tensor(
                name,
                format!("has GGML type {ty}, which is not supported; supported: {known}"),
            ));
        }
    };
    Ok((Encoding::Plain(stored), block, bytes))
}

/// Refuses tensors that share bytes: a small file could ask for weights of any size with them.
fn check_apart(tensors: &BTreeMap<String, TensorInfo>) -> Result<(), EngineError> {
    let mut places: Vec<_> = tensors.iter().map(|(name, t)| (t.range.start, t.range.end, name)).collect();
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(pair) => Err(EngineError::tensor(pair[1].2, format!("lies on the bytes of tensor `{}`", pair[0].2))),
        None => Ok(()),
    }
}

impl<'a> Gguf<'a> {
    /// Parses and checks the header of a whole file.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, EngineError> {
        let mut r = Reader { bytes, at: 0 };
        if r.take(4)? != b"GGUF" {
            return Err(broken("does not begin with `GGUF`"));
        }
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            return Err(broken(format!("version {version} is not supported; supported: 2, 3")));
        }
        // A tensor entry has at least a name length, dimensions, type and offset.
        let tensor_count = r.count(24, "tensors")?;
        let meta_count = r.count(12, "metadata entries")?;
        let mut meta = HashMap::new();
        for _ in 0..meta_count {
            let key = r.name("metadata key")?;
            let ty = r.u32()?;
            let value = r.value(ty, 0)?;
            if meta.insert(key, value).is_some() {
                return Err(broken(format!("metadata key `{key}` appears twice")));
            }
        }
        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(Self::tensor(&mut r)?);
        }
        let alignment = match meta.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && (8..=ALIGNMENT_MAX).contains(n) => *n as usize,
            Some(v) => {
                return Err(broken(format!(
                    "general.alignment is {v:?}, not a power of two within 8..={ALIGNMENT_MAX}"
                )));
            }
        };
        let start = r.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, encoding, shape, offset, size) in infos {
            let range = usize::try_from(offset)
                .ok()
                .filter(|o| o.is_multiple_of(alignment))
                .and_then(|o| start.checked_add(o))
                .and_then(|from| Some(from..from.checked_add(size)?))
                .filter(|range| range.end <= bytes.len());
            let Some(range) = range else {
                let problem = format!("offset {offset} with {size} bytes does not fit a file of {} bytes", bytes.len());
                return Err(EngineError::tensor(name, problem));
            };
            if tensors.insert(name.to_owned(), TensorInfo { encoding, shape, range }).is_some() {
                return Err(EngineError::tensor(name, "is stored twice"));
            }
        }
        check_apart(&tensors)?;
        Ok(Self { meta, tensors })
    }

    #[allow(clippy::type_complexity)]
    fn tensor(r: &mut Reader<'a>) -> Result<(&'a str, Encoding, Vec<usize>, u64, usize), EngineError> {
        let name = r.name("tensor name")?;
        let dims = r.u32()? as usize;
        if dims == 0 || dims > DIMS_MAX {
            return Err(EngineError::tensor(name, format!("has {dims} dimensions; 1 to {DIMS_MAX} are allowed")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let d = usize::try_from(r.u64()?).unwrap_or(0);
            if d == 0 {
                return Err(EngineError::tensor(name, "has an empty or absurd dimension"));
            }
            shape.push(d);
        }
        let (encoding, block, block_bytes) = encoding(r.u32()?, name)?;
        let size = shape
            .iter()
            .try_fold(1usize, |a, &d| a.checked_mul(d))
            .filter(|_| shape[0].is_multiple_of(block))
            .and_then(|n| (n / block).checked_mul(block_bytes));
        let Some(size) = size else {
            return Err(EngineError::tensor(name, format!("shape {shape:?} does not fit blocks of {block} values")));
        };
        let offset = r.u64()?;
        shape.reverse();
        Ok((name, encoding, shape, offset, size))
    }

    pub(crate) fn text(&self, key: &str) -> Result<&'a str, EngineError> {
        match self.meta.get(key) {
            Some(Value::Text(t)) => Ok(t),
            Some(_) => Err(EngineError::spec(key, "is not text")),
            None => Err(EngineError::spec(key, "is missing")),
        }
    }

    pub(crate) fn unsigned(&self, key: &str) -> Option<u64> {
        match self.meta.get(key)? {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A number of any type.
    pub(crate) fn number(&self, key: &str) -> Option<f64> {
        match self.meta.get(key)? {
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            Value::Float(n) => Some(*n),
            _ => None,
        }
    }

    /// An array of texts, all UTF-8.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&'a str>, EngineError> {
        match self.meta.get(key) {
            Some(Value::Texts(list)) => {
                let mut texts = Vec::with_capacity(list.count);
                for text in list.iter() {
                    let text = std::str::from_utf8(text);
                    texts.push(text.map_err(|_| EngineError::spec(key, "holds text that is not UTF-8"))?);
                }
                Ok(texts)
            }
            Some(_) => Err(EngineError::spec(key, "is not an array of texts")),
            None => Err(EngineError::spec(key, "is missing")),
        }
    }

    /// An array of 32-bit integers; none if the key is missing.
    pub(crate) fn integers(&self, key: &str) -> Result<Vec<i32>, EngineError> {
        match self.meta.get(key) {
            Some(Value::Numbers { ty: 4 | 5, bytes }) => {
                Ok(bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            Some(_) => Err(EngineError::spec(key, "is not an array of 32-bit integers")),
            None => Ok(Vec::new()),
        }
    }

    /// An array of 32-bit floats; none if the key is missing.
    pub(crate) fn floats(&self, key: &str) -> Result<Vec<f32>, EngineError> {
        match self.meta.get(key) {
            Some(Value::Numbers { ty: 6, bytes }) => {
                Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            Some(_) => Err(EngineError::spec(key, "is not an array of 32-bit floats")),
            None => Ok(Vec::new()),
        }
    }

    /// The whole numbers of an array of any such type; none if the value is something else.
    pub(crate) fn wholes(&self, key: &str) -> Option<Vec<u64>> {
        let Some(Value::Numbers { ty, bytes }) = self.meta.get(key) else { return None };
        let each = number_bytes(*ty)?;
        let whole = |b: &[u8]| {
            let mut wide = [0; 8];
            wide[..each].copy_from_slice(b);
            let n = u64::from_le_bytes(wide);
            // Of signed types, none is negative.
            let positive = n >> (8 * each - 1) == 0 || !matches!(ty, 1 | 3 | 5 | 11);
            (positive && !matches!(ty, 6 | 12)).then_some(n)
        };
        bytes.chunks_exact(each).map(whole).collect()
    }

    /// A token id, if the key is there and fits.
    pub(crate) fn token(&self, key: &str) -> Option<u32> {
        self.unsigned(key).and_then(|n| u32::try_from(n).ok())
    }

    pub(crate) fn count(&self, key: &str, max: usize) -> Result<usize, EngineError> {
        if !self.meta.contains_key(key) {
            return Err(EngineError::spec(key, "is missing"));
        }
        // Converters write what may differ by layer as a list, also where it does not.
        let same = || self.wholes(key).and_then(|list| list.first().copied().filter(|n| list.iter().all(|m| m == n)));
        let n = self.unsigned(key).or_else(same).and_then(|n| usize::try_from(n).ok());
        n.filter(|n| (1..=max).contains(n))
            .ok_or_else(|| EngineError::spec(key, format!("is {:?}, not in 1..={max}", self.meta[key])))
    }

    pub(crate) fn positive(&self, key: &str) -> Result<f32, EngineError> {
        match self.meta.get(key) {
            Some(Value::Float(v)) if *v > 0.0 && (*v as f32).is_finite() => Ok(*v as f32),
            Some(v) => Err(EngineError::spec(key, format!("is {v:?}, not a positive number"))),
            None => Err(EngineError::spec(key, "is missing")),
        }
    }
}

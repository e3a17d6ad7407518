//! Memory of weights and KV: a few large anonymous maps with huge pages, so that streaming through
//! them does not miss the TLB (1.2–1.3 times alone). Pages that are not written stay
//! unmapped, so a chunk larger than its contents costs nothing.

use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Bytes of a chunk; a larger request gets a chunk of its own.
const CHUNK: usize = 64 << 20;
/// Alignment of every piece: one cache line, one AVX-512 load.
const ALIGN: usize = 64;

struct Chunk {
    /// Owns the memory; reached only through pieces.
    _map: MmapMut,
    base: *mut u8,
    len: usize,
}

// SAFETY: the memory is owned by the map and reached only through `Piece`s, which are disjoint.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(len: usize) -> std::io::Result<Self> {
        let room = len.checked_add(HUGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let mut map = MmapMut::map_anon(room)?;
        let skip = map.as_ptr().align_offset(HUGE);
        // Without huge pages everything works, only slower. A rest would take a whole one.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, skip, len / HUGE * HUGE);
        // SAFETY: skip < HUGE, and the map is `HUGE` longer than `len`.
        let base = unsafe { map.as_mut_ptr().add(skip) };
        Ok(Self { _map: map, base, len })
    }
}

/// Hands out zeroed, aligned pieces; the memory lives as long as its pieces.
#[derive(Default)]
pub(crate) struct Arena {
    /// Current chunk and its used bytes.
    current: Mutex<Option<(Arc<Chunk>, usize)>>,
}

/// Zeroed bytes of an arena, 64-byte aligned.
pub(crate) struct Piece {
    /// `None` if the piece is empty.
    chunk: Option<Arc<Chunk>>,
    from: usize,
    len: usize,
}

impl Arena {
    /// A new piece of `len` zeroed bytes.
    pub(crate) fn take(&self, len: usize) -> std::io::Result<Piece> {
        if len == 0 {
            return Ok(Piece { chunk: None, from: 0, len: 0 });
        }
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((chunk, used)) = &mut *current {
            let from = used.next_multiple_of(ALIGN);
            if len <= chunk.len.saturating_sub(from) {
                *used = from + len;
                return Ok(Piece { chunk: Some(Arc::clone(chunk)), from, len });
            }
        }
        let chunk = Arc::new(Chunk::new(len.max(CHUNK))?);
        // Keep whichever chunk has more room left.
        let room = chunk.len - len;
        if current.as_ref().is_none_or(|(c, used)| c.len - used < room) {
            *current = Some((Arc::clone(&chunk), len));
        }
        Ok(Piece { chunk: Some(chunk), from: 0, len })
    }
}

impl Piece {
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.chunk {
            None => &[],
            // SAFETY: the chunk owns `from + len` initialised bytes and outlives `self`; the range
            // belongs to this piece alone.
            Some(c) => unsafe { std::slice::from_raw_parts(c.base.add(self.from), self.len) },
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match &self.chunk {
            None => &mut [],
            // SAFETY: as in `bytes`; the exclusive borrow of the piece makes it unique.
            Some(c) => unsafe { std::slice::from_raw_parts_mut(c.base.add(self.from), self.len) },
        }
    }
}

/// Zeroed numbers with memory of their own.
pub(crate) struct Numbers(Piece);

impl Numbers {
    pub(crate) fn zeroed(n: usize) -> std::io::Result<Self> {
        let bytes = n.checked_mul(4).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let chunk = if bytes == 0 { None } else { Some(Arc::new(Chunk::new(bytes)?)) };
        Ok(Self(Piece { chunk, from: 0, len: bytes }))
    }
}

impl std::fmt::Debug for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} numbers", self.len())
    }
}

impl std::ops::Deref for Numbers {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let bytes = self.0.bytes();
        if bytes.is_empty() {
            return &[];
        }
        // SAFETY: any four bytes are an f32, and pieces are aligned to more than that.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / 4) }
    }
}

impl std::ops::DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut [f32] {
        let bytes = self.0.bytes_mut();
        if bytes.is_empty() {
            return &mut [];
        }
        // SAFETY: as above; the exclusive borrow goes on.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / 4) }
    }
}

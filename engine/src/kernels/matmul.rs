//! Matrix products: rows of activations times packed matrices, cut into panels for the threads.

use super::Level;
use super::layout::{Grain, PANEL};
use super::packed::Packed;
use super::pool::Pool;
use super::portable;
use super::quantize::Quantized;

/// Multiply-adds below which waking another thread costs more than it gives.
const CHUNK_WORK_MIN: usize = 48 * 1024;
/// Chunks per thread, so that a late thread does not stretch the step.
const CHUNKS_PER_THREAD: usize = 4;
/// Panels per chunk are a multiple of this, as single rows take several panels at once.
const CHUNK_PANELS: usize = 2;

/// Input rows of a product.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    /// `[rows, k]`.
    pub(crate) x: &'a [f32],
    /// The same rows quantised, from the given row on; needed if the matrix is.
    pub(crate) quantized: Option<(&'a Quantized, usize)>,
}

/// One product `out[rows, n] = x[rows, k] · wᵀ`.
pub(crate) struct Job<'a> {
    pub(crate) input: Input<'a>,
    pub(crate) weights: &'a Packed,
    pub(crate) out: &'a mut [f32],
}

/// A checked job with the output as a pointer, so that threads write disjoint columns of it.
pub(super) struct Task<'a> {
    pub(super) rows: usize,
    pub(super) x: &'a [f32],
    pub(super) quantized: Option<&'a Quantized>,
    /// Row of `quantized` that is row 0 of `x`.
    pub(super) first: usize,
    pub(super) w: &'a Packed,
    pub(super) out: *mut f32,
    chunks: usize,
    chunk_panels: usize,
}

// SAFETY: the pointer is written only inside `run_panels`, each panel range by exactly one thread,
// and panels write disjoint columns; everything else is shared read-only.
unsafe impl Sync for Task<'_> {}

/// Runs all jobs as one parallel region.
///
/// # Panics
/// If the sizes of a job do not fit together (a bug of the caller; the kernels rely on them).
pub(crate) fn matmul(level: Level, pool: &mut Pool, jobs: &mut [Job<'_>]) {
    let threads = pool.threads();
    let work: usize = jobs.iter().map(|j| j.input.x.len() * j.weights.n).sum();
    let chunk_work = (work / (threads * CHUNKS_PER_THREAD)).max(CHUNK_WORK_MIN);
    let mut tasks: Vec<Task<'_>> = jobs
        .iter_mut()
        .map(|j| {
            let w = j.weights;
            let rows = j.input.x.len() / w.k;
            assert_eq!(j.input.x.len(), rows * w.k, "input width differs from the matrix");
            assert_eq!(j.out.len(), rows * w.n, "output size differs from the matrix");
            let fits = j.input.quantized.is_some_and(|(q, first)| q.fits(w.kind.grain(), w.k, first + rows));
            assert!(fits || w.kind.grain() == Grain::None, "a quantised matrix needs its input quantised");
            let panel_work = (rows * w.k * PANEL).max(1);
            let chunk_panels = (chunk_work / panel_work).next_multiple_of(CHUNK_PANELS).max(CHUNK_PANELS);
            Task {
                rows,
                x: j.input.x,
                quantized: j.input.quantized.map(|q| q.0),
                first: j.input.quantized.map_or(0, |q| q.1),
                w,
                out: j.out.as_mut_ptr(),
                chunks: if rows == 0 { 0 } else { w.panels().div_ceil(chunk_panels) },
                chunk_panels,
            }
        })
        .collect();
    // The largest chunks first, so that none is left over at the end.
    tasks.sort_by_key(|t| std::cmp::Reverse(t.rows * t.w.k * t.chunk_panels));
    let chunks = tasks.iter().map(|t| t.chunks).sum();
    pool.run(chunks, &|mut i| {
        for t in &tasks {
            if i < t.chunks {
                let from = i * t.chunk_panels;
                run_panels(level, t, from, (from + t.chunk_panels).min(t.w.panels()));
                return;
            }
            i -= t.chunks;
        }
    });
}

fn run_panels(level: Level, task: &Task<'_>, from: usize, to: usize) {
    match level {
        // SAFETY: `matmul` has checked the sizes, and gives each panel range to one call.
        Level::Portable => unsafe { portable::run_panels(task, from, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above, and `Level::Avx2` exists only if the machine has the features.
        Level::Avx2 => unsafe { super::avx2::run_panels(task, from, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above, and `Level::Avx512` exists only if the machine has the features.
        Level::Avx512 => unsafe { super::avx512::run_panels(task, from, to) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Level::Neon => unsafe { super::neon::run_panels(task, from, to) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above, and `Level::NeonDot` exists only if the machine has the feature.
        Level::NeonDot => unsafe { super::neon::run_panels_dot(task, from, to) },
    }
}

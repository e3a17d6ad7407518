//! A few threads for one step at a time. During a step the workers spin, so that handing out a
//! matrix product costs well under a microsecond; between steps they sleep. The caller never waits
//! for a worker that has not started: it works through the chunks itself and only waits for those
//! that others are in the middle of.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Most threads of a pool.
pub(crate) const THREADS_MAX: usize = 64;
/// Polls of an idle worker between steps before it sleeps (some tens of microseconds).
const SPINS_IDLE: u32 = 4_000;
/// Polls of a worker inside a step before it gives its core away between polls.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// Bit of the gate: workers may enter.
const OPEN: u64 = 1 << 15;
/// Bits of the gate that count workers inside.
const INSIDE: u64 = OPEN - 1;
/// One unit of the gate's epoch.
const EPOCH: u64 = 1 << 16;

type Body<'a> = dyn Fn(usize) + Sync + 'a;

#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// `epoch << 16 | OPEN | workers inside`.
    gate: Line<AtomicU64>,
    /// Next chunk to take.
    next: Line<AtomicUsize>,
    /// The region's body and number of chunks; valid while the gate is open or someone is inside.
    region: UnsafeCell<(Option<*const Body<'static>>, usize)>,
    /// A step is under way: stay awake.
    awake: AtomicBool,
    stop: AtomicBool,
    /// A worker panicked (a bug); the caller says so instead of going on with half a result.
    broken: AtomicBool,
    sleepers: Mutex<usize>,
    bell: Condvar,
}

// SAFETY: `region` is written only by the caller while the gate is closed and no worker is inside,
// and read only by workers that have entered through the gate (acquire after the caller's release).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `region` is only used as described above.
unsafe impl Send for Shared {}

/// The threads of one model.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool that runs on `threads` threads including the caller's.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            region: UnsafeCell::new((None, 0)),
            awake: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            bell: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        for i in 1..threads.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new().name(format!("engine-{i}"));
            pool.workers.push(worker.spawn(move || work(&shared))?);
        }
        Ok(pool)
    }

    /// Threads including the caller's.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Wakes the workers; they stay awake until [`Pool::end_step`].
    pub(crate) fn begin_step(&mut self) {
        if self.workers.is_empty() {
            return;
        }
        self.shared.awake.store(true, Ordering::SeqCst);
        if *self.shared.sleepers.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            self.shared.bell.notify_all();
        }
    }

    /// Lets the workers sleep.
    pub(crate) fn end_step(&mut self) {
        self.shared.awake.store(false, Ordering::SeqCst);
    }

    /// Calls `body(i)` once for every `i < chunks`, on any thread, and returns when all are done.
    ///
    /// # Panics
    /// If a call panicked.
    pub(crate) fn run(&mut self, chunks: usize, body: &Body<'_>) {
        if self.workers.is_empty() || chunks <= 1 {
            (0..chunks).for_each(body);
            return;
        }
        let shared = &*self.shared;
        let epoch = (shared.gate.0.load(Ordering::Relaxed) / EPOCH).wrapping_add(1) * EPOCH;
        // SAFETY: the gate is closed and empty (the end of the last run waited for that), so no
        // worker reads `region`. The lifetime is erased only until `close` below, which returns
        // when no worker is inside any more, also if the body panics here.
        unsafe {
            let body = std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body);
            *shared.region.get() = (Some(body), chunks);
        }
        shared.next.0.store(0, Ordering::Relaxed);
        shared.gate.0.store(epoch | OPEN, Ordering::Release);
        let closing = Closing(shared);
        take_chunks(shared, chunks, body);
        drop(closing);
        assert!(!shared.broken.load(Ordering::Relaxed), "a worker thread panicked");
    }
}

impl Pool {
    /// Calls `body(i)` for every `i < n`, several at a time if `work` (some measure of operations per
    /// call) says that threads pay.
    pub(crate) fn for_each(&mut self, n: usize, work: usize, body: &Body<'_>) {
        let threads = self.threads();
        if threads == 1 || n.saturating_mul(work) < PARALLEL_WORK_MIN {
            (0..n).for_each(body);
            return;
        }
        let each = (n / (threads * PIECES_PER_THREAD)).max((PARALLEL_WORK_MIN / 4 / work.max(1)).max(1));
        self.run(n.div_ceil(each), &|chunk| (chunk * each..((chunk + 1) * each).min(n)).for_each(body));
    }

    /// [`Pool::for_each`] piece of `width` numbers of `out`.
    pub(crate) fn for_pieces(
        &mut self,
        out: &mut [f32],
        width: usize,
        work: usize,
        body: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let pieces = out.len().checked_div(width).unwrap_or(0);
        let base = Base::of(out);
        // SAFETY: `i` is less than `pieces` and comes once, `out` outlives the run.
        self.for_each(pieces, work, &|i| body(i, unsafe { base.piece(i, width) }));
    }

    /// Calls `body(i, part)` with the parts of `out` that end at `ends`, several at a time if `work` (some
    /// measure of all operations) says that threads pay.
    ///
    /// # Panics
    /// If the ends do not ascend to at most the length of `out`.
    pub(crate) fn for_parts(
        &mut self,
        out: &mut [f32],
        ends: &[usize],
        work: usize,
        body: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        assert!(ends.is_sorted() && ends.last().is_none_or(|&e| e <= out.len()), "parts outside the buffer");
        let base = Base::of(out);
        let part = |i: usize| {
            let from = if i == 0 { 0 } else { ends[i - 1] };
            // SAFETY: the parts lie inside `out` and are disjoint as the ends ascend; `i` comes once.
            body(i, unsafe { std::slice::from_raw_parts_mut(base.at(from), ends[i] - from) });
        };
        if work < PARALLEL_WORK_MIN {
            (0..ends.len()).for_each(part);
        } else {
            self.run(ends.len(), &part);
        }
    }

    /// [`Pool::for_each`] row of three buffers.
    ///
    /// # Panics
    /// If a buffer is shorter than `rows` pieces of its width.
    pub(crate) fn for_rows<A: Send, B: Send, C: Send>(
        &mut self,
        rows: usize,
        work: usize,
        (a, b, c): (Pieces<'_, A>, Pieces<'_, B>, Pieces<'_, C>),
        body: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
    ) {
        let fits = a.hold(rows) && b.hold(rows) && c.hold(rows);
        assert!(fits, "a buffer is shorter than its rows");
        let (bases, widths) = ((Base::of(a.0), Base::of(b.0), Base::of(c.0)), (a.1, b.1, c.1));
        self.for_each(rows, work, &|i| {
            // SAFETY: `i` is less than `rows` and comes once, the buffers are long enough and outlive the run.
            unsafe { body(i, bases.0.piece(i, widths.0), bases.1.piece(i, widths.1), bases.2.piece(i, widths.2)) };
        });
    }
}

/// A buffer cut into pieces of one width.
pub(crate) struct Pieces<'a, T>(pub(crate) &'a mut [T], pub(crate) usize);

impl<T> Pieces<'_, T> {
    fn hold(&self, rows: usize) -> bool {
        rows.checked_mul(self.1).is_some_and(|n| n <= self.0.len())
    }
}

/// Operations below which threads do not pay.
const PARALLEL_WORK_MIN: usize = 32 * 1024;
/// Chunks per thread of [`Pool::for_each`].
const PIECES_PER_THREAD: usize = 8;

struct Base<T>(*mut T);

// SAFETY: disjoint pieces only are handed out, each to one thread, which may then own what is in it.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    fn of(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr())
    }

    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }

    /// # Safety
    /// The piece lies inside the buffer, which outlives it, and no one else has it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn piece(&self, i: usize, width: usize) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(i * width), width) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _sleepers = self.shared.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.stop.store(true, Ordering::SeqCst);
            self.shared.bell.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Closes the gate and waits until no thread is inside.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.0.gate.0.load(Ordering::Acquire) & INSIDE != 0 {
            pause(&mut spins);
        }
    }
}

/// Leaves the gate, also if the body panics.
struct Inside<'a>(&'a Shared);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broken.store(true, Ordering::Relaxed);
        }
        self.0.gate.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn take_chunks(shared: &Shared, chunks: usize, body: &Body<'_>) {
    loop {
        let i = shared.next.0.fetch_add(1, Ordering::Relaxed);
        if i >= chunks {
            return;
        }
        body(i);
    }
}

fn pause(spins: &mut u32) {
    *spins = spins.saturating_add(1);
    if *spins > SPINS_BEFORE_YIELD {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

fn work(shared: &Shared) {
    let mut done = 0;
    let mut spins = 0u32;
    while !shared.stop.load(Ordering::Relaxed) {
        let gate = shared.gate.0.load(Ordering::Relaxed);
        if gate & OPEN != 0 && gate / EPOCH != done {
            if shared.gate.0.compare_exchange(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                let _inside = Inside(shared);
                done = gate / EPOCH;
                // SAFETY: entered through the open gate, so the caller keeps the region valid until
                // this worker has left again.
                let (body, chunks) = unsafe { *shared.region.get() };
                if let Some(body) = body {
                    // SAFETY: as above.
                    take_chunks(shared, chunks, unsafe { &*body });
                }
            }
            spins = 0;
        } else if shared.awake.load(Ordering::Relaxed) || spins < SPINS_IDLE {
            pause(&mut spins);
        } else {
            sleep(shared);
            spins = 0;
        }
    }
}

fn sleep(shared: &Shared) {
    let mut sleepers = shared.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
    *sleepers += 1;
    while !shared.awake.load(Ordering::SeqCst) && !shared.stop.load(Ordering::SeqCst) {
        sleepers = shared.bell.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
    }
    *sleepers -= 1;
}

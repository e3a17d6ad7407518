//! The engine thread over the embedded model: who fails alone, what state is kept, dropped and moved.

mod prefix;
mod restart;

use std::cell::{Cell, OnceCell};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use tandem_engine::runner::batch::BatchBounds;
use tandem_engine::runner::{Job, JobDone, OnDone, Runner, RunnerError, RunnerOptions};
use tandem_engine::{BlockStore, EngineError, KvPool, LoadOptions, Model, ModelFiles, ROWS_MAX, Rows, STALL_MIN};
use tandem_models::{EDGE, TRUNK_LAYERS};
use tandem_proto::ids::SessionId;
use tandem_proto::limits::KV_BLOCK_TOKENS;

/// Its first output waits until the test lets it.
const GATE: u8 = 200;
/// It gets no output.
const FAILS: u8 = 201;

/// Position and logits.
type Output = (usize, Vec<f32>);
type Answer<T> = Receiver<Result<T, RunnerError>>;

static MODEL: LazyLock<Arc<Model>> = LazyLock::new(load);

fn load() -> Arc<Model> {
    let files = ModelFiles::Embedded { config: EDGE.config, weights: EDGE.weights };
    Arc::new(Model::load(&files, &LoadOptions { threads: 2, ..LoadOptions::default() }).expect("loads"))
}

const BATCH: BatchBounds = BatchBounds { rows_max: 256, sequences_max: 8, prefill_chunk: 128, prefill_reserve: 32 };
const OPTIONS: RunnerOptions = RunnerOptions { kv_blocks: 64, prefix_blocks_max: 0, queue_max: 16, batch: BATCH };

fn text(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * 37 + 11) % 4000).collect()
}

fn key(name: u8) -> SessionId {
    SessionId([name; 16])
}

/// All outputs of `sequence[feed_from..]`.
fn job(name: u8, sequence: &[u32], feed_from: usize) -> Job {
    Job {
        key: key(name),
        sequence: sequence.to_vec(),
        feed_from,
        trunk_layers: TRUNK_LAYERS,
        hidden: None,
        outputs_from: feed_from + 1,
        prompt_len: 0,
        sampling: Arc::default(),
        top_logprobs: 0,
        is_prefill: false,
        keep_hidden_from: None,
        constraint: None,
        prefix: None,
    }
}

/// What the model says by itself: entry `i` is the output of position `i + 1`.
fn expected(tokens: &[u32]) -> Vec<Output> {
    let layers = 0..MODEL.spec().layers;
    let mut pool = KvPool::new(MODEL.kv_layout(), layers.clone(), 64).expect("pool");
    let mut seq = pool.sequence();
    let items = &mut [Rows { seq: &mut seq, rows: tokens.len() }];
    let hidden = MODEL.layers(layers, &mut pool, items, MODEL.embed(tokens).expect("embed")).expect("layers");
    let logits = MODEL.head(&hidden, &(0..tokens.len()).collect::<Vec<_>>()).expect("head");
    logits.data.chunks_exact(logits.vocab).enumerate().map(|(i, row)| (i + 1, row.to_vec())).collect()
}

struct Engine {
    runner: Runner<Output>,
    entered: Receiver<()>,
    go: Sender<()>,
}

impl Engine {
    fn start(options: RunnerOptions) -> Self {
        Self::start_on(MODEL.clone(), options)
    }

    fn start_on(model: Arc<Model>, options: RunnerOptions) -> Self {
        Self::start_with(model, options, None)
    }

    fn start_with(model: Arc<Model>, options: RunnerOptions, store: Option<BlockStore>) -> Self {
        let (enter, entered) = channel();
        let (go, may_go) = channel::<()>();
        let runner = Runner::start_with(
            model,
            options,
            store,
            Box::new(move |job, row| {
                if job.key == key(FAILS) {
                    return Err(EngineError::Shape("no output for this one".into()));
                }
                if job.key == key(GATE) && row.position == 1 {
                    // A test that has failed is gone.
                    let _ = enter.send(());
                    let _ = may_go.recv();
                }
                Ok((row.position, row.logits.to_vec()))
            }),
        );
        Self { runner: runner.expect("starts"), entered, go }
    }

    fn submit(&self, job: Job) -> Answer<JobDone<Output>> {
        let (done, answer) = answer();
        self.runner.submit(job, done).expect("queued");
        answer
    }

    fn run(&self, job: Job) -> Result<JobDone<Output>, RunnerError> {
        self.submit(job).recv().expect("answered")
    }

    /// Keeps the thread in a pass of `job`, whose name is [`GATE`], until `go` is told.
    fn hold(&self, job: Job) -> Answer<JobDone<Output>> {
        let answer = self.submit(job);
        self.entered.recv().expect("the pass has begun");
        answer
    }

    fn import(&self, name: u8, blocks: Vec<Vec<f32>>, tokens: usize) -> Result<usize, RunnerError> {
        let (done, answer) = answer();
        self.runner.import_trunk(key(name), TRUNK_LAYERS, blocks, tokens, done).expect("queued");
        answer.recv().expect("answered")
    }

    fn export(&self, name: u8, tokens: usize) -> Result<Vec<Vec<f32>>, RunnerError> {
        let (done, answer) = answer();
        self.runner.export_trunk(key(name), TRUNK_LAYERS, tokens, done).expect("queued");
        answer.recv().expect("answered")
    }

    fn forgot(&self, name: u8, tokens: usize) -> bool {
        matches!(self.run(job(name, &text(tokens + 1), tokens)), Err(RunnerError::Gap { have: 0, .. }))
    }
}

fn answer<T: Send + 'static>() -> (OnDone<T>, Answer<T>) {
    let (send, answer) = channel();
    (Box::new(move |result| drop(send.send(result))), answer)
}

#[test]
fn a_bad_job_fails_alone_in_its_pass() {
    let (engine, text) = (Engine::start(OPTIONS), text(20));
    let (vocab, context) = (MODEL.spec().vocab_size as u32, MODEL.spec().context_tokens);
    let gate = engine.hold(job(GATE, &text[..1], 0));
    let good = engine.submit(job(1, &text[..6], 0));
    let outside = engine.submit(job(2, &[1, vocab, 2], 0));
    let long = engine.submit(job(3, &vec![1; context + 1], 0));
    let fails = engine.submit(job(FAILS, &text[..4], 0));
    let last = engine.submit(job(4, &text[..9], 0));
    engine.go.send(()).expect("waits");
    gate.recv().expect("answered").expect("the gate");
    let refused = |answer: Answer<JobDone<Output>>| match answer.recv().expect("answered") {
        Err(RunnerError::BadJob(what)) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(outside), "a token is outside the vocabulary");
    assert_eq!(refused(long), "the sequence passes the model's context");
    let failed = fails.recv().expect("answered");
    assert!(matches!(&failed, Err(RunnerError::Engine(what)) if what.contains("no output")), "{failed:?}");
    assert_eq!(good.recv().expect("answered").expect("good").outputs, expected(&text[..6]));
    assert_eq!(last.recv().expect("answered").expect("good").outputs, expected(&text[..9]));
    let passes = engine.runner.load().passes.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(passes, 2, "one for the gate, one for all others");
    // The good ones have kept their state, the one without output has none.
    let more = engine.run(job(1, &text, 6)).expect("goes on");
    assert_eq!(more.outputs, expected(&text)[6..]);
    assert!(engine.forgot(FAILS, 4));
    // The whole context is none too many.
    let whole = Job { outputs_from: context, ..job(5, &vec![1; context], 0) };
    assert_eq!(engine.run(whole).expect("fits").outputs.len(), 1);
}

/// Whoever waits must be able to tell a thread that hangs from one that works or idles.
#[test]
fn a_thread_that_hangs_says_so_until_it_goes_on() {
    // A model of its own: another engine's steps would count as its own.
    let (engine, text) = (Engine::start_on(load(), OPTIONS), text(4));
    assert_eq!(engine.runner.stalled(), None, "nothing to do");
    let gate = engine.hold(job(GATE, &text[..1], 0));
    let begun = Instant::now();
    while engine.runner.stalled().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it hangs and does not say so");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(begun.elapsed() >= STALL_MIN, "a second without a step is no fault");
    engine.go.send(()).expect("waits");
    gate.recv().expect("answered").expect("the gate");
    engine.run(job(1, &text, 0)).expect("goes on");
    assert_eq!(engine.runner.stalled(), None);
}

/// More outputs than logits are held at a time.
#[test]
fn a_pass_may_want_every_output() {
    let (engine, text) = (Engine::start(OPTIONS), text(150));
    assert_eq!(engine.run(job(1, &text, 0)).expect("runs").outputs, expected(&text));
}

#[test]
fn the_trunk_catches_up_on_rows_that_came_with_hidden_states() {
    // Chunks of 8, so that catching up takes several passes.
    let engine = Engine::start(RunnerOptions { batch: BatchBounds { prefill_chunk: 8, ..BATCH }, ..OPTIONS });
    let (text, width) = (text(50), MODEL.spec().hidden_size);
    let expected = expected(&text);
    let whole = engine.run(Job { keep_hidden_from: Some(0), ..job(1, &text, 0) }).expect("runs");
    assert_eq!((whole.trunk_rows, whole.trunk_tokens), ((50, 0), 50));
    assert_eq!(whole.trunk_hidden.len(), 50 * width);
    assert_eq!(whole.outputs, expected);

    let first = engine.run(job(2, &text[..20], 0)).expect("runs");
    assert_eq!(first.outputs, expected[..20]);
    let hidden = Some(whole.trunk_hidden[20 * width..40 * width].to_vec());
    let given = engine.run(Job { hidden, ..job(2, &text[..40], 20) }).expect("runs");
    assert_eq!((given.trunk_rows, given.trunk_tokens), ((0, 20), 20));
    assert_eq!(given.outputs, expected[20..40]);
    let last = engine.run(job(2, &text, 40)).expect("runs");
    assert_eq!((last.trunk_rows, last.trunk_tokens), ((30, 0), 50));
    assert_eq!(last.outputs, expected[40..]);
    let short = engine.run(Job { hidden: Some(vec![0.0; width]), ..job(2, &text, 40) });
    assert!(matches!(short, Err(RunnerError::BadJob(_))), "{short:?}");
}

/// The number of layers that are shared is a matter of the peer: one engine serves several at once, and a sequence
/// that goes on with another peer, up to a trunk of all layers.
#[test]
fn trunks_of_several_depths_share_a_pass_and_follow_one_another_in_a_sequence() {
    let layers = MODEL.spec().layers;
    assert!(layers > 2, "{layers}");
    let (text, width) = (text(60), MODEL.spec().hidden_size);
    let expected = expected(&text);
    let engine = Engine::start(OPTIONS);
    let kept = |name: u8, trunk_layers: usize| {
        let keep = Job { keep_hidden_from: Some(0), trunk_layers, ..job(name, &text, 0) };
        engine.run(keep).expect("runs").trunk_hidden
    };
    let hidden: Vec<_> = (1..=layers).map(|depth| kept(100 + depth as u8, depth)).collect();
    let given = |depth: usize, from: usize, to: usize| Some(hidden[depth - 1][from * width..to * width].to_vec());

    // Held back until all are there, so that they run in one pass.
    let gate = engine.hold(job(GATE, &[7], 0));
    let beside: Vec<_> = (0..=layers)
        .map(|depth| {
            let hidden = if depth == 0 { None } else { given(depth, 0, 40) };
            engine.submit(Job { hidden, trunk_layers: depth, ..job(10 + depth as u8, &text[..40], 0) })
        })
        .collect();
    engine.go.send(()).expect("waits");
    gate.recv().expect("answered").expect("runs");
    for (depth, answer) in beside.into_iter().enumerate() {
        let done = answer.recv().expect("answered").expect("runs");
        assert!(done.outputs == expected[..40], "{depth} layers shared");
        assert_eq!(done.trunk_tokens, if depth == 0 { 40 } else { 0 });
    }
    // What they skipped is caught up on, in one pass as well.
    let gate = engine.hold(job(GATE, &[7], 0));
    let on: Vec<_> = (0..=layers).map(|depth| engine.submit(job(10 + depth as u8, &text, 40))).collect();
    engine.go.send(()).expect("waits");
    gate.recv().expect("answered").expect("runs");
    for (depth, answer) in on.into_iter().enumerate() {
        let done = answer.recv().expect("answered").expect("runs");
        assert!(done.outputs == expected[40..], "{depth} layers shared");
        assert_eq!(done.trunk_tokens, 60);
    }
    // One sequence, three peers.
    for (from, to, depth) in [(0, 20, 1), (20, 40, layers), (40, 60, layers - 1)] {
        let done = engine.run(Job { hidden: given(depth, from, to), trunk_layers: depth, ..job(1, &text[..to], from) });
        assert!(done.expect("runs").outputs == expected[from..to], "{depth} layers shared");
    }
    for (hidden, trunk_layers) in [(None, layers + 1), (given(1, 50, 60), 0), (given(1, 50, 60), layers + 1)] {
        let refused = engine.run(Job { hidden, trunk_layers, ..job(1, &text, 50) });
        assert!(matches!(refused, Err(RunnerError::BadJob(_))), "{trunk_layers}: {refused:?}");
    }
}

#[test]
fn a_sequence_is_forgotten_after_its_job() {
    let engine = Engine::start(RunnerOptions { batch: BatchBounds { prefill_chunk: 8, ..BATCH }, ..OPTIONS });
    let text = text(20);
    // Three passes, the first of which waits.
    let running = engine.hold(job(GATE, &text, 0));
    engine.runner.forget(key(GATE)).expect("runs");
    engine.go.send(()).expect("waits");
    assert_eq!(running.recv().expect("answered").expect("the job still ends").outputs, expected(&text));
    assert!(engine.forgot(GATE, 20));
    engine.run(job(1, &text, 0)).expect("runs");
    assert!(!engine.forgot(1, 20));
    engine.runner.forget(key(1)).expect("runs");
    assert!(engine.forgot(1, 20));
}

#[test]
fn a_full_queue_keeps_nobody_from_forgetting() {
    let engine = Engine::start(RunnerOptions { queue_max: 1, ..OPTIONS });
    let text = text(10);
    engine.run(job(1, &text, 0)).expect("runs");
    let running = engine.hold(job(GATE, &text[..1], 0));
    let waiting = engine.submit(job(2, &text, 0));
    let (done, _answer) = answer();
    assert!(matches!(engine.runner.submit(job(3, &text, 0), done), Err(RunnerError::Full(1))));
    engine.runner.forget(key(1)).expect("a full queue is no reason to keep it");
    engine.go.send(()).expect("waits");
    running.recv().expect("answered").expect("runs");
    waiting.recv().expect("answered").expect("runs");
    assert!(engine.forgot(1, 10));
}

#[test]
fn a_sequence_without_memory_fails_alone_and_keeps_no_blocks() {
    let engine = Engine::start(RunnerOptions { kv_blocks: 4, ..OPTIONS });
    let (text, width) = (text(3 * KV_BLOCK_TOKENS), MODEL.spec().hidden_size);
    // Three of four blocks.
    let hidden = Some(vec![0.1; text.len() * width]);
    engine.run(Job { hidden, outputs_from: text.len(), ..job(1, &text, 0) }).expect("fits");
    let none = engine.run(job(2, &text[..40], 0));
    assert!(matches!(none, Err(RunnerError::Memory(_))), "{none:?}");
    // The fourth one is free still, and rows that a peer's state is put in for need no other block.
    engine.run(job(3, &text[..KV_BLOCK_TOKENS], 0)).expect("fits");
    let block = vec![0.5; TRUNK_LAYERS * KV_BLOCK_TOKENS * MODEL.spec().kv_width()];
    assert_eq!(engine.import(1, vec![block; 3], text.len()).expect("fits"), text.len());
    for name in [1, 3] {
        engine.runner.forget(key(name)).expect("runs");
    }
    assert_eq!(engine.run(job(2, &text[..40], 0)).expect("fits now").outputs, expected(&text[..40]));
}

#[test]
fn trunk_state_moves_between_runners() {
    let (from, to) = (Engine::start(OPTIONS), Engine::start(OPTIONS));
    let text = text(50);
    let done = from.run(Job { keep_hidden_from: Some(0), ..job(1, &text[..40], 0) }).expect("runs");
    assert!(matches!(from.export(1, 41), Err(RunnerError::Gap { have: 40, wanted: 41 })));
    assert!(matches!(from.export(9, 1), Err(RunnerError::Gap { have: 0, wanted: 1 })));
    let blocks = from.export(1, 40).expect("there");
    let numbers = TRUNK_LAYERS * MODEL.spec().kv_width();
    assert_eq!(blocks.iter().map(Vec::len).collect::<Vec<_>>(), [32 * numbers, 8 * numbers]);

    to.run(Job { hidden: Some(done.trunk_hidden), ..job(1, &text[..40], 0) }).expect("runs");
    let part = to.import(1, blocks[..1].to_vec(), 40);
    assert!(matches!(part, Err(RunnerError::Engine(_))), "{part:?}");
    let (done, too_few) = answer();
    to.runner.import_trunk(key(1), TRUNK_LAYERS - 1, blocks.clone(), 40, done).expect("queued");
    assert_eq!(too_few.recv().expect("answered").expect("not used"), 0);
    assert!(matches!(to.import(2, blocks.clone(), 40), Err(RunnerError::Gap { have: 0, wanted: 40 })));
    // A peer that shares more layers than were skipped.
    let ((done, more), (give, taken)) = (answer(), answer());
    from.runner.export_trunk(key(1), TRUNK_LAYERS + 1, 40, done).expect("queued");
    let more = more.recv().expect("answered").expect("there");
    to.runner.import_trunk(key(1), TRUNK_LAYERS + 1, more, 40, give).expect("queued");
    assert_eq!(taken.recv().expect("answered").expect("fits"), 40);
    assert_eq!(to.import(1, blocks, 33).expect("has more"), 40);
    let more = to.run(job(1, &text, 40)).expect("goes on");
    assert_eq!(more.trunk_rows, (10, 0), "nothing to catch up on");
    assert_eq!(more.outputs, expected(&text)[40..]);
}

/// Decodes until told to stop; returns how many tokens that took.
fn decode_while(engine: &Engine, expected: &[Output], go_on: impl Fn() -> bool) -> usize {
    let text = text(expected.len());
    let mut decoded = 0;
    while go_on() {
        let at = 1 + decoded % (text.len() - 1);
        let done = engine.run(job(1, &text[..=at], at)).expect("decodes");
        assert_eq!(done.outputs, expected[at..=at], "the rows beside it change nothing");
        decoded += 1;
    }
    decoded
}

/// Counted in tokens per prompt, not in seconds: a stream that gets one token per full chunk has lost.
#[test]
fn a_long_prompt_leaves_the_streams_beside_it_their_turns_and_is_fed_in_full_chunks_alone() {
    let engine = Engine::start_on(load(), OPTIONS);
    let (long, stream) = (text(MODEL.spec().context_tokens), expected(&text(64)));
    let full_chunks = long.len().div_ceil(BATCH.prefill_chunk);
    let prompt = |name| {
        engine.runner.forget(key(name - 1)).expect("runs");
        Job { outputs_from: long.len(), ..job(name, &long, 0) }
    };
    let passes = || engine.runner.load().passes.load(std::sync::atomic::Ordering::Relaxed) as usize;
    let alone = engine.run(prompt(3)).expect("fits").outputs;
    assert_eq!(passes(), full_chunks);

    engine.run(job(1, &text(1), 0)).expect("begins");
    let left = Cell::new(50);
    decode_while(&engine, &stream, || left.replace(left.get() - 1) > 0);
    let answer = engine.submit(prompt(4));
    let got = OnceCell::new();
    let beside = decode_while(&engine, &stream, || match answer.try_recv() {
        Ok(done) => got.set(done).is_err(),
        Err(_) => true,
    });
    let outputs = got.into_inner().expect("answered").expect("fits").outputs;
    assert_eq!(outputs, alone, "cuts of the prompt change nothing");
    println!("{beside} tokens beside a prompt of {} tokens, {full_chunks} full chunks", long.len());
    assert!(beside > 3 * full_chunks, "{beside} tokens beside {full_chunks} chunks");

    // Nobody decodes any more.
    engine.runner.forget(key(1)).expect("runs");
    engine.runner.forget(key(4)).expect("runs");
    let before = passes();
    assert_eq!(engine.run(prompt(6)).expect("fits").outputs, alone);
    assert_eq!(passes() - before, full_chunks);
}

#[test]
fn options_that_cannot_work_are_refused() {
    let with = |batch| RunnerOptions { batch, ..OPTIONS };
    let table = [
        ("rows_max", with(BatchBounds { rows_max: ROWS_MAX + 1, ..BATCH })),
        ("rows_max", with(BatchBounds { rows_max: 0, ..BATCH })),
        ("sequences_max", with(BatchBounds { sequences_max: 0, ..BATCH })),
        ("prefill_chunk", with(BatchBounds { prefill_chunk: 0, ..BATCH })),
        ("queue_max", RunnerOptions { queue_max: 0, ..OPTIONS }),
    ];
    for (name, options) in table {
        let refused = Runner::<()>::start(MODEL.clone(), options, Box::new(|_, _| Ok(()))).expect_err(name);
        assert!(matches!(refused, RunnerError::Options { field, .. } if field == name), "{name}: {refused}");
    }
}

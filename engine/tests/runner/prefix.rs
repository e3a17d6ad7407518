//! Rows that one sequence has computed and another one uses: the same bits, nothing computed twice, nobody
//! else's.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use tandem_engine::runner::{RunnerLoad, prefix_key};
use tandem_proto::block::BlockChain;

use super::*;

pub(super) const WITH_PREFIX: RunnerOptions = RunnerOptions { prefix_blocks_max: 48, ..OPTIONS };

static ONE_THREAD: LazyLock<Arc<Model>> = LazyLock::new(|| {
    let files = ModelFiles::Embedded { config: EDGE.config, weights: EDGE.weights };
    Arc::new(Model::load(&files, &LoadOptions { threads: 1, ..LoadOptions::default() }).expect("loads"))
});

pub(super) fn tenant(name: u8) -> Option<BlockChain> {
    Some(prefix_key(&MODEL, [name; 32]))
}

/// A prompt, of which the last output is wanted.
pub(super) fn prompt(name: u8, tokens: &[u32]) -> Job {
    let len = tokens.len();
    Job { outputs_from: len, prompt_len: len, prefix: tenant(1), ..job(name, tokens, 0) }
}

/// A text that is `text` up to `from`, and another one from there on.
pub(super) fn other_from(text: &[u32], from: usize, name: u32) -> Vec<u32> {
    text.iter().enumerate().map(|(i, &t)| if i < from { t } else { (t + 1 + name) % 4000 }).collect()
}

impl Engine {
    pub(super) fn rows(&self) -> u64 {
        self.runner.load().rows.load(Relaxed)
    }

    pub(super) fn held(&self, key: Option<BlockChain>, tokens: &[u32]) -> usize {
        let (done, answer) = answer();
        self.runner.held(key.expect("a key"), tokens.to_vec(), done).expect("queued");
        answer.recv().expect("answered").expect("runs")
    }

    /// Runs a job, checks its outputs against the model's own, and returns the rows that were reused.
    pub(super) fn check(&self, job: Job) -> usize {
        let (tokens, outputs_from) = (job.sequence.clone(), job.outputs_from);
        let done = self.run(job).expect("runs");
        assert_eq!(done.outputs, expected(&tokens)[outputs_from - 1..]);
        done.reused
    }

    /// The gauges are set when the thread comes round.
    pub(super) fn gauge(&self, gauge: fn(&RunnerLoad) -> &AtomicUsize, expected: usize) {
        let begun = Instant::now();
        while gauge(self.runner.load()).load(Relaxed) != expected {
            assert!(begun.elapsed() < Duration::from_secs(20), "not {expected}: {:?}", self.runner.load());
            std::thread::yield_now();
        }
    }

    pub(super) fn forget(&self, name: u8) {
        self.runner.forget(key(name)).expect("runs");
    }
}

#[test]
fn a_conversation_computes_only_what_is_new() {
    let engine = Engine::start(WITH_PREFIX);
    let text = text(150);
    assert_eq!(engine.held(tenant(1), &text), 0);
    assert_eq!(engine.check(prompt(1, &text[..70])), 0);
    // The answer, token by token, with a draft that is thrown away.
    let step = |to: usize, from: usize| Job { prompt_len: 70, prefix: tenant(1), ..job(1, &text[..to], from) };
    engine.check(step(71, 70));
    let draft = other_from(&text[..90], 71, 3);
    engine.check(Job { prompt_len: 70, prefix: tenant(1), ..job(1, &draft, 71) });
    for to in 72..=80 {
        engine.check(step(to, to - 1));
    }
    assert_eq!(engine.held(tenant(1), &text), 70, "an answer is kept when it is over");
    engine.forget(1);
    // The second turn.
    let before = engine.rows();
    assert_eq!(engine.check(prompt(2, &text[..120])), 80);
    assert_eq!(engine.rows() - before, 40);
    engine.forget(2);
    // Regenerated: the last row says what comes next.
    let before = engine.rows();
    assert_eq!(engine.check(prompt(3, &text[..120])), 119);
    assert_eq!(engine.rows() - before, 1);
    // Another conversation under the same system prompt.
    assert_eq!(engine.check(prompt(4, &other_from(&text, 77, 9))), 77);
    let load = engine.runner.load();
    assert_eq!((load.prefix_hits.load(Relaxed), load.prefix_rows.load(Relaxed)), (3, 80 + 119 + 77));
}

#[test]
fn prompts_that_come_together_are_computed_once() {
    // (the prompts' length, from where on each is another one, rows computed)
    let table = [(75, 75, 75 + 3), (20, 20, 20 + 3), (100, 70, 70 + 4 * 30), (200, 9, 4 * 200)];
    for (len, from, rows) in table {
        let engine = Engine::start(WITH_PREFIX);
        let text = text(len);
        let gate = engine.hold(job(GATE, &[7], 0));
        let jobs: Vec<_> = (1..5).map(|n| prompt(n, &other_from(&text, from, 10 * u32::from(n)))).collect();
        // Nobody decodes beside the prompts, so they are fed in full chunks.
        engine.runner.forget(key(GATE)).expect("runs");
        let answers: Vec<_> = jobs.iter().map(|job| engine.submit(job.clone())).collect();
        engine.go.send(()).expect("waits");
        gate.recv().expect("answered").expect("the gate");
        for (job, answer) in jobs.iter().zip(answers) {
            let done = answer.recv().expect("answered").expect("runs");
            assert_eq!(done.outputs, expected(&job.sequence)[len - 1..], "{len} {from}");
        }
        assert_eq!(engine.rows(), rows + 1, "{len} {from}");
    }
}

/// The first of several fails, and is forgotten: the others do without it.
#[test]
fn who_waits_for_another_ones_rows_does_not_wait_for_ever() {
    let engine = Engine::start(WITH_PREFIX);
    let text = text(60);
    let gate = engine.hold(job(GATE, &[7], 0));
    let fails = engine.submit(Job { key: key(FAILS), ..prompt(FAILS, &text) });
    let waits = [1, 2].map(|n| engine.submit(prompt(n, &text)));
    engine.forget(FAILS);
    engine.forget(1);
    engine.go.send(()).expect("waits");
    gate.recv().expect("answered").expect("the gate");
    assert!(fails.recv().expect("answered").is_err());
    for answer in waits {
        assert_eq!(answer.recv().expect("answered").expect("runs").outputs, expected(&text)[59..]);
    }
}

#[test]
fn tenants_and_models_share_nothing() {
    let engine = Engine::start(WITH_PREFIX);
    let text = text(100);
    assert_eq!(engine.check(prompt(1, &text)), 0);
    engine.forget(1);
    assert_eq!(engine.held(tenant(1), &text), 100);
    assert_eq!(engine.held(tenant(2), &text), 0);
    assert_eq!(engine.check(Job { prefix: tenant(2), ..prompt(2, &text) }), 0);
    assert_eq!(engine.check(Job { prefix: None, ..prompt(3, &text) }), 0);
    let other = tandem_models::CLOUD.load(1).expect("the cloud model").model;
    assert_ne!(prefix_key(&other, [1; 32]).id(), prefix_key(&MODEL, [1; 32]).id());
    // And with no room for it nothing is kept.
    let off = Engine::start(OPTIONS);
    assert_eq!([1, 2].map(|n| off.check(prompt(n, &text))), [0, 0]);
    assert_eq!(off.held(tenant(1), &text), 0);
}

/// Hidden states and trunk state of a peer count for its own session only.
#[test]
fn a_peers_numbers_stay_in_its_session() {
    let engine = Engine::start(WITH_PREFIX);
    let (text, width) = (text(100), MODEL.spec().hidden_size);
    engine.check(prompt(1, &text[..40]));
    let false_rows = Some(vec![0.25; 50 * width]);
    let given = Job { hidden: false_rows, prompt_len: 40, prefix: tenant(1), ..job(1, &text[..90], 40) };
    engine.run(given).expect("runs");
    engine.run(Job { prompt_len: 40, prefix: tenant(1), ..job(1, &text, 90) }).expect("catches up");
    engine.forget(1);
    let block = vec![0.5; TRUNK_LAYERS * KV_BLOCK_TOKENS * MODEL.spec().kv_width()];
    // As a prompt that is fetched: the hidden states first, then the trunk's state.
    let other = other_from(&text, 0, 5);
    engine.run(Job { hidden: Some(vec![0.25; 64 * width]), ..prompt(2, &other[..64]) }).expect("runs");
    engine.import(2, vec![block.clone(); 2], 64).expect("fits");
    engine.run(Job { prompt_len: 64, prefix: tenant(1), ..job(2, &other, 64) }).expect("runs");
    engine.forget(2);
    assert_eq!(engine.held(tenant(1), &other), 0);
    assert_eq!(engine.held(tenant(1), &text), 40, "what was computed here");
    assert_eq!(engine.check(prompt(3, &text)), 40);
    // Of state that was computed here, an import takes only what is missing.
    let longer = [&text[..], &text[..28]].concat();
    engine.run(Job { hidden: Some(vec![0.25; 28 * width]), ..job(3, &longer, 100) }).expect("runs");
    assert_eq!(engine.import(3, vec![block; 4], 128).expect("fits"), 128);
    engine.forget(3);
    assert_eq!(engine.check(prompt(4, &text)), 99);
}

#[test]
fn whoever_wants_every_row_gets_it_computed() {
    let engine = Engine::start(WITH_PREFIX);
    let (text, width) = (text(80), MODEL.spec().hidden_size);
    engine.check(prompt(1, &text));
    assert_eq!(engine.check(Job { outputs_from: 1, ..prompt(2, &text) }), 0, "scores");
    assert_eq!(engine.check(Job { outputs_from: 50, ..prompt(3, &text) }), 49, "the outputs of a part");
    for (name, keep_from, reused) in [(4, 0, 0), (5, 33, 33), (6, 80, 79)] {
        let done = engine.run(Job { keep_hidden_from: Some(keep_from), ..prompt(name, &text) }).expect("runs");
        assert_eq!((done.reused, done.trunk_hidden.len()), (reused, (80 - keep_from) * width));
        assert_eq!(done.outputs, expected(&text)[79..]);
    }
}

#[test]
fn what_is_held_gives_way_to_work_and_keeps_its_bound() {
    let engine = Engine::start(RunnerOptions { kv_blocks: 12, prefix_blocks_max: 8, ..OPTIONS });
    let load = engine.runner.load();
    for n in 0..60 {
        let text: Vec<u32> = (0..70).map(|i| (i * 31 + n * 5) % 4000).collect();
        assert_eq!(engine.check(prompt(1, &text)), 0);
        engine.forget(1);
        assert_eq!(engine.held(tenant(1), &text), 70);
        engine.check(Job { prefix: None, ..prompt(2, &text[..1]) });
        assert!(load.prefix_blocks.load(Relaxed) <= 8);
    }
    engine.forget(2);
    assert!(engine.forgot(2, 1));
    engine.gauge(|load| &load.prefix_blocks, 8);
    assert_eq!(load.prefix_evicted.load(Relaxed), 60 * 3 - 8);
    // All of it can be had.
    engine.gauge(|load| &load.kv_blocks_free, 12);
    // The whole pool for one sequence: nothing is held any more.
    let long = text(12 * KV_BLOCK_TOKENS);
    engine.check(Job { prefix: None, ..prompt(3, &long) });
    engine.gauge(|load| &load.prefix_blocks, 0);
    // What could not be had in any case costs the others nothing.
    engine.forget(3);
    engine.check(prompt(4, &long[..64]));
    let too_long = engine.run(prompt(5, &other_from(&text(12 * KV_BLOCK_TOKENS), 0, 1)));
    assert!(matches!(too_long, Err(RunnerError::Memory(_))), "{too_long:?}");
    assert_eq!(engine.held(tenant(1), &long), 64);
}

#[test]
fn a_sequence_that_fills_the_pool_shares_no_block_with_the_index() {
    let engine = Engine::start(RunnerOptions { kv_blocks: 3, prefix_blocks_max: 3, ..OPTIONS });
    let text = text(3 * KV_BLOCK_TOKENS);
    // The last block is partly filled and held; there is no other one for its copy.
    engine.check(prompt(1, &text[..70]));
    assert_eq!(engine.held(tenant(1), &text), 70);
    for to in 71..=text.len() {
        engine.check(Job { prompt_len: 70, prefix: tenant(1), ..job(1, &text[..to], to - 1) });
    }
    engine.forget(1);
    assert_eq!(engine.held(tenant(1), &text), text.len());
}

#[test]
fn tokens_that_are_not_those_of_the_state_are_refused() {
    let engine = Engine::start(WITH_PREFIX);
    let text = text(50);
    engine.check(prompt(1, &text[..40]));
    let other = other_from(&text, 20, 1);
    let refused = engine.run(Job { prompt_len: 40, prefix: tenant(1), ..job(1, &other, 40) });
    assert!(matches!(refused, Err(RunnerError::BadJob(_))), "{refused:?}");
    engine.check(Job { prompt_len: 40, prefix: tenant(1), ..job(1, &text, 40) });
}

#[derive(Clone, Debug)]
enum Op {
    /// A new sequence of this tenant, under this name: pieces of three texts, whose prefixes are so shared.
    Begin {
        name: u8,
        tenant: u8,
        pieces: Vec<(u32, usize)>,
        every_output: bool,
    },
    /// The sequence goes back by some tokens and on by others.
    Continue {
        name: u8,
        back: usize,
        on: usize,
        text: u32,
        /// With the hidden states above this many layers.
        given: Option<usize>,
    },
    Forget {
        name: u8,
    },
    /// All jobs end before the next one begins.
    Settle,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let length = prop_oneof![1usize..8, 28usize..36, 60usize..70];
    let piece = (0u32..3, length);
    let begin = (1u8..6, 1u8..3, prop::collection::vec(piece, 1..3), prop::bool::weighted(0.1))
        .prop_map(|(name, tenant, pieces, every_output)| Op::Begin { name, tenant, pieces, every_output });
    let given = prop::option::weighted(0.3, 1usize..=3);
    let go_on = (1u8..6, 0usize..40, 1usize..10, 0u32..3, given)
        .prop_map(|(name, back, on, text, given)| Op::Continue { name, back, on, text, given });
    let op = prop_oneof![
        4 => begin, 4 => go_on, 3 => (1u8..6).prop_map(|name| Op::Forget { name }), 2 => Just(Op::Settle)
    ];
    prop::collection::vec(op, 1..24)
}

fn options() -> impl Strategy<Value = (RunnerOptions, bool)> {
    let batch = (8usize..64, 1usize..6, 3usize..64).prop_map(|(rows_max, sequences_max, prefill_chunk)| BatchBounds {
        rows_max,
        sequences_max,
        prefill_chunk,
        prefill_reserve: 3,
    });
    (batch, 14usize..40, 1usize..30, prop::bool::ANY).prop_map(|(batch, kv_blocks, prefix_blocks_max, one_thread)| {
        (RunnerOptions { kv_blocks, prefix_blocks_max, batch, ..OPTIONS }, one_thread)
    })
}

/// A sequence as its owner knows it.
struct Live {
    tokens: Vec<u32>,
    prompt_len: usize,
    tenant: u8,
}

fn piece(text: u32, n: usize) -> impl Iterator<Item = u32> {
    (0..n as u32).map(move |i| (i * 37 + text * 501) % 4000)
}

/// What a peer that shares `layers` layers would send for the tokens from `from` on.
fn above(tokens: &[u32], from: usize, layers: usize) -> Vec<f32> {
    let mut pool = KvPool::new(MODEL.kv_layout(), 0..layers, tokens.len().div_ceil(KV_BLOCK_TOKENS)).expect("pool");
    let mut seq = pool.sequence();
    let items = &mut [Rows { seq: &mut seq, rows: tokens.len() }];
    let hidden = MODEL.layers(0..layers, &mut pool, items, MODEL.embed(tokens).expect("embed")).expect("layers");
    hidden.data[from * hidden.width..].to_vec()
}

type Due = Vec<(u8, Vec<u32>, usize, Answer<JobDone<Output>>)>;

/// Takes the results of all jobs: the bits of a cold run, or no memory.
fn settle(due: &mut Due, live: &mut HashMap<u8, Live>, cold: &mut HashMap<Vec<u32>, Vec<Output>>) {
    for (name, tokens, outputs_from, answer) in due.drain(..) {
        match answer.recv().expect("answered") {
            Ok(done) => {
                let expected = cold.entry(tokens).or_insert_with_key(|tokens| expected(tokens));
                assert!(done.outputs == expected[outputs_from - 1..], "{name}: other bits");
                assert!(done.reused < outputs_from);
            }
            Err(RunnerError::Memory(_)) => drop(live.remove(&name)),
            Err(e) => panic!("{name}: {e}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Sequences that share prefixes, go back and on, with hidden states of a peer that shares some or all layers
    /// or without, are forgotten while others run, in a pool and an index too small for them, whatever the cuts and
    /// threads: the bits of a cold run.
    #[test]
    fn reuse_changes_no_bit((options, one_thread) in options(), ops in ops()) {
        let engine = Engine::start_on(if one_thread { ONE_THREAD.clone() } else { MODEL.clone() }, options);
        let (mut live, mut due, mut cold) = (HashMap::<u8, Live>::new(), Due::new(), HashMap::new());
        for op in ops {
            let busy = |due: &Due, name: u8| due.iter().any(|(busy, ..)| *busy == name);
            match op {
                Op::Begin { name, tenant: of, pieces, every_output } => {
                    if live.contains_key(&name) || busy(&due, name) {
                        continue;
                    }
                    let tokens: Vec<u32> = pieces.iter().flat_map(|&(text, n)| piece(text, n)).collect();
                    let len = tokens.len();
                    let outputs_from = if every_output { 1 } else { len };
                    let job = Job { outputs_from, prefix: tenant(of), ..prompt(name, &tokens) };
                    due.push((name, tokens.clone(), outputs_from, engine.submit(job)));
                    live.insert(name, Live { tokens, prompt_len: len, tenant: of });
                }
                Op::Continue { name, back, on, text, given } => {
                    if busy(&due, name) {
                        settle(&mut due, &mut live, &mut cold);
                    }
                    let Some(Live { tokens, prompt_len, tenant: of }) = live.get_mut(&name) else { continue };
                    let from = tokens.len().saturating_sub(back);
                    tokens.truncate(from);
                    tokens.extend(piece(text, on));
                    let job = Job { prompt_len: *prompt_len, prefix: tenant(*of), ..job(name, tokens, from) };
                    let job = match given {
                        Some(layers) => Job { hidden: Some(above(tokens, from, layers)), trunk_layers: layers, ..job },
                        None => job,
                    };
                    due.push((name, tokens.clone(), from + 1, engine.submit(job)));
                }
                Op::Forget { name } => {
                    // After its job, which may still run.
                    engine.forget(name);
                    live.remove(&name);
                    if busy(&due, name) {
                        settle(&mut due, &mut live, &mut cold);
                    }
                }
                Op::Settle => settle(&mut due, &mut live, &mut cold),
            }
        }
        settle(&mut due, &mut live, &mut cold);
        (1..6).for_each(|name| engine.forget(name));
        prop_assert!(engine.forgot(1, 1));
        let load = engine.runner.load();
        prop_assert!(load.prefix_blocks.load(Relaxed) <= options.prefix_blocks_max);
        // No block is lost.
        engine.gauge(|load| &load.kv_blocks_free, options.kv_blocks);
    }
}

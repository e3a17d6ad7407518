//! The embedded pair against the PyTorch reference: greedy ids, logits, layer splits, batches.

use std::path::Path;

use serde::Deserialize;
use tandem_engine::{
    BackendKind, EngineError, Hidden, KvPool, LoadOptions, Logits, Model, ModelFiles, Rows, Sequence, trunk_layers,
};
use tandem_models::{CLOUD, EDGE, EmbeddedModel};

const TRUNK: usize = 2;
const LOGIT_TOLERANCE: f32 = 1e-2;

#[derive(Deserialize)]
struct Reference {
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    model: String,
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    top16: Vec<(Vec<u32>, Vec<f32>)>,
}

fn reference() -> Vec<Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/reference/greedy.json");
    let text = std::fs::read(path).expect("the reference is in the repository");
    serde_json::from_slice::<Reference>(&text).expect("the reference is valid").rows
}

fn load_with(m: &EmbeddedModel, threads: usize, backend: BackendKind) -> Model {
    let files = ModelFiles::Embedded { config: m.config, weights: m.weights };
    Model::load(&files, &LoadOptions { threads, backend }).expect("the embedded model loads")
}

fn load(m: &EmbeddedModel) -> Model {
    load_with(m, 2, BackendKind::Cpu)
}

/// A model with one pool per layer range.
struct Split<'a> {
    model: &'a Model,
    pools: Vec<KvPool>,
}

impl<'a> Split<'a> {
    fn new(model: &'a Model, cuts: &[usize]) -> Self {
        let mut from = 0;
        let pools = cuts
            .iter()
            .chain([&model.spec().layers])
            .map(|&to| {
                let pool = KvPool::new(model.kv_layout(), from..to, 64).expect("pool");
                from = to;
                pool
            })
            .collect();
        Self { model, pools }
    }

    fn sequences(&self) -> Vec<Sequence> {
        self.pools.iter().map(KvPool::sequence).collect()
    }

    fn forward(&mut self, seqs: &mut [Sequence], tokens: &[u32]) -> Hidden {
        let mut h = self.model.embed(tokens).expect("embed");
        for (pool, seq) in self.pools.iter_mut().zip(seqs) {
            let range = pool.layers();
            h = self.model.layers(range, pool, &mut [Rows { seq, rows: tokens.len() }], h).expect("layers");
        }
        h
    }

    fn last_logits(&mut self, seqs: &mut [Sequence], tokens: &[u32]) -> Logits {
        let h = self.forward(seqs, tokens);
        self.model.head(&h, &[tokens.len() - 1]).expect("head")
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Greedy text and top logits of every row, decoding one token at a time; returns the largest |Δ|.
fn check_reference(name: &str, model: &Model, cuts: &[usize], rows_max: usize) -> f32 {
    let mut split = Split::new(model, cuts);
    let mut worst = 0.0f32;
    for row in reference().iter().filter(|r| r.model == name).take(rows_max) {
        let mut seqs = split.sequences();
        let mut logits = split.last_logits(&mut seqs, &row.prompt_ids);
        for (step, (&id, (top_ids, top))) in row.greedy_ids.iter().zip(&row.top16).enumerate() {
            let l = logits.row(0).expect("one row");
            assert_eq!(argmax(l), id, "{name}: {:?} step {step}", row.prompt);
            for (&t, &v) in top_ids.iter().zip(top) {
                worst = worst.max((l[t as usize] - v).abs());
            }
            if step + 1 < row.greedy_ids.len() {
                logits = split.last_logits(&mut seqs, &[id]);
            }
        }
    }
    println!("{name} cuts {cuts:?}: max |Δlogit| over the recorded top 16 = {worst:e}");
    worst
}

#[test]
fn greedy_ids_and_logits_equal_the_reference() {
    for (m, name) in [(&EDGE, "edge"), (&CLOUD, "cloud")] {
        let model = load(m);
        assert!(check_reference(name, &model, &[], usize::MAX) <= LOGIT_TOLERANCE);
        assert!(check_reference(name, &model, &[TRUNK], usize::MAX) <= LOGIT_TOLERANCE);
    }
}

#[test]
fn the_trunk_is_found_by_fingerprint() {
    let (edge, cloud) = (load(&EDGE), load(&CLOUD));
    assert_eq!(trunk_layers(edge.layer_digests(), cloud.layer_digests()), TRUNK);
    assert_ne!(edge.digest(), cloud.digest());
}

/// Every way to compute a prompt gives the same bits: one shot, chunks, token by token, split
/// layers, other thread counts, and in a batch with other sequences.
#[test]
fn bits_do_not_depend_on_how_a_prompt_is_computed() {
    for m in [&EDGE, &CLOUD] {
        let model = load(m);
        let rows = reference();
        let ids: Vec<u32> = rows.iter().take(8).flat_map(|r| r.prompt_ids.iter().copied()).take(97).collect();
        let mut whole = Split::new(&model, &[]);
        let mut seqs = whole.sequences();
        let one_shot = whole.forward(&mut seqs, &ids);
        for threads in [1, 3] {
            let other = load_with(m, threads, BackendKind::Cpu);
            let mut split = Split::new(&other, &[]);
            let mut seqs = split.sequences();
            assert_eq!(split.forward(&mut seqs, &ids), one_shot, "{threads} threads");
        }
        for (cuts, chunk) in [(&[][..], 1), (&[][..], 33), (&[TRUNK][..], 7), (&[1, 2][..], 64)] {
            let mut split = Split::new(&model, cuts);
            let mut seqs = split.sequences();
            let mut data = Vec::new();
            for part in ids.chunks(chunk) {
                data.extend(split.forward(&mut seqs, part).data);
            }
            assert_eq!(data, one_shot.data, "cuts {cuts:?} chunks of {chunk}");
        }
        // A ragged batch: the same rows between two strangers.
        let mut pool = KvPool::new(model.kv_layout(), 0..model.spec().layers, 64).expect("pool");
        let (mut a, mut b, mut c) = (pool.sequence(), pool.sequence(), pool.sequence());
        let strangers = [&ids[40..59], &ids[3..4]];
        for cut in [0, 20, 21] {
            a.truncate(0);
            c.truncate(0);
            let part = if cut == 0 {
                &ids[..20]
            } else if cut == 20 {
                &ids[20..21]
            } else {
                &ids[21..]
            };
            let tokens: Vec<u32> = [strangers[0], part, strangers[1]].concat();
            let mut items = [
                Rows { seq: &mut a, rows: strangers[0].len() },
                Rows { seq: &mut b, rows: part.len() },
                Rows { seq: &mut c, rows: strangers[1].len() },
            ];
            let h = model.embed(&tokens).expect("embed");
            let h = model.layers(0..model.spec().layers, &mut pool, &mut items, h).expect("layers");
            let mine = h.slice(19..19 + part.len()).expect("rows");
            assert_eq!(mine.data, one_shot.slice(cut..cut + part.len()).expect("rows").data, "batch at {cut}");
        }
    }
}

/// The trunk's KV and hidden states are the same numbers in both models: computed by the edge, taken
/// over by the cloud block by block, they give the bits the cloud computes by itself.
#[test]
fn trunk_state_of_the_edge_is_the_clouds_own() {
    let (edge, cloud) = (load(&EDGE), load(&CLOUD));
    let ids: Vec<u32> = reference().iter().take(6).flat_map(|r| r.prompt_ids.iter().copied()).take(75).collect();
    let mut own = Split::new(&cloud, &[TRUNK]);
    let mut own_seqs = own.sequences();
    let expected = own.forward(&mut own_seqs, &ids);

    let mut drafting = Split::new(&edge, &[TRUNK]);
    let mut edge_seqs = drafting.sequences();
    let h = edge.embed(&ids).expect("embed");
    let items = &mut [Rows { seq: &mut edge_seqs[0], rows: ids.len() }];
    let trunk = edge.layers(0..TRUNK, &mut drafting.pools[0], items, h).expect("trunk");

    let mut other = Split::new(&cloud, &[TRUNK]);
    let mut seqs = other.sequences();
    for block in 0..edge_seqs[0].blocks() {
        let data = drafting.pools[0].export_block(&edge_seqs[0], block).expect("export");
        let tokens = data.len() / (TRUNK * other.pools[0].width());
        other.pools[0].append_imported(&mut seqs[0], tokens, &data).expect("import");
    }
    for block in 0..seqs[0].blocks() {
        let (a, b) = (other.pools[0].export_block(&seqs[0], block), own.pools[0].export_block(&own_seqs[0], block));
        assert_eq!(a.expect("block"), b.expect("block"));
    }
    let layers = other.pools[1].layers();
    let items = &mut [Rows { seq: &mut seqs[1], rows: ids.len() }];
    let out = cloud.layers(layers, &mut other.pools[1], items, trunk).expect("upper layers");
    assert_eq!(out, expected);
    // And the cloud goes on decoding on the imported state.
    assert_eq!(other.last_logits(&mut seqs, &[7]), own.last_logits(&mut own_seqs, &[7]));
}

/// Rolling back and forking leave the state of what remains as it was.
#[test]
fn rollback_and_forks_do_not_change_the_bits() {
    let model = load(&EDGE);
    let mut split = Split::new(&model, &[TRUNK]);
    let (prompt, right, wrong) = ([0u32, 2, 62, 337, 273, 70], [266u32, 269, 343], [9u32; 40]);
    let mut straight = split.sequences();
    split.last_logits(&mut straight, &prompt);
    let mut fork: Vec<Sequence> = straight.iter().map(Sequence::fork).collect();
    let mut rolled: Vec<Sequence> = straight.iter().map(Sequence::fork).collect();
    let expected = split.last_logits(&mut straight, &right);
    split.last_logits(&mut rolled, &wrong);
    rolled.iter_mut().for_each(|s| s.truncate(prompt.len()));
    assert_eq!(split.last_logits(&mut rolled, &right), expected);
    assert_eq!(split.last_logits(&mut fork, &right), expected);
}

/// Whole models have these bits on every machine: what trunk sharing and moved state rest on.
#[test]
fn every_machine_computes_these_bits() {
    let digests = [&EDGE, &CLOUD].map(|m| {
        let model = load(m);
        let mut split = Split::new(&model, &[TRUNK]);
        let mut hash = blake3::Hasher::new();
        for row in reference().iter().take(3) {
            let mut sequences = split.sequences();
            let logits = split.last_logits(&mut sequences, &row.prompt_ids);
            logits.data.iter().for_each(|v| {
                hash.update(&v.to_bits().to_le_bytes());
            });
        }
        hash.finalize().to_hex()[..16].to_owned()
    });
    assert_eq!(digests, ["088aa2a4f3b46a46", "5628ba85b86c1a5f"], "{}", tandem_engine::numerics());
}

#[test]
fn candle_operators_agree() {
    for m in [&EDGE, &CLOUD] {
        let (own, candle) = (load(m), load_with(m, 1, BackendKind::Candle));
        assert_ne!(own.numerics(), candle.numerics());
        let (mut a, mut b) = (Split::new(&own, &[TRUNK]), Split::new(&candle, &[TRUNK]));
        let mut worst = 0.0f32;
        for row in reference().iter().take(2) {
            let (mut s, mut t) = (a.sequences(), b.sequences());
            for part in row.prompt_ids.chunks(9) {
                let (x, y) = (a.last_logits(&mut s, part), b.last_logits(&mut t, part));
                worst = x.data.iter().zip(&y.data).fold(worst, |w, (x, y)| w.max((x - y).abs()));
            }
        }
        println!("{}: max |Δlogit| against candle = {worst:e}", m.name);
        assert!(worst < 1e-3);
    }
}

#[test]
fn wrong_use_is_refused_and_changes_nothing() {
    let model = load(&EDGE);
    let spec = model.spec().clone();
    let mut pool = KvPool::new(model.kv_layout(), 0..spec.layers, 2).expect("pool");
    let mut seq = pool.sequence();
    assert!(matches!(model.embed(&[0, 4096]), Err(EngineError::BadToken { token: 4096, vocab: 4096 })));
    assert!(matches!(KvPool::new(model.kv_layout(), 1..9, 1), Err(EngineError::WrongRange { .. })));
    let rows = |n: usize| Hidden { rows: n, width: spec.hidden_size, data: vec![0.1; n * spec.hidden_size] };
    let mut run = |range: std::ops::Range<usize>, seq: &mut Sequence, n: usize, h: Hidden| {
        model.layers(range, &mut pool, &mut [Rows { seq, rows: n }], h)
    };
    assert!(matches!(run(0..2, &mut seq, 1, rows(1)), Err(EngineError::WrongRange { .. })));
    assert!(matches!(run(0..3, &mut seq, 2, rows(1)), Err(EngineError::Shape(_))));
    let mut short = rows(2);
    short.data.pop();
    assert!(matches!(run(0..3, &mut seq, 2, short), Err(EngineError::Shape(_))));
    let e = run(0..3, &mut seq, 65, rows(65));
    assert!(matches!(e, Err(EngineError::PoolExhausted { needed: 3, free: 2, total: 2 })), "{e:?}");
    let e = run(0..3, &mut seq, 1025, rows(1025));
    assert!(matches!(e, Err(EngineError::ContextOverflow { wanted: 1025, limit: 1024 })), "{e:?}");
    let mut foreign = KvPool::new(model.kv_layout(), 0..3, 1).expect("pool").sequence();
    assert!(matches!(run(0..3, &mut foreign, 1, rows(1)), Err(EngineError::ForeignSequence)));
    assert_eq!((seq.len(), seq.blocks()), (0, 0));
    let h = run(0..3, &mut seq, 3, rows(3)).expect("fits");
    assert_eq!(seq.len(), 3);
    assert!(matches!(model.head(&h, &[3]), Err(EngineError::Shape(_))));
    // The second item does not fit, so the first keeps no block either.
    let (mut a, mut b) = (pool.sequence(), pool.sequence());
    let items = &mut [Rows { seq: &mut a, rows: 5 }, Rows { seq: &mut b, rows: 5 }];
    let e = model.layers(0..3, &mut pool, items, rows(10));
    assert!(matches!(e, Err(EngineError::PoolExhausted { .. })), "{e:?}");
    assert_eq!((a.len(), a.blocks(), b.blocks(), pool.free_blocks()), (0, 0, 0, 1));
    let missing = ModelFiles::HfDir("/nonexistent".into());
    assert!(matches!(Model::load(&missing, &LoadOptions::default()), Err(EngineError::Io { .. })));
}

/// A folder in Hugging Face layout is the same model as the embedded bytes.
#[test]
fn a_folder_loads_as_the_embedded_model() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/edge");
    let model = Model::load(&ModelFiles::HfDir(dir.clone()), &LoadOptions::default()).expect("loads");
    assert_eq!(model.digest(), load(&EDGE).digest());
    let tokenizer = tandem_engine::tokenizer::Tokenizer::from_dir(&dir).expect("tokenizer");
    assert!(tokenizer.vocab_size() <= model.spec().vocab_size);
    tandem_engine::chat::ChatTemplate::from_dir(&dir).expect("template");
}

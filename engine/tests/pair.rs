//! The embedded pair against the PyTorch reference: greedy ids, logits, layer splits, batches.

use std::path::Path;

use serde::Deserialize;
use tandem_engine::{BackendKind, Hidden, KvPool, LoadOptions, Logits, Model, ModelFiles, Rows, Sequence, trunk_layers};
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

fn load_with(m: EmbeddedModel, threads: usize, backend: BackendKind) -> Model {
    let files = ModelFiles::Embedded { config: m.config, weights: m.weights };
    Model::load(&files, &LoadOptions { threads, backend }).expect("the embedded model loads")
}

fn load(m: EmbeddedModel) -> Model {
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
                let pool = KvPool::new(model, from..to, 64).expect("pool");
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
    for (m, name) in [(EDGE, "edge"), (CLOUD, "cloud")] {
        let model = load(m);
        assert!(check_reference(name, &model, &[], usize::MAX) <= LOGIT_TOLERANCE);
        assert!(check_reference(name, &model, &[TRUNK], usize::MAX) <= LOGIT_TOLERANCE);
    }
}

#[test]
fn the_trunk_is_found_by_fingerprint() {
    let (edge, cloud) = (load(EDGE), load(CLOUD));
    assert_eq!(trunk_layers(edge.layer_digests(), cloud.layer_digests()), TRUNK);
    assert_ne!(edge.digest(), cloud.digest());
}

/// Every way to compute a prompt gives the same bits: one shot, chunks, token by token, split
/// layers, other thread counts, and in a batch with other sequences.
#[test]
fn bits_do_not_depend_on_how_a_prompt_is_computed() {
    for m in [EDGE, CLOUD] {
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
        let mut pool = KvPool::new(&model, 0..model.spec().layers, 64).expect("pool");
        let (mut a, mut b, mut c) = (pool.sequence(), pool.sequence(), pool.sequence());
        let strangers = [&ids[40..59], &ids[3..4]];
        for cut in [0, 20, 21] {
            a.truncate(0);
            c.truncate(0);
            let part = if cut == 0 { &ids[..20] } else if cut == 20 { &ids[20..21] } else { &ids[21..] };
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

//! The seeded checkpoints of `goldens/families`, rebuilt from their plans: weights are computed, not stored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde::Deserialize;
use serde_json::Value;
use tandem_engine::ModelFiles;

/// `[name, type, shape, base, amplitude]`.
type Plan = (String, String, Vec<usize>, f32, f32);
/// `[name, sources, operation, number, offset]`.
type Recipe = (String, Vec<String>, String, usize, usize);

#[derive(Deserialize)]
struct Gguf {
    size: usize,
    checksum: u64,
    tensors: Vec<Recipe>,
    numbers: Vec<(String, Vec<f32>, usize)>,
    llama_cpp: LlamaCpp,
}

#[derive(Deserialize)]
struct LlamaCpp {
    max_delta: f32,
}

#[derive(Deserialize)]
pub(crate) struct Golden {
    #[serde(skip)]
    pub(crate) case: String,
    #[serde(skip)]
    pub(crate) logits: Vec<f32>,
    #[serde(skip)]
    pub(crate) llama_cpp_delta: Option<f32>,
    seed: u64,
    pub(crate) config: Value,
    tensors: Vec<Plan>,
    pub(crate) prompt: usize,
    pub(crate) ids: Vec<u32>,
    pub(crate) vocab: usize,
    pub(crate) margin: f32,
    /// What keeping FP8 weights as f16 changes in any logit of the reference.
    pub(crate) rounding: Option<f32>,
    /// Fields whose change must show.
    pub(crate) changes: BTreeMap<String, Value>,
    gguf: Option<Gguf>,
}

/// A model's files, kept until dropped.
pub(crate) struct Files {
    _folder: tempfile::TempDir,
    pub(crate) source: ModelFiles,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/families")
}

/// Every golden, by name.
pub(crate) fn all() -> Vec<Golden> {
    let mut cases: Vec<String> = std::fs::read_dir(folder())
        .expect("the goldens are in the repository")
        .filter_map(|e| Some(e.ok()?.file_name().to_str()?.strip_suffix(".json")?.to_owned()))
        .collect();
    cases.sort();
    assert!(cases.len() >= 10, "goldens are missing");
    let only = std::env::var("TANDEM_FAMILY").ok();
    cases.iter().filter(|c| only.as_ref().is_none_or(|o| c.contains(o.as_str()))).map(|c| Golden::read(c)).collect()
}

/// SplitMix64 over FNV-1a of `seed/name`: number `i` of a tensor.
struct Stream(u64);

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        let hash = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3);
        Self(format!("{seed}/{name}").bytes().fold(0xCBF2_9CE4_8422_2325, hash))
    }

    fn at(&self, i: usize) -> u64 {
        let mut z = self.0.wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

impl Golden {
    fn read(case: &str) -> Self {
        let read = |ending: &str| std::fs::read(folder().join(format!("{case}.{ending}"))).expect("golden");
        let mut golden: Self = serde_json::from_slice(&read("json")).expect("valid golden");
        golden.case = case.to_owned();
        golden.logits =
            read("f32").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
        golden.llama_cpp_delta = golden.gguf.as_ref().map(|g| g.llama_cpp.max_delta);
        golden
    }

    pub(crate) fn model_type(&self) -> &str {
        self.config["model_type"].as_str().expect("text")
    }

    /// The checkpoint in every format there is.
    pub(crate) fn files(&self) -> Vec<(&'static str, Files)> {
        let mut out = vec![("safetensors", Files::safetensors(self, &self.config))];
        if let Some(gguf) = &self.gguf {
            out.push(("GGUF", Files::gguf(self, gguf)));
        }
        out
    }

    /// The checkpoint as a GGUF, and where its tensors begin.
    pub(crate) fn gguf_files(&self) -> Option<(Files, Vec<(String, usize)>)> {
        let gguf = self.gguf.as_ref()?;
        let tensors = gguf.tensors.iter().map(|recipe| (recipe.0.clone(), recipe.4));
        Some((Files::gguf(self, gguf), tensors.collect()))
    }

    /// Bytes of a tensor as stored in safetensors.
    fn bytes(&self, (name, kind, shape, base, amplitude): &Plan) -> Vec<u8> {
        let stream = Stream::new(self.seed, name);
        let number = |i: usize| {
            let u = ((stream.at(i) >> 40) as i64 - (1 << 23)) as f32 / (1 << 23) as f32;
            base + u * amplitude
        };
        let all = 0..shape.iter().product::<usize>();
        match kind.as_str() {
            "F32" => all.flat_map(|i| number(i).to_le_bytes()).collect(),
            "F16" => all.flat_map(|i| f16::from_f32(number(i)).to_le_bytes()).collect(),
            "BF16" => all.flat_map(|i| bf16::from_f32(number(i)).to_le_bytes()).collect(),
            "F8_E4M3" => all
                .map(|i| {
                    let b = (stream.at(i) >> 56) as u8;
                    if b & 0x7F == 0x7F { b - 1 } else { b }
                })
                .collect(),
            other => panic!("type {other}"),
        }
    }

    /// Numbers of a tensor, as rounded by its type.
    fn numbers(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let plan = self.tensors.iter().find(|t| t.0 == name).unwrap_or_else(|| panic!("no tensor {name}"));
        let bytes = self.bytes(plan);
        let numbers = match plan.1.as_str() {
            "F32" => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4"))).collect(),
            "F16" => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        };
        (plan.2.clone(), numbers)
    }

    /// Data of a GGUF tensor: the sources one after the other, moved as the operation says.
    fn cooked(&self, (_, sources, operation, n, _): &Recipe) -> Vec<f32> {
        let (mut shape, mut x) = (Vec::new(), Vec::new());
        for source in sources {
            let (s, numbers) = self.numbers(source);
            (shape, x) = (s, [x, numbers].concat());
        }
        let width = *shape.last().expect("a shape");
        // Rows that the operation keeps, or a transposition within slabs.
        let rows = |keep: &dyn Fn(usize) -> bool| -> Vec<f32> {
            x.chunks_exact(width).enumerate().filter(|(i, _)| keep(*i)).flat_map(|(_, r)| r.to_vec()).collect()
        };
        let transposed = |x: &[f32], height: usize, width: usize| -> Vec<f32> {
            x.chunks_exact(height * width)
                .flat_map(|slab| (0..width).flat_map(move |c| (0..height).map(move |r| slab[r * width + c])))
                .collect()
        };
        let heads = self.config["num_attention_heads"].as_u64().expect("heads") as usize;
        let per_head = shape[0] / heads;
        match operation.as_str() {
            "copy" | "flatten" => x,
            "add_one" => x.iter().map(|v| v + 1.0).collect(),
            "permute" => {
                let head = shape[0] / n;
                (0..shape[0])
                    .flat_map(|row| {
                        let (h, i) = (row / head, row % head);
                        let from = h * head + i % 2 * (head / 2) + i / 2;
                        x[from * width..(from + 1) * width].to_vec()
                    })
                    .collect()
            }
            "key_up" => transposed(&rows(&|i| i % per_head < *n), *n, width),
            "value_up" => rows(&|i| i % per_head >= *n),
            "transpose" => transposed(&x, shape[1], width),
            "columns" => {
                let even: Vec<f32> = x.iter().skip(*n).step_by(2).copied().collect();
                transposed(&even, shape[1], width / 2)
            }
            "stride" => x.iter().skip(*n).step_by(2).copied().collect(),
            other => panic!("operation {other}"),
        }
    }
}

impl Files {
    /// A folder in Hugging Face layout, in two shards.
    pub(crate) fn safetensors(golden: &Golden, config: &Value) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        let mut index = serde_json::Map::new();
        let half = golden.tensors.len().div_ceil(2);
        for (i, part) in golden.tensors.chunks(half).enumerate() {
            let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
            let file = format!("model-{}-of-2.safetensors", i + 1);
            for plan in part {
                let bytes = golden.bytes(plan);
                let offsets = [data.len(), data.len() + bytes.len()];
                header.insert(
                    plan.0.clone(),
                    serde_json::json!({"dtype": plan.1, "shape": plan.2, "data_offsets": offsets}),
                );
                index.insert(plan.0.clone(), file.clone().into());
                data.extend(bytes);
            }
            let header = Value::Object(header).to_string();
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
            std::fs::write(folder.path().join(file), bytes).expect("written");
        }
        let index = serde_json::json!({ "weight_map": index });
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).expect("written");
        let source = ModelFiles::HfDir(folder.path().to_owned());
        Self { _folder: folder, source }
    }

    /// The GGUF that llama.cpp has read: its header from the repository, its data computed.
    fn gguf(golden: &Golden, gguf: &Gguf) -> Self {
        let head = std::fs::read(self::folder().join(format!("{}.gguf-head", golden.case))).expect("header");
        let start = head.len();
        let mut bytes = head;
        bytes.resize(gguf.size, 0);
        let mut put = |at: usize, numbers: &[f32]| {
            for (b, v) in bytes[at..].chunks_exact_mut(4).zip(numbers) {
                b.copy_from_slice(&v.to_le_bytes());
            }
        };
        for recipe in &gguf.tensors {
            put(recipe.4, &golden.cooked(recipe));
        }
        for (_, numbers, at) in &gguf.numbers {
            put(*at, numbers);
        }
        let words = bytes[start..].chunks(4).enumerate().map(|(i, b)| {
            let mut word = [0; 4];
            word[..b.len()].copy_from_slice(b);
            u64::from(u32::from_le_bytes(word)).wrapping_mul(2 * i as u64 + 1)
        });
        let sum = words.fold(0u64, u64::wrapping_add);
        assert_eq!(sum, gguf.checksum, "{}: not the bytes that llama.cpp has read", golden.case);
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).expect("written");
        Self { _folder: folder, source: ModelFiles::Gguf(path) }
    }
}

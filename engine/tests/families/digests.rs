//! The fingerprint of a model covers every number of its files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tandem_engine::{BackendKind, ModelFiles};
use tandem_models::{CLOUD, EDGE};

use crate::checkpoint::{self, Files};
use crate::load;

/// A tensor of a `model.safetensors`.
struct Stored {
    name: String,
    /// Where its first number begins in the file.
    at: usize,
    kind: String,
}

fn tensors(file: &[u8]) -> Vec<Stored> {
    let length = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + length]).expect("a header");
    let tensors = header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__");
    tensors
        .map(|(name, t)| Stored {
            name: name.clone(),
            at: 8 + length + t["data_offsets"][0].as_u64().expect("an offset") as usize,
            kind: t["dtype"].as_str().expect("a type").to_owned(),
        })
        .collect()
}

/// Changes the tensor's first number, by a bit that no rounding loses and that makes no NaN.
fn flip(bytes: &mut [u8], tensor: &Stored) {
    let (byte, bit) = match tensor.kind.as_str() {
        "F32" => (2, 0x40),
        "F16" => (1, 0x02),
        "BF16" => (0, 0x40),
        "F8_E4M3" => (0, 0x80),
        other => panic!("type {other}"),
    };
    bytes[tensor.at + byte] ^= bit;
}

/// Flips a byte per tensor, one after the other, and expects a digest of its own for each.
fn each_tensor_counts(what: &str, files: &[PathBuf], source: &ModelFiles) {
    let digest = || load(source, BackendKind::Cpu).digest();
    let mut seen = BTreeSet::from([digest().to_string()]);
    for path in files {
        let whole = std::fs::read(path).expect("read");
        for tensor in tensors(&whole) {
            let mut bytes = whole.clone();
            flip(&mut bytes, &tensor);
            std::fs::write(path, bytes).expect("written");
            assert!(seen.insert(digest().to_string()), "{what}: {} is not in the fingerprint", tensor.name);
        }
        std::fs::write(path, whole).expect("written");
    }
    assert!(seen.len() > 10, "{what}: {} tensors", seen.len());
    assert!(!seen.insert(digest().to_string()), "{what}: the files are as they were");
}

fn shards(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path());
    let mut shards: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    shards.sort();
    shards
}

#[test]
fn a_byte_of_any_tensor_changes_the_fingerprint() {
    for golden in checkpoint::all() {
        let files = Files::safetensors(&golden, &golden.config);
        let ModelFiles::HfDir(folder) = &files.source else { panic!("a folder") };
        each_tensor_counts(&golden.case, &shards(folder), &files.source);
    }
}

#[test]
fn a_byte_of_any_tensor_of_a_gguf_changes_the_fingerprint() {
    let mut files_seen = 0;
    for golden in checkpoint::all() {
        let Some((files, offsets)) = golden.gguf_files() else { continue };
        let ModelFiles::Gguf(path) = &files.source else { panic!("a file") };
        let (whole, digest) = (std::fs::read(path).expect("read"), || load(&files.source, BackendKind::Cpu).digest());
        let mut seen = BTreeSet::from([digest().to_string()]);
        for (name, at) in offsets {
            let mut bytes = whole.clone();
            flip(&mut bytes, &Stored { name: name.clone(), at, kind: "F32".into() });
            std::fs::write(path, bytes).expect("written");
            assert!(seen.insert(digest().to_string()), "{}: {name} is not in the fingerprint", golden.case);
        }
        files_seen += 1;
    }
    assert!(files_seen > 5, "{files_seen} files");
}

/// The embedded pair: a tensor of some parts. Whatever is in a layer counts for the digests of layers too.
#[test]
fn a_byte_of_the_embedded_pair_changes_the_fingerprint() {
    for model in [&EDGE, &CLOUD] {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("config.json"), model.config).expect("written");
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, model.weights).expect("written");
        let source = ModelFiles::HfDir(folder.path().to_owned());
        let as_is = load(&source, BackendKind::Cpu);
        println!("{}: {}, which `models/policy.json` names", model.name, as_is.digest());
        for part in ["model.layers.0.self_attn.", "model.layers.2.", "model.norm.", "lm_head."] {
            let mut bytes = model.weights.to_vec();
            let tensor = tensors(&bytes).into_iter().find(|t| t.name.starts_with(part)).expect("a tensor");
            flip(&mut bytes, &tensor);
            std::fs::write(&path, bytes).expect("written");
            let changed = load(&source, BackendKind::Cpu);
            assert_ne!(changed.digest(), as_is.digest(), "{}", tensor.name);
            let of_layers = part.starts_with("model.layers.");
            assert_eq!(changed.layer_digests() != as_is.layer_digests(), of_layers, "{}", tensor.name);
        }
    }
}

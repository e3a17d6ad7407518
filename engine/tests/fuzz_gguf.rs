//! Mutational fuzzing of the GGUF reader, bounded in time, on stable Rust: whatever the bytes, the answer is a
//! model, a tokenizer, a template, or a typed error. Starts from `corpus/gguf/` (`corpus/make_corpus.py`) and
//! the models of `goldens/`, one per architecture.

#[allow(dead_code)] // It serves the test of families too.
#[path = "families/checkpoint.rs"]
mod checkpoint;
mod mutate;

use std::path::Path;

use tandem_engine::{ModelFiles, check_gguf, check_gguf_text};

/// The files of a folder under `tests/`, sorted by name.
fn files(folder: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let mut paths: Vec<_> = std::fs::read_dir(dir).expect(folder).map(|e| e.expect(folder).path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a file")).collect()
}

/// A GGUF file of every architecture.
fn architectures() -> Vec<Vec<u8>> {
    let goldens = checkpoint::all();
    let files = goldens.iter().flat_map(|golden| golden.files());
    let models = files.filter_map(|(_, files)| match &files.source {
        ModelFiles::Gguf(path) => Some(std::fs::read(path).expect("a file")),
        _ => None,
    });
    models.collect()
}

#[test]
fn mutants_of_gguf_files_never_panic() {
    let mut pool = files("corpus/gguf");
    pool.extend(files("goldens").into_iter().filter(|file| file.starts_with(b"GGUF")));
    let models = architectures();
    for model in &models {
        check_gguf(model).expect("the seed of the fuzzer loads");
    }
    pool.extend(models);
    mutate::fuzz("fuzz_gguf", pool, |bytes| {
        let (model, text) = (check_gguf(bytes).is_ok(), check_gguf_text(bytes).is_ok());
        model || text
    });
}

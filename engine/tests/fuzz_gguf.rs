//! Mutational fuzzing of the GGUF reader, bounded in time, on stable Rust: whatever the bytes, the answer is a
//! model, a tokenizer, a template, or a typed error. Starts from `corpus/gguf/` (`corpus/make_corpus.py`) and
//! the tiny models of `goldens/`.

mod mutate;

use std::path::Path;

use tandem_engine::{check_gguf, check_gguf_text};

/// The files of a folder under `tests/`, sorted by name.
fn files(folder: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let mut paths: Vec<_> = std::fs::read_dir(dir).expect(folder).map(|e| e.expect(folder).path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a file")).collect()
}

#[test]
fn mutants_of_gguf_files_never_panic() {
    let mut pool = files("corpus/gguf");
    pool.extend(files("goldens").into_iter().filter(|file| file.starts_with(b"GGUF")));
    mutate::fuzz("fuzz_gguf", pool, |bytes| {
        let (model, text) = (check_gguf(bytes).is_ok(), check_gguf_text(bytes).is_ok());
        model || text
    });
}

//! The invariants of ARCHITECTURE.md that can be read off the source: which crate may depend on
//! which, where `unsafe` may stand, how long a file may be.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Longest source file, lines; tests aside.
const LINES_MAX: usize = 600;
/// Crates with source, and what of this workspace each may depend on.
const MAY_USE: [(&str, &[&str]); 7] = [
    ("proto", &[]),
    ("engine", &["proto", "models"]),
    ("transport", &["proto"]),
    ("router", &["proto", "transport", "router"]),
    ("models", &["engine", "proto"]),
    ("edge-node", &["engine", "transport", "router", "proto", "models"]),
    ("cloud-node", &["engine", "transport", "router", "proto", "models"]),
];
/// Where `unsafe` may be allowed: the kernels, and the weights' memory map.
const UNSAFE: [&str; 2] = ["engine/src/kernels/", "engine/src/load/mod.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file of the workspace's crates, by its path from the root.
fn sources() -> Result<Vec<(String, String)>> {
    let root = root();
    let crates = ["proto", "engine", "transport", "router", "models", "edge-node", "cloud-node", "lab", "cli", "tests"];
    let mut open: Vec<PathBuf> = crates.iter().map(|name| root.join(name)).collect();
    let mut files = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() && path.file_name() != Some("node_modules".as_ref()) {
                open.push(path);
            } else if path.extension() == Some("rs".as_ref()) {
                let text = std::fs::read_to_string(&path)?;
                files.push((path.strip_prefix(&root)?.to_string_lossy().into_owned(), text));
            }
        }
    }
    ensure!(files.len() > 50, "only {} files found", files.len());
    Ok(files)
}

fn manifest(name: &str) -> Result<String> {
    Ok(std::fs::read_to_string(root().join(name).join("Cargo.toml"))?)
}

#[test]
fn crates_depend_only_downwards() -> Result<()> {
    for (name, allowed) in MAY_USE {
        let manifest = manifest(name)?;
        for line in manifest.lines().filter(|line| line.starts_with("tandem-")) {
            let used = line.trim_start_matches("tandem-").split(['.', ' ', '=']).next().unwrap_or_default();
            ensure!(allowed.contains(&used), "{name} must not depend on {used}");
        }
    }
    Ok(())
}

#[test]
fn the_engine_knows_no_network_and_no_async() -> Result<()> {
    for name in ["proto", "engine"] {
        let manifest = manifest(name)?;
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for barred in ["tokio", "quinn", "axum", "futures", "reqwest"] {
            ensure!(!dependencies.lines().any(|line| line.starts_with(barred)), "{name} depends on {barred}");
        }
    }
    for (path, text) in sources()?.iter().filter(|(path, _)| path.starts_with("engine/src/")) {
        ensure!(!text.contains("async fn") && !text.contains("std::net"), "{path} does network or async");
    }
    Ok(())
}

#[test]
fn unsafe_stands_in_the_kernels_and_the_weights_map_only() -> Result<()> {
    for (path, text) in sources()? {
        let allowed = UNSAFE.iter().any(|place| path.starts_with(place));
        // Split, so that this file does not find itself.
        let opened =
            text.contains(concat!("allow(", "unsafe_code)")) || text.contains(concat!("expect(", "unsafe_code"));
        ensure!(allowed || !opened, "{path} opens the door to unsafe code");
    }
    let lints = std::fs::read_to_string(root().join("Cargo.toml"))?;
    ensure!(lints.contains("unsafe_code = \"deny\"") && lints.contains("undocumented_unsafe_blocks = \"deny\""));
    for (name, _) in MAY_USE {
        ensure!(manifest(name)?.contains("[lints]\nworkspace = true"), "{name} does not take the workspace's lints");
    }
    Ok(())
}

#[test]
fn files_stay_readable() -> Result<()> {
    for (path, text) in sources()? {
        let test = path.contains("/tests") || path.contains("/benches/") || path.starts_with("tests/");
        let lines = text.lines().count();
        ensure!(test || lines <= LINES_MAX, "{path} has {lines} lines, more than {LINES_MAX}; split it by job");
    }
    Ok(())
}

#[test]
fn one_decoder_one_block_hash_one_set_of_limits() -> Result<()> {
    let sources = sources()?;
    let homes = |needle: &str| -> Vec<&str> {
        sources.iter().filter(|(_, text)| text.contains(needle)).map(|(path, _)| path.as_str()).collect()
    };
    ensure!(homes(concat!("pub struct ", "DecoderSpec")) == ["engine/src/spec/mod.rs"]);
    ensure!(homes(concat!("pub struct ", "BlockChain")) == ["proto/src/block.rs"]);
    ensure!(homes(concat!("const ", "PAYLOAD_BYTES_MAX")) == ["proto/src/limits.rs"]);
    Ok(())
}

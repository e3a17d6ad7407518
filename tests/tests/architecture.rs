//! The invariants of ARCHITECTURE.md that can be read off the source: which crate may depend on
//! which, where `unsafe` may stand, how long a file may be.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Longest source file, lines; tests aside.
const LINES_MAX: usize = 600;
/// Every crate of the workspace, lowest first.
const CRATES: [&str; 11] =
    ["proto", "engine", "transport", "router", "upstream", "models", "edge-node", "cloud-node", "lab", "cli", "tests"];
/// What of this workspace each crate may be built from; the table of ARCHITECTURE.md.
const MAY_USE: [(&str, &[&str]); 10] = [
    ("proto", &[]),
    ("engine", &["proto"]),
    ("transport", &["proto"]),
    ("router", &["proto", "transport"]),
    ("upstream", &[]),
    ("models", &["engine", "proto"]),
    ("edge-node", &["engine", "transport", "router", "proto"]),
    ("cloud-node", &["engine", "transport", "router", "proto", "upstream"]),
    ("lab", &["proto", "engine", "transport", "router", "models", "edge-node", "cloud-node"]),
    ("cli", &["proto", "engine", "transport", "router", "upstream", "models", "edge-node", "cloud-node", "lab"]),
];
/// What the tests of any crate may use as well, beside the crate itself.
const TESTS_MAY_USE: [&str; 1] = ["models"];
/// What each module of the engine may use of the others, lowest first: from bytes to tensors to a decoder's
/// weights to passes of many sequences; the second table of ARCHITECTURE.md.
const ENGINE_MAY_USE: [(&str, &[&str]); 16] = [
    ("error", &[]),
    ("kernels", &[]),
    ("container", &["error", "kernels"]),
    ("checkpoint", &["error", "container"]),
    ("kv", &["error", "kernels"]),
    ("model", &["error", "kernels", "container", "checkpoint", "kv"]),
    ("chat", &["error", "container"]),
    ("tokenizer", &["error", "container", "checkpoint", "chat"]),
    ("constraint", &["error", "tokenizer"]),
    ("sampling", &["error", "kernels", "constraint"]),
    ("uncertainty", &["error", "kernels", "constraint", "sampling"]),
    ("runner", &["error", "kv", "model", "constraint", "sampling"]),
    ("memory", &["checkpoint", "kv"]),
    ("trunk", &["model"]),
    ("bench", &["error", "kv", "model", "sampling"]),
    ("perplexity", &["error", "kv", "model"]),
];
/// Where `unsafe` may be allowed: the kernels, and the weights' memory map.
const UNSAFE: [&str; 2] = ["engine/src/kernels/", "engine/src/container/storage.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file of the workspace's crates, by its path from the root.
fn sources() -> Result<Vec<(String, String)>> {
    let root = root();
    let mut open: Vec<PathBuf> = CRATES.iter().map(|name| root.join(name)).collect();
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
        let mut section = "";
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            }
            let Some(rest) = line.strip_prefix("tandem-").filter(|_| section.contains("dependencies")) else {
                continue;
            };
            let used = rest.split(['.', ' ', '=']).next().unwrap_or_default();
            let by_tests = section == "[dev-dependencies]" && (TESTS_MAY_USE.contains(&used) || used == name);
            ensure!(allowed.contains(&used) || by_tests, "{name} must not depend on {used} ({section})");
        }
    }
    Ok(())
}

/// The source without comments and without the tests in it.
fn production(path: &str, text: &str) -> String {
    if path.contains("/tests/") || path.ends_with("/tests.rs") {
        return String::new();
    }
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect()
}

/// The modules right below a crate's root that the source `path` (from the crate's `src/`) names, as
/// `crate::…` or by so many `super::` that they lead to the root; imports in braces are told apart.
fn named_modules(path: &str, text: &str) -> Vec<String> {
    let parts: Vec<&str> = path.trim_end_matches(".rs").split('/').filter(|part| *part != "mod").collect();
    let mut named = Vec::new();
    for to_root in ["crate::".to_owned(), "super::".repeat(parts.len())] {
        for (at, _) in text.match_indices(&to_root) {
            // Part of a longer word, or of a longer way up.
            if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            let rest = &text[at + to_root.len()..];
            let list = rest.strip_prefix('{').map_or_else(|| vec![rest], top_level_items);
            let name = |item: &str| -> String {
                item.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
            };
            named.extend(list.into_iter().map(name).filter(|name| !name.is_empty()));
        }
    }
    named
}

/// What stands between commas up to the brace that closes.
fn top_level_items(text: &str) -> Vec<&str> {
    let (mut items, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&text[from..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    items
}

/// What `module`'s source at `path` names of the crate above it.
fn upward<'a>(table: &[(&str, &[&str])], module: &str, path: &'a str, text: &'a str) -> Vec<String> {
    let allowed = table.iter().find(|(name, _)| *name == module).map_or(&[][..], |(_, allowed)| allowed);
    let text = production(path, text);
    named_modules(path, &text).into_iter().filter(|name| name != module && !allowed.contains(&name.as_str())).collect()
}

#[test]
fn engine_modules_depend_only_downwards() -> Result<()> {
    let names = ENGINE_MAY_USE.map(|(name, _)| name);
    for (at, (name, allowed)) in ENGINE_MAY_USE.iter().enumerate() {
        ensure!(allowed.iter().all(|used| names[..at].contains(used)), "{name} may use what is not listed before it");
    }
    let mut found = std::collections::BTreeSet::new();
    for (path, text) in sources()? {
        let Some(path) = path.strip_prefix("engine/src/").filter(|path| *path != "lib.rs") else { continue };
        let module = path.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        ensure!(names.contains(&module), "engine::{module} is not in the table of the engine's layers");
        found.insert(module.to_owned());
        let upward = upward(&ENGINE_MAY_USE, module, path, &text);
        ensure!(
            upward.is_empty(),
            "engine/src/{path}: {module} must not use {upward:?}; what lies below is named by its own module"
        );
    }
    ensure!(found.len() == names.len(), "modules that are gone are in the table: {names:?}, found {found:?}");
    Ok(())
}

/// What a node's tasks share is below them, and they cannot get at the handle that starts them.
#[test]
fn tasks_of_a_node_know_its_context_and_not_its_handle() -> Result<()> {
    // The crate, who may name the handle, and what the context must not name.
    let table: [(&str, &[&str], &[&str]); 2] = [
        (
            "edge-node/src/",
            &["node", "serve", "lib"],
            &["account", "api", "cloud_watch", "embed", "generate", "http", "node", "page", "serve"],
        ),
        ("cloud-node/src/", &["node", "lib"], &["node", "session"]),
    ];
    for (folder, starters, tasks) in table {
        let mut of_context = 0;
        for (path, text) in sources()? {
            let Some(path) = path.strip_prefix(folder) else { continue };
            let module = path.split('/').next().unwrap_or_default().trim_end_matches(".rs");
            let named = named_modules(path, &production(path, &text));
            let barred: &[&str] = match module {
                "context" => tasks,
                _ if starters.contains(&module) => &[],
                _ => &["node"],
            };
            let found: Vec<_> = named.iter().filter(|name| barred.contains(&name.as_str())).collect();
            ensure!(found.is_empty(), "{folder}{path} must not use {found:?}");
            of_context += usize::from(module == "context");
        }
        ensure!(of_context > 0, "no context in {folder}");
    }
    Ok(())
}

/// Every way to name a module from another one is seen.
#[test]
fn upward_paths_are_found_however_they_are_spelt() {
    let named = |path: &str, text: &str| {
        let module = path.split(['/', '.']).next().unwrap_or_default();
        upward(&ENGINE_MAY_USE, module, path, text).join(" ")
    };
    let table = [
        ("kv/mod.rs", "use crate::model::Model;", "model"),
        ("kv/mod.rs", "use super::model::Model;", "model"),
        ("kv/prefix/x.rs", "use super::super::super::model::Model;", "model"),
        ("kv/prefix/mod.rs", "use super::super::{error::EngineError, model::{Model, Rows}, runner};", "model runner"),
        ("kv/mod.rs", "fn f(m: &crate::model::Model) {}", "model"),
        ("kv/mod.rs", "pub(in crate::kv) fn f() {}", ""),
        ("kv/mod.rs", "use crate::{\n    error::EngineError,\n    Model,\n};", "Model"),
        ("error.rs", "Constraint(#[from] crate::constraint::ConstraintError),", "constraint"),
        ("error.rs", "use super::constraint;", "constraint"),
        ("checkpoint/mod.rs", "use crate::container::Tensors; crate::model::decoder::load();", "model"),
        // Within the module, downwards, in comments and in tests.
        ("kv/prefix/x.rs", "use super::super::block_file; use super::y; use crate::kv::KvPool;", ""),
        ("kv/mod.rs", "// crate::model\nuse crate::error::EngineError;", ""),
        ("kv/mod.rs", "#[cfg(test)]\nmod tests {\n    use crate::model::Model;\n}", ""),
        ("kv/prefix/tests.rs", "use crate::model::Model;", ""),
        ("kv/mod.rs", "use other_crate::model;", ""),
    ];
    for (path, text, upward) in table {
        assert_eq!(named(path, text), upward, "{path}: {text}");
    }
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

/// Another engine below the sessions, another node below the APIs: each is one implementation away.
#[test]
fn sessions_know_no_engine_and_apis_no_node() -> Result<()> {
    let table: [(&str, &str, &[&str]); 2] = [
        ("cloud-node/src/", "cloud-node/src/target/own.rs", &["engine::runner", "Runner"]),
        (
            "edge-node/src/api/",
            "edge-node/src/api/tests",
            &["tandem_transport", "crate::node", "crate::generate", "crate::uplinks"],
        ),
    ];
    let sources = sources()?;
    for (folder, exempt, barred) in table {
        let mut files = 0;
        for (path, text) in sources.iter().filter(|(path, _)| path.starts_with(folder) && !path.starts_with(exempt)) {
            files += 1;
            for name in barred {
                ensure!(!text.contains(name), "{path} names {name}");
            }
        }
        ensure!(files > 5, "only {files} files found in {folder}");
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
    for name in CRATES {
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
    ensure!(homes(concat!("pub struct ", "DecoderSpec")) == ["engine/src/checkpoint/spec/mod.rs"]);
    // Where rows go through a layer of any family.
    let through_a_layer = concat!("layer.", "forward(");
    ensure!(homes(through_a_layer) == ["engine/src/model/decoder.rs"], "{:?}", homes(through_a_layer));
    ensure!(homes(concat!("pub struct ", "BlockChain")) == ["proto/src/block.rs"]);
    let limits = "proto/src/limits.rs";
    for (path, text) in sources.iter().filter(|(path, _)| path.starts_with("proto/src/") && path != limits) {
        let bounds = text.lines().filter(|line| line.contains("const ") && line.contains("_MAX:"));
        ensure!(bounds.count() == 0, "{path} has a bound of its own; it belongs into {limits}");
    }
    for name in ["META_BYTES_MAX", "PAYLOAD_BYTES_MAX", "GRAMMAR_BYTES_MAX", "SESSION_TOKENS_MAX"] {
        ensure!(
            homes(&format!("const {name}:")) == [limits],
            "{name} is defined by {:?}",
            homes(&format!("const {name}:"))
        );
    }
    Ok(())
}

#[test]
fn metrics_have_their_names_and_labels_from_one_file() -> Result<()> {
    let is_test = |path: &str| path.contains("/tests") || path.contains("/benches/") || path.starts_with("tests/");
    let mut macros = 0;
    for (path, text) in sources()?.iter().filter(|(path, _)| !is_test(path)) {
        if path.ends_with("/metric_definitions.rs") {
            continue;
        }
        ensure!(!text.contains("\"tandem_"), "{path} spells a metric's name; take it from metric_definitions.rs");
        for call in ["counter!(", "gauge!(", "histogram!("] {
            for (at, _) in text.match_indices(call) {
                let end = text[at..].find(';').map_or(text.len(), |length| at + length);
                let call = &text[at..end];
                ensure!(!call.contains("\" =>"), "{path} spells a label; take it from metric_definitions.rs: {call}");
                macros += 1;
            }
        }
    }
    ensure!(macros > 20, "only {macros} uses of metrics found");
    Ok(())
}

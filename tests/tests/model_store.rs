//! `tandem model` against a hub on the loopback: a real HTTP server that speaks the hub's API, with ranges,
//! cut connections and wrong bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as Segments, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::StreamExt as _;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};
use tandem_tests::process::{Ended, finish, tandem};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Default)]
struct Repo {
    /// Content by name, and whether it is kept as a large file.
    files: BTreeMap<String, (Vec<u8>, bool)>,
    /// Bytes after which a connection is cut; 0 for never.
    cut_after: AtomicU64,
    /// Connections that are cut.
    cuts: AtomicUsize,
    /// `from` of every request for a file's bytes.
    asked: Mutex<Vec<(String, u64)>>,
    /// Send other bytes than promised.
    forged: std::sync::atomic::AtomicBool,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn listing(State(repo): State<Arc<Repo>>, Segments(revision): Segments<String>) -> Response {
    if revision != "main" && revision != "v1" {
        return StatusCode::NOT_FOUND.into_response();
    }
    let siblings: Vec<Value> = repo
        .files
        .iter()
        .map(|(name, (bytes, large))| {
            let git =
                digest(&SHA1_FOR_LEGACY_USE_ONLY, &[format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat());
            let mut file = json!({ "rfilename": name, "size": bytes.len(), "blobId": hex(git.as_ref()) });
            if *large {
                let sha256 = hex(digest(&SHA256, bytes).as_ref());
                file["lfs"] = json!({ "sha256": sha256, "size": bytes.len(), "pointerSize": 130 });
            }
            file
        })
        .collect();
    axum::Json(json!({ "sha": COMMIT, "siblings": siblings })).into_response()
}

async fn content(
    State(repo): State<Arc<Repo>>,
    Segments((commit, name)): Segments<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let Some((bytes, _)) = repo.files.get(&name).filter(|_| commit == COMMIT) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
    let from: usize =
        range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    if let Ok(mut asked) = repo.asked.lock() {
        asked.push((name.clone(), from as u64));
    }
    if from >= bytes.len() {
        return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    }
    let mut rest = bytes[from..].to_vec();
    if repo.forged.load(Ordering::Relaxed) {
        rest.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let length = rest.len();
    let cut = repo.cut_after.load(Ordering::Relaxed) as usize;
    let cuts = repo.cuts.load(Ordering::Relaxed);
    let body = if cut > 0 && cut < length && cuts > 0 {
        repo.cuts.fetch_sub(1, Ordering::Relaxed);
        rest.truncate(cut);
        let pieces = [Ok(rest), Err(std::io::Error::other("cut"))];
        Body::from_stream(futures::stream::iter(pieces).then(async |piece| {
            if piece.is_err() {
                // What was sent before is not to be lost with the connection.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            piece
        }))
    } else {
        Body::from(rest)
    };
    let status = if from > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut response = (status, [(header::CONTENT_LENGTH, length.to_string())], body).into_response();
    if from > 0
        && let Ok(range) = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()).parse()
    {
        response.headers_mut().insert(header::CONTENT_RANGE, range);
    }
    response
}

/// A hub with one repository, and a store to pull into.
struct World {
    repo: Arc<Repo>,
    endpoint: String,
    store: tempfile::TempDir,
}

impl World {
    async fn new(files: &[(&str, Vec<u8>, bool)]) -> Result<Self> {
        let files = files.iter().map(|(name, bytes, large)| ((*name).to_owned(), (bytes.clone(), *large))).collect();
        let repo = Arc::new(Repo { files, ..Repo::default() });
        let routes = Router::new()
            .route("/api/models/org/tiny/revision/{revision}", get(listing))
            .route("/org/tiny/resolve/{commit}/{*name}", get(content))
            .with_state(repo.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Ok(Self { repo, endpoint, store: tempfile::tempdir()? })
    }

    async fn run(&self, args: &[&str], vars: &[(&str, &str)]) -> Result<Ended> {
        let mut command = tandem(args)?;
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HUB_CACHE", self.store.path());
        command.env_remove("HF_HUB_OFFLINE").env_remove("HF_TOKEN");
        for (name, value) in vars {
            command.env(name, value);
        }
        finish(&mut command).await
    }

    fn asked(&self, name: &str) -> Vec<u64> {
        let asked = self.repo.asked.lock().map(|asked| asked.clone()).unwrap_or_default();
        asked.into_iter().filter(|(file, _)| file == name).map(|(_, from)| from).collect()
    }

    /// Files in `blobs`, as `name bytes`.
    fn blobs(&self) -> Vec<String> {
        let folder = self.store.path().join("models--org--tiny/blobs");
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut blobs: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        blobs.sort();
        blobs
    }
}

fn tiny() -> Result<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama-f16.gguf");
    std::fs::read(path).context("the tiny model")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_pulled_listed_shown_run_and_removed() -> Result<()> {
    let model = tiny()?;
    let files = [
        ("tiny-F16.gguf", model.clone(), true),
        ("tiny-Q4_0.gguf", b"GGUF other".to_vec(), true),
        ("README.md", b"hello".to_vec(), false),
    ];
    let world = World::new(&files).await?;
    let ambiguous = world.run(&["model", "pull", "org/tiny"], &[]).await?;
    ensure!(ambiguous.code == Some(2) && ambiguous.stderr.contains("org/tiny:tiny-F16.gguf"), "{ambiguous:?}");
    let offline = world.run(&["model", "pull", "org/tiny:F16"], &[("HF_HUB_OFFLINE", "1")]).await?;
    ensure!(offline.code == Some(3) && offline.stderr.contains("HF_HUB_OFFLINE"), "{offline:?}");
    let unknown = world.run(&["model", "pull", "org/tiny:F16", "--revision", "v9"], &[]).await?;
    ensure!(unknown.code == Some(7) && unknown.stderr.contains("check the name"), "{unknown:?}");
    ensure!(world.blobs().is_empty(), "{:?}", world.blobs());

    let pulled = world.run(&["model", "pull", "org/tiny:f16", "--json"], &[]).await?;
    ensure!(pulled.code == Some(0), "{pulled:?}");
    let value: Value = serde_json::from_str(&pulled.stdout)?;
    let snapshot = Path::new(value["path"].as_str().context("path")?);
    ensure!(value["commit"] == COMMIT && snapshot.ends_with(format!("snapshots/{COMMIT}")), "{value}");
    ensure!(std::fs::read(snapshot.join("tiny-F16.gguf"))? == model, "the bytes differ");
    ensure!(world.blobs() == [hex(digest(&SHA256, &model).as_ref())], "{:?}", world.blobs());
    let again = world.run(&["model", "pull", "org/tiny:f16"], &[]).await?;
    ensure!(again.code == Some(0) && world.asked("tiny-F16.gguf") == [0], "what is there is not fetched again");

    let listed = world.run(&["model", "ls", "--json"], &[]).await?;
    let listed: Value = serde_json::from_str(&listed.stdout)?;
    let stored = &listed["models"][2];
    ensure!(stored["model"] == "org/tiny" && stored["refs"] == json!(["main"]), "{listed}");
    ensure!(stored["files"] == json!([{ "name": "tiny-F16.gguf", "bytes": model.len() }]), "{listed}");
    let shown = world.run(&["model", "show", "org/tiny", "--json"], &[]).await?;
    let shown: Value = serde_json::from_str(&shown.stdout).with_context(|| format!("{shown:?}"))?;
    ensure!(shown["architecture"] == "Llama" && shown["context_tokens"] == 256, "{shown}");
    // Two layers with one pair of heads of 8 numbers, twice (keys, values), f32.
    ensure!(shown["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4, "{shown}");
    ensure!(shown["formats"]["F16"]["tensors"] == 16 && shown["memory"]["fits"] == true, "{shown}");
    let words = world.run(&["model", "show", "org/tiny"], &[]).await?;
    ensure!(words.stdout.contains("fits here") && words.stdout.contains("256 tokens"), "{words:?}");
    let bench = ["bench", "engine", "--model", "org/tiny:f16", "--prompt", "8", "--decode", "2", "--rounds", "1"];
    let ran = world.run(&bench, &[("HF_HUB_OFFLINE", "1")]).await?;
    ensure!(ran.code == Some(0), "a pulled model runs offline: {ran:?}");

    let asked = world.run(&["model", "rm", "org/tiny"], &[]).await?;
    ensure!(asked.code == Some(2) && asked.stderr.contains("--yes"), "{asked:?}");
    let removed = world.run(&["model", "rm", "org/tiny", "--yes"], &[]).await?;
    ensure!(removed.code == Some(0) && world.blobs().is_empty(), "{removed:?} {:?}", world.blobs());
    let gone = world.run(&["model", "show", "org/tiny"], &[]).await?;
    ensure!(gone.code == Some(2) && gone.stderr.contains("tandem model pull org/tiny"), "{gone:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_off_goes_on_where_it_stopped() -> Result<()> {
    let model = tiny()?;
    let world = World::new(&[("m.gguf", model.clone(), true)]).await?;
    // Two cuts within one run: it resumes by itself.
    world.repo.cut_after.store(30_000, Ordering::Relaxed);
    world.repo.cuts.store(2, Ordering::Relaxed);
    let pulled = world.run(&["model", "pull", "org/tiny"], &[]).await?;
    ensure!(pulled.code == Some(0), "{pulled:?}");
    let asked = world.asked("m.gguf");
    ensure!(asked.len() == 3 && asked[0] == 0 && asked[1] > 0 && asked[2] > asked[1], "{asked:?}");
    let removed = world.run(&["model", "rm", "org/tiny", "--yes"], &[]).await?;
    ensure!(removed.code == Some(0), "{removed:?}");

    // What an earlier run has left is taken up, and is part of what is checked.
    let blobs = world.store.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs)?;
    let partial = blobs.join(format!("{}.incomplete", hex(digest(&SHA256, &model).as_ref())));
    std::fs::write(&partial, &model[..50_000])?;
    if let Ok(mut asked) = world.repo.asked.lock() {
        asked.clear();
    }
    let pulled = world.run(&["model", "pull", "org/tiny"], &[]).await?;
    ensure!(pulled.code == Some(0) && world.asked("m.gguf") == [50_000], "{pulled:?} {:?}", world.asked("m.gguf"));
    ensure!(!partial.exists() && world.blobs().len() == 1, "{:?}", world.blobs());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_never_become_a_model() -> Result<()> {
    let model = tiny()?;
    let files = [("config.json", b"{}".to_vec(), false), ("model.safetensors", model.clone(), true)];
    let world = World::new(&files).await?;
    world.repo.forged.store(true, Ordering::Relaxed);
    let refused = world.run(&["model", "pull", "org/tiny"], &[]).await?;
    ensure!(refused.code == Some(1) && refused.stderr.contains("wrong checksum"), "{refused:?}");
    ensure!(world.blobs().is_empty(), "{:?}", world.blobs());
    let missing = world.run(&["model", "show", "org/tiny"], &[]).await?;
    ensure!(missing.code == Some(2), "an unfinished snapshot is no model: {missing:?}");

    // The same for a small file, which git's hash protects, and for a leftover of something else.
    world.repo.forged.store(false, Ordering::Relaxed);
    let blobs = world.store.path().join("models--org--tiny/blobs");
    let leftover = blobs.join(format!("{}.incomplete", hex(digest(&SHA256, &model).as_ref())));
    std::fs::write(&leftover, b"nonsense")?;
    let refused = world.run(&["model", "pull", "org/tiny"], &[]).await?;
    ensure!(refused.code == Some(1) && refused.stderr.contains("wrong checksum"), "{refused:?}");
    let pulled = world.run(&["model", "pull", "org/tiny@v1"], &[]).await?;
    ensure!(pulled.code == Some(0), "{pulled:?}");
    ensure!(world.blobs().len() == 2, "{:?}", world.blobs());

    // Nor do names that lead out of the store become files.
    for name in ["../../../escaped.gguf", "/escaped.gguf", "a/../../../../escaped.gguf", "a//b.gguf"] {
        let world = World::new(&[(name, model.clone(), true), ("fine.gguf", model.clone(), true)]).await?;
        let refused = world.run(&["model", "pull", "org/tiny:fine.gguf"], &[]).await?;
        ensure!(refused.code == Some(1) && refused.stderr.contains(name), "{refused:?}");
        ensure!(refused.stderr.contains("nothing was fetched"), "{refused:?}");
        ensure!(std::fs::read_dir(world.store.path())?.next().is_none(), "{name}: the store was written to");
    }
    Ok(())
}

/// `org/name@main` is one revision, `org/name` all of them.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn a_revision_is_removed_and_the_others_stay() -> Result<()> {
    const OTHER: &str = "89abcdef0123456789abcdef0123456789abcdef";
    let world = World::new(&[]).await?;
    let repo = world.store.path().join("models--org--tiny");
    for folder in ["blobs", "refs"] {
        std::fs::create_dir_all(repo.join(folder))?;
    }
    for (commit, reference, own) in [(COMMIT, "main", "of-main"), (OTHER, "v1", "of-v1")] {
        let snapshot = repo.join("snapshots").join(commit);
        std::fs::create_dir_all(&snapshot)?;
        std::fs::write(repo.join("refs").join(reference), commit)?;
        for blob in [own, "of-both"] {
            std::fs::write(repo.join("blobs").join(blob), blob)?;
            let target = Path::new("../../blobs").join(blob);
            std::os::unix::fs::symlink(target, snapshot.join(format!("{blob}.gguf")))?;
        }
    }
    let removed = world.run(&["model", "rm", "org/tiny@main", "--yes"], &[]).await?;
    ensure!(removed.code == Some(0) && removed.stdout.contains("org/tiny@main"), "{removed:?}");
    ensure!(world.blobs() == ["of-both", "of-v1"], "{:?}", world.blobs());
    ensure!(!repo.join("snapshots").join(COMMIT).exists() && !repo.join("refs/main").exists());
    ensure!(std::fs::read(repo.join("snapshots").join(OTHER).join("of-both.gguf"))? == b"of-both");
    ensure!(std::fs::read_to_string(repo.join("refs/v1"))? == OTHER);
    let gone = world.run(&["model", "rm", "org/tiny@main", "--yes"], &[]).await?;
    ensure!(gone.code == Some(2) && gone.stderr.contains("org/tiny@main is not in the store"), "{gone:?}");
    let removed = world.run(&["model", "rm", "org/tiny", "--yes"], &[]).await?;
    ensure!(removed.code == Some(0) && !repo.exists(), "{removed:?}");
    Ok(())
}

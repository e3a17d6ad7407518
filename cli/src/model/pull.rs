//! `tandem model pull`: a snapshot into the store, checked, and resumed where it broke off.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use tandem_models::repo::HubName;
use tandem_models::store::{Snapshot, Store};
use tandem_models::{gguf_files, matching, split_part};

use super::hub::{Checksum, Hub, Listing, Remote, is_offline};
use crate::failure::{Code, Failure};
use crate::terminal::visible;

/// Attempts at one file in a row that bring no byte.
const FRUITLESS_MAX: u32 = 4;
/// Wait before the second attempt; doubles with each.
const PAUSE: Duration = Duration::from_millis(500);
/// Small files that belong to a model in Hugging Face layout.
const SMALL: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "README.md",
];

/// Downloads what is missing of a model and returns its snapshot.
pub(super) async fn pull(hub_name: &HubName, store: &Store, quiet: bool) -> Result<Snapshot, Failure> {
    if is_offline() {
        let message =
            format!("HF_HUB_OFFLINE is set, so {hub_name} is not fetched; unset it, or see `tandem model ls`");
        return Err(Failure::new(Code::Config, message));
    }
    let hub = Hub::from_env()?;
    let listing = hub.listing(hub_name).await?;
    let files = choose(hub_name, &listing)?;
    let dir = store.repo_dir(&hub_name.repo);
    let snapshot = dir.join("snapshots").join(&listing.sha);
    let unwritable = |e: std::io::Error| Failure::new(Code::State, format!("{} cannot be written: {e}", dir.display()));
    for folder in ["blobs", "refs"] {
        std::fs::create_dir_all(dir.join(folder)).map_err(unwritable)?;
    }
    std::fs::create_dir_all(&snapshot).map_err(unwritable)?;
    let total = files.iter().map(Remote::bytes).sum::<Result<u64, _>>()?;
    let bar = progress(total, quiet);
    for file in &files {
        let checksum = file.checksum()?;
        let blob = store.blob(&hub_name.repo, checksum.etag());
        bar.set_message(visible(&file.name).into_owned());
        if blob.is_file() {
            bar.inc(file.bytes()?);
        } else {
            let fetch = Fetch { hub: &hub, name: hub_name, commit: &listing.sha, file, checksum: &checksum, bar: &bar };
            fetch.run(&blob).await?;
        }
        link(&snapshot.join(&file.name), &blob, file.name.matches('/').count()).map_err(unwritable)?;
    }
    // Only now is the revision complete.
    let reference = dir.join("refs").join(&hub_name.revision);
    if hub_name.revision != listing.sha {
        if let Some(parent) = reference.parent() {
            std::fs::create_dir_all(parent).map_err(unwritable)?;
        }
        std::fs::write(&reference, &listing.sha).map_err(unwritable)?;
    }
    bar.finish_and_clear();
    store
        .snapshot(&hub_name.repo, &listing.sha)
        .ok_or_else(|| Failure::new(Code::State, format!("{} vanished", snapshot.display())))
}

/// The files of a listing that make up the model that was asked for.
fn choose(name: &HubName, listing: &Listing) -> Result<Vec<Remote>, Failure> {
    let known = |wanted: &dyn Fn(&str) -> bool| -> Vec<Remote> {
        listing.siblings.iter().filter(|file| wanted(&file.name)).cloned().collect()
    };
    let has = |wanted: &str| listing.siblings.iter().any(|file| file.name == wanted);
    if name.file.is_none() && has("config.json") && has_weights(listing) {
        // Beside an index, other safetensors are the same weights in another form.
        let sharded = has("model.safetensors.index.json");
        let weights = move |file: &str| {
            !file.contains('/')
                && file.ends_with(".safetensors")
                && (!sharded || file.starts_with("model-"))
                && !file.starts_with("consolidated")
        };
        return Ok(known(&|file| SMALL.contains(&file) || weights(file)));
    }
    let models = gguf_files(listing.siblings.iter().map(|file| file.name.as_str()));
    let found = match &name.file {
        Some(wanted) => matching(wanted, &models),
        None => models.clone(),
    };
    match found.as_slice() {
        [one] => Ok(known(&|file| match split_part(one) {
            Some(first) => {
                let other = split_part(file).filter(|_| file.ends_with(".gguf"));
                other.is_some_and(|other| (other.base, other.parts) == (first.base, first.parts))
            }
            None => file == one,
        })),
        [] if models.is_empty() => Err(Failure::new(
            Code::Refused,
            format!("{name} holds neither safetensors with a config.json nor GGUF files; other formats are not read"),
        )),
        [] => Err(Failure::new(Code::Usage, format!("{name} is not there; there is {}", models.join(", ")))),
        [first, ..] => Err(Failure::new(
            Code::Usage,
            format!("{name} could be any of {}; name one, e.g. {}:{first}", found.join(", "), name.repo),
        )),
    }
}

fn has_weights(listing: &Listing) -> bool {
    listing.siblings.iter().any(|file| file.name.ends_with(".safetensors") && !file.name.contains('/'))
}

fn progress(total: u64, quiet: bool) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if quiet || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style =
        ProgressStyle::with_template("{bytes:>10} of {total_bytes:<10} {bar:30} {bytes_per_sec:>12} {eta:>4}  {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// One file on its way into the store.
struct Fetch<'a> {
    hub: &'a Hub,
    name: &'a HubName,
    commit: &'a str,
    file: &'a Remote,
    checksum: &'a Checksum,
    bar: &'a ProgressBar,
}

impl Fetch<'_> {
    async fn run(&self, blob: &Path) -> Result<(), Failure> {
        let partial = with_suffix(blob, ".incomplete");
        let failed =
            |e: std::io::Error| Failure::new(Code::State, format!("{} cannot be written: {e}", partial.display()));
        let mut file =
            OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&partial).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!("{} is being fetched by another process; wait for it", self.file.name);
                return Err(Failure::new(Code::State, message));
            }
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        let size = self.file.bytes()?;
        let mut hash = Hash::new(self.checksum, size);
        // What an earlier run has left is part of the file, or the checksum will say that it is not.
        let mut have = hash.read(&mut file).map_err(failed)?;
        if have > size {
            have = self.restart(&mut file, &mut hash).map_err(failed)?;
        }
        self.bar.inc(have);
        let mut fruitless = 0;
        while have < size {
            let before = have;
            let ended = self.stream(&mut file, &mut hash, &mut have).await;
            match ended {
                Ok(()) if have >= size => break,
                Err(failure) if failure.code() == Code::Refused || failure.code() == Code::State => {
                    return Err(failure);
                }
                ended => {
                    fruitless = if have > before { 0 } else { fruitless + 1 };
                    if fruitless >= FRUITLESS_MAX {
                        let why = ended.err().map_or_else(|| "the connection ended early".into(), |e| e.to_string());
                        let message = format!(
                            "{} broke off at {have} of {size} bytes: {why}; run the same command again to go on from there",
                            self.file.name
                        );
                        return Err(Failure::new(Code::NoNode, message));
                    }
                    tokio::time::sleep(PAUSE * 2u32.pow(fruitless)).await;
                }
            }
        }
        file.sync_all().map_err(failed)?;
        let got = hash.finish();
        if have != size || got != self.checksum.etag() {
            let _ = std::fs::remove_file(&partial);
            let message = format!(
                "{} has the wrong checksum ({got} instead of {}) and was thrown away; try again, and do not trust the server if it happens again",
                self.file.name,
                self.checksum.etag()
            );
            return Err(Failure::new(Code::Failed, message));
        }
        std::fs::rename(&partial, blob).map_err(failed)
    }

    /// Reads until the end, or until the connection breaks.
    async fn stream(&self, file: &mut File, hash: &mut Hash, have: &mut u64) -> Result<(), Failure> {
        let broken = |e: &dyn std::fmt::Display| Failure::new(Code::NoNode, e);
        let written = |e: std::io::Error| Failure::new(Code::State, format!("the disk takes no more: {e}"));
        let mut response = self.hub.open(&self.name.repo, self.commit, &self.file.name, *have).await?;
        let resumes = response.status() == StatusCode::PARTIAL_CONTENT
            && response
                .headers()
                .get(CONTENT_RANGE)
                .and_then(|range| range.to_str().ok())
                .is_some_and(|range| range.starts_with(&format!("bytes {have}-")));
        if *have > 0 && !resumes {
            // The server sends all of it again, or what it has is shorter than what we have.
            self.bar.set_position(self.bar.position().saturating_sub(*have));
            *have = self.restart(file, hash).map_err(written)?;
            if response.status() != StatusCode::OK {
                return Err(broken(&format!("the server answers {} to a range", response.status())));
            }
        }
        let size = self.file.bytes()?;
        file.seek(SeekFrom::Start(*have)).map_err(written)?;
        while let Some(chunk) = response.chunk().await.map_err(|e| broken(&e))? {
            let room = usize::try_from(size - *have).unwrap_or(usize::MAX);
            let chunk = &chunk[..chunk.len().min(room)];
            if chunk.is_empty() {
                break;
            }
            file.write_all(chunk).map_err(written)?;
            hash.update(chunk);
            *have += chunk.len() as u64;
            self.bar.inc(chunk.len() as u64);
        }
        Ok(())
    }

    fn restart(&self, file: &mut File, hash: &mut Hash) -> std::io::Result<u64> {
        file.set_len(0)?;
        *hash = Hash::new(self.checksum, self.file.size.unwrap_or(0));
        Ok(0)
    }
}

/// A file's checksum as it arrives.
struct Hash(Context);

impl Hash {
    fn new(checksum: &Checksum, size: u64) -> Self {
        match checksum {
            Checksum::Sha256(_) => Self(Context::new(&SHA256)),
            Checksum::Git(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {size}\0").as_bytes());
                Self(context)
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Takes in what a file holds; its length.
    fn read(&mut self, file: &mut File) -> std::io::Result<u64> {
        let mut buffer = vec![0; 1 << 20];
        let mut length = 0;
        file.seek(SeekFrom::Start(0))?;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(length),
                n => {
                    self.update(&buffer[..n]);
                    length += n as u64;
                }
            }
        }
    }

    fn finish(self) -> String {
        self.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Makes a snapshot's file point to its blob, `depth` folders below the snapshot.
fn link(at: &Path, blob: &Path, depth: usize) -> std::io::Result<()> {
    if let Some(parent) = at.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if std::fs::symlink_metadata(at).is_ok() {
        std::fs::remove_file(at)?;
    }
    #[cfg(unix)]
    {
        let up: PathBuf = std::iter::repeat_n("..", depth + 2).collect();
        std::os::unix::fs::symlink(up.join("blobs").join(blob.file_name().unwrap_or_default()), at)
    }
    // Links need a privilege elsewhere; the hub's own tools copy there too.
    #[cfg(not(unix))]
    {
        let _ = depth;
        std::fs::copy(blob, at).map(drop)
    }
}

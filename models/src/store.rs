//! The local store of models: the Hugging Face cache, shared with the Python tools.
//! Layout: `models--org--name/{blobs,refs,snapshots/<commit>/<file>}`
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>).

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::repo::RepoId;

/// Most repositories that are listed.
pub const REPOS_MAX: usize = 10_000;
/// Most files of a snapshot that are looked at.
pub const FILES_MAX: usize = 10_000;
/// Deepest folder of a snapshot that is looked at.
const DEPTH_MAX: usize = 4;
/// Longest file under `refs/`, bytes.
const REF_BYTES_MAX: u64 = 256;

/// The store's folder. It need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    root: PathBuf,
}

/// One downloaded state of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Repository.
    pub repo: RepoId,
    /// Commit.
    pub commit: String,
    /// Names that point to the commit, e.g. `main`.
    pub refs: Vec<String>,
    /// Folder with its files.
    pub dir: PathBuf,
}

/// One file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// Path inside the repository, with `/`.
    pub name: String,
    /// Size, bytes.
    pub bytes: u64,
}

impl Store {
    /// The store that the environment names: `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`. None without any of them.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        Self::from_vars(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    }

    fn from_vars(var: impl Fn(&str) -> Option<PathBuf>) -> Option<Self> {
        let hub = |home: PathBuf| home.join("hub");
        let root = var("HF_HUB_CACHE")
            .or_else(|| var("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| var("HF_HOME").map(hub))
            .or_else(|| var("XDG_CACHE_HOME").map(|cache| hub(cache.join("huggingface"))))
            .or_else(|| var("HOME").map(|home| hub(home.join(".cache/huggingface"))))?;
        Some(Self { root })
    }

    /// The store in `root`.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of a repository.
    #[must_use]
    pub fn repo_dir(&self, repo: &RepoId) -> PathBuf {
        self.root.join(format!("models--{}", repo.to_string().replace('/', "--")))
    }

    /// Where a blob of a repository lies, by its etag.
    #[must_use]
    pub fn blob(&self, repo: &RepoId, etag: &str) -> PathBuf {
        self.repo_dir(repo).join("blobs").join(etag)
    }

    /// The repositories that have a snapshot, sorted.
    #[must_use]
    pub fn repos(&self) -> Vec<RepoId> {
        let mut repos: Vec<RepoId> = names(&self.root)
            .take(REPOS_MAX)
            .filter_map(|name| RepoId::parse(&name.strip_prefix("models--")?.replace("--", "/")).ok())
            .filter(|repo| !self.snapshots(repo).is_empty())
            .collect();
        repos.sort();
        repos
    }

    /// The snapshots of a repository, sorted by commit.
    #[must_use]
    pub fn snapshots(&self, repo: &RepoId) -> Vec<Snapshot> {
        let dir = self.repo_dir(repo);
        let refs: Vec<(String, String)> = names(&dir.join("refs"))
            .take(REPOS_MAX)
            .filter_map(|name| Some((self.commit(repo, &name)?, name)))
            .collect();
        let mut snapshots: Vec<Snapshot> = names(&dir.join("snapshots"))
            .take(REPOS_MAX)
            .map(|commit| Snapshot {
                repo: repo.clone(),
                refs: refs.iter().filter(|(to, _)| *to == commit).map(|(_, name)| name.clone()).collect(),
                dir: dir.join("snapshots").join(&commit),
                commit,
            })
            .filter(|snapshot| snapshot.dir.is_dir())
            .collect();
        snapshots.sort_by(|a, b| a.commit.cmp(&b.commit));
        snapshots
    }

    /// The commit that a branch or tag stood for when it was last downloaded.
    #[must_use]
    pub fn commit(&self, repo: &RepoId, name: &str) -> Option<String> {
        let path = self.repo_dir(repo).join("refs").join(name);
        if std::fs::metadata(&path).ok()?.len() > REF_BYTES_MAX {
            return None;
        }
        let commit = std::fs::read_to_string(path).ok()?.trim().to_owned();
        is_plain(&commit).then_some(commit)
    }

    /// The snapshot of a revision: a branch, a tag or a commit.
    #[must_use]
    pub fn snapshot(&self, repo: &RepoId, revision: &str) -> Option<Snapshot> {
        let commit = self.commit(repo, revision).or_else(|| is_plain(revision).then(|| revision.to_owned()))?;
        self.snapshots(repo).into_iter().find(|snapshot| snapshot.commit == commit)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.display().fmt(f)
    }
}

impl Snapshot {
    /// The files, sorted by name. Those whose blob is gone are left out.
    #[must_use]
    pub fn files(&self) -> Vec<StoredFile> {
        files_under(&self.dir)
    }

    /// The blobs that its files are links to.
    #[must_use]
    pub fn blobs(&self) -> BTreeSet<PathBuf> {
        self.files().iter().filter_map(|file| std::fs::canonicalize(self.dir.join(&file.name)).ok()).collect()
    }
}

/// The files of a folder and of those in it, sorted by name.
pub(crate) fn files_under(dir: &Path) -> Vec<StoredFile> {
    let mut out = Vec::new();
    let mut open = vec![(dir.to_owned(), String::new(), 0)];
    while let Some((dir, prefix, depth)) = open.pop() {
        for name in names(&dir) {
            let (path, name) = (dir.join(&name), format!("{prefix}{name}"));
            // Follows the links into `blobs`.
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            if meta.is_dir() && depth < DEPTH_MAX {
                open.push((path, format!("{name}/"), depth + 1));
            } else if meta.is_file() && out.len() < FILES_MAX {
                out.push(StoredFile { name, bytes: meta.len() });
            }
        }
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

/// One path component, so that no name can lead out of the folder it is joined to.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_the_store() {
        type Variables = [(&'static str, &'static str)];
        let table: [(&Variables, Option<&str>); 6] = [
            (&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b"), ("HOME", "/c")], Some("/a")),
            (&[("HUGGINGFACE_HUB_CACHE", "/a"), ("HF_HOME", "/b")], Some("/a")),
            (&[("HF_HOME", "/b"), ("XDG_CACHE_HOME", "/x")], Some("/b/hub")),
            (&[("XDG_CACHE_HOME", "/x"), ("HOME", "/c")], Some("/x/huggingface/hub")),
            (&[("HOME", "/c")], Some("/c/.cache/huggingface/hub")),
            (&[], None),
        ];
        for (vars, expected) in table {
            let store = Store::from_vars(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v)));
            assert_eq!(store.map(|s| s.root), expected.map(PathBuf::from), "{vars:?}");
        }
    }
}

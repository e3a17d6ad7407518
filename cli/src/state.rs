//! The state folder: the CA, the router's log, the edge's KV blocks, `tandem.toml`, and what is running.

use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tandem_transport::{Identity, Role};

use crate::args::Global;
use crate::failure::{Code, Failure, OrFail as _};
use crate::renewal::Issuer;

/// Folder of the development CA.
const CA_DIR: &str = "ca";
/// Folder of the router's log.
const ROUTER_DIR: &str = "router";
/// Folder of the edge's KV blocks: state and token ids of conversations.
const KV_DIR: &str = "kv";
/// Held by the `up` that uses the folder.
const LOCK_FILE: &str = "up.lock";
/// What that `up` runs.
const RUNNING_FILE: &str = "up.json";
/// What an `edge` that uses the folder runs; the last one, if there are several.
const EDGE_FILE: &str = "edge.json";
/// Largest `up.json` read, bytes.
const RUNNING_BYTES_MAX: u64 = 64 << 10;

/// Where the state folder is, existing or not.
pub(crate) fn path(global: &Global) -> Result<PathBuf, Failure> {
    if let Some(path) = &global.state {
        return Ok(path.clone());
    }
    let dirs = directories::ProjectDirs::from("", "", "tandem").ok_or_else(|| {
        Failure::new(Code::State, "this user has no home folder; name a state folder with --state or TANDEM_STATE")
    })?;
    Ok(dirs.data_dir().to_owned())
}

/// A state folder that can be written.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
}

/// The lock of an `up`; released when dropped.
#[derive(Debug)]
pub(crate) struct UpLock {
    _file: File,
    state: StateDir,
}

/// The note of what runs, for other commands; removed when dropped.
#[derive(Debug)]
pub(crate) struct Note {
    path: PathBuf,
}

/// What an `up` runs, for other commands on this machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Running {
    /// Base address of the API, ending in `/v1`.
    pub(crate) api: String,
    /// Process id of `up`.
    pub(crate) pid: u32,
    /// The key that requests must carry: who may read this folder can read the CA's key as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
}

impl StateDir {
    /// Makes the folder if needed and checks that it can be written.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let unusable = |e: std::io::Error| {
            let path = path.display();
            let message =
                format!("the state folder {path} cannot be written: {e}; name another with --state or TANDEM_STATE");
            Failure::new(Code::State, message)
        };
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(path).map_err(unusable)?;
        let probe = path.join(format!(".probe-{}", std::process::id()));
        File::create(&probe).and_then(|mut file| file.write_all(b"tandem")).map_err(unusable)?;
        fs::remove_file(&probe).map_err(unusable)?;
        Ok(Self { path: path.to_owned() })
    }

    /// Folder of the router's log.
    pub(crate) fn router(&self) -> PathBuf {
        self.path.join(ROUTER_DIR)
    }

    /// Folder of the edge's KV blocks.
    pub(crate) fn kv(&self) -> PathBuf {
        self.path.join(KV_DIR)
    }

    /// Where a process has its identity from: the folder's CA, which is made if there is none, or `given`.
    pub(crate) fn issuer(&self, given: Option<&Path>, role: Role, name: &str) -> Issuer {
        match given {
            Some(dir) => Issuer::Folder { dir: dir.to_owned(), role },
            None => Issuer::Dev { ca: self.path.join(CA_DIR), role, name: name.to_owned() },
        }
    }

    /// An identity from there.
    pub(crate) fn identity(&self, given: Option<&Path>, role: Role, name: &str) -> Result<Identity, Failure> {
        self.issuer(given, role, name).issue()
    }

    /// Claims the folder for one `up`.
    pub(crate) fn lock(&self) -> Result<UpLock, Failure> {
        let path = self.path.join(LOCK_FILE);
        let file = File::options().create(true).truncate(false).write(true).open(&path).or_fail(Code::State)?;
        match file.try_lock() {
            Ok(()) => Ok(UpLock { _file: file, state: self.clone() }),
            Err(TryLockError::WouldBlock) => {
                let who = running(&self.path).map(|r| format!(" (process {}, {})", r.pid, r.api)).unwrap_or_default();
                let path = self.path.display();
                let message = format!(
                    "another `tandem up` uses the state folder {path}{who}; stop it, or give this one its own --state"
                );
                Err(Failure::new(Code::State, message))
            }
            Err(TryLockError::Error(e)) => {
                Err(Failure::new(Code::State, format!("{} cannot be locked: {e}; use another --state", path.display())))
            }
        }
    }
}

impl UpLock {
    /// Notes what runs.
    pub(crate) fn note(&self, running: &Running) -> Note {
        Note::write(self.state.path.join(RUNNING_FILE), running)
    }
}

impl StateDir {
    /// Notes what an `edge` runs.
    pub(crate) fn note_edge(&self, running: &Running) -> Note {
        Note::write(self.path.join(EDGE_FILE), running)
    }
}

impl Note {
    fn write(path: PathBuf, running: &Running) -> Self {
        let text = serde_json::to_string(running).unwrap_or_default();
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        // One that was left behind may be readable for others.
        let _ = fs::remove_file(&path);
        let written = options.open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        if let Err(error) = written {
            tracing::warn!(%error, "other commands will not find this node by themselves; give them --url");
        }
        Self { path }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // Another process may have written its own meanwhile.
        if read(&self.path).is_some_and(|running| running.pid == std::process::id()) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What runs with this folder, if it noted it: an `up`, or else an `edge`. It may have died since.
pub(crate) fn running(path: &Path) -> Option<Running> {
    read(&path.join(RUNNING_FILE)).or_else(|| read(&path.join(EDGE_FILE)))
}

fn read(path: &Path) -> Option<Running> {
    if fs::metadata(path).ok()?.len() > RUNNING_BYTES_MAX {
        return None;
    }
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_made_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let failure = StateDir::open(&file.join("state")).unwrap_err();
        assert_eq!(failure.code(), Code::State);
        assert!(failure.to_string().contains("--state") && !failure.to_string().contains('\n'), "{failure}");
    }

    #[test]
    fn one_up_per_folder() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let lock = state.lock().unwrap();
        let noted = Running { api: "http://127.0.0.1:1/v1".into(), pid: std::process::id(), key: Some("k".into()) };
        let note = lock.note(&noted);
        let _edge = state.note_edge(&Running { api: "http://127.0.0.1:2/v1".into(), ..noted.clone() });
        assert_eq!(running(dir.path()), Some(noted.clone()));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = fs::metadata(dir.path().join(RUNNING_FILE)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "it holds the key");
        }
        let failure = state.lock().unwrap_err();
        assert!(failure.to_string().contains(&format!("process {}", noted.pid)), "{failure}");
        drop(note);
        drop(lock);
        assert_eq!(running(dir.path()).map(|edge| edge.api).as_deref(), Some("http://127.0.0.1:2/v1"));
        assert!(state.lock().is_ok());
    }

    #[test]
    fn an_identity_must_have_the_role() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let own = state.identity(None, Role::Edge, "phone").unwrap();
        let saved = dir.path().join("saved");
        own.save(&saved).unwrap();
        assert!(state.identity(Some(&saved), Role::Edge, "x").is_ok());
        let failure = state.identity(Some(&saved), Role::Cloud, "x").unwrap_err();
        assert!(failure.to_string().contains("cloud certificate"), "{failure}");
        assert_eq!(state.identity(None, Role::Edge, "Not A Name").unwrap_err().code(), Code::State);
    }
}

//! Files that hold secrets: owner-only, written atomically.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::IdentityError;

pub(super) fn read_text(path: &Path) -> Result<String, IdentityError> {
    fs::read_to_string(path).map_err(|e| IdentityError::Unreadable { path: path.to_owned(), reason: e.to_string() })
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> IdentityError + '_ {
    |e| IdentityError::Unwritable { path: path.to_owned(), reason: e.to_string() }
}

/// A synced file beside `path`, mode 0600, that does not have its final name yet.
fn temporary(path: &Path, text: &str) -> io::Result<PathBuf> {
    let dir = path.parent().unwrap_or(Path::new("."));
    make_dir(dir)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temp = dir.join(format!(".{name}.{}-{:016x}", std::process::id(), fastrand::u64(..)));
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&temp).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.inspect_err(|_| drop(fs::remove_file(&temp)))?;
    Ok(temp)
}

fn make_dir(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

/// Replaces `path` with `text`: a reader sees the old file or the new one, never a part.
pub(super) fn write_private(path: &Path, text: &str) -> Result<(), IdentityError> {
    let replace = || {
        let temp = temporary(path, text)?;
        fs::rename(&temp, path).inspect_err(|_| drop(fs::remove_file(&temp)))
    };
    replace().map_err(unwritable(path))
}

/// Creates `path` with `text` unless it exists; returns what the file holds then. Of two processes
/// that race, both end with the same text.
pub(super) fn create_private(path: &Path, text: &str) -> Result<String, IdentityError> {
    let create = || {
        let temp = temporary(path, text)?;
        let linked = fs::hard_link(&temp, path);
        drop(fs::remove_file(&temp));
        linked
    };
    match create() {
        Ok(()) => Ok(text.to_owned()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => read_text(path),
        Err(e) => Err(unwritable(path)(e)),
    }
}

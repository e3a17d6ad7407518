//! The command that asks the node which `up` has started, as it works in any terminal of this machine.

use std::path::{Path, PathBuf};

use crate::args::Global;
use crate::state;

/// The question that the embedded pair knows the answer to.
const QUESTION: &str = "\"What is the capital of Peru?\"";

/// `tandem chat …` for the `up` that uses the folder `state`: there `chat` finds its address and key.
pub(super) fn command(state: &Path) -> String {
    let program = std::env::current_exe().ok();
    let found = program.as_deref().is_none_or(|own| is_found_first(own, std::env::var_os("PATH").as_deref()));
    let program = program.filter(|_| !found);
    let usual = state::path(&Global::default()).is_ok_and(|usual| usual == state);
    let state = (!usual).then(|| std::path::absolute(state).unwrap_or_else(|_| state.to_owned()));
    words(program.as_deref(), state.as_deref())
}

fn words(program: Option<&Path>, state: Option<&Path>) -> String {
    let program = program.map_or_else(|| "tandem".to_owned(), quoted);
    let state = state.map(|state| format!("--state {} ", quoted(state))).unwrap_or_default();
    format!("{program} chat {state}{QUESTION}")
}

/// True if a shell that is told `tandem` runs the program `own`.
fn is_found_first(own: &Path, path: Option<&std::ffi::OsStr>) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    let name = PathBuf::from("tandem").with_extension(std::env::consts::EXE_EXTENSION);
    let folders = path.map(std::env::split_paths).into_iter().flatten();
    let first = folders.map(|folder| folder.join(&name)).find(|program| program.is_file());
    first.is_some_and(|first| real(&first).is_some() && real(&first) == real(own))
}

/// A path as a shell reads it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=\\".contains(c);
    if !text.is_empty() && text.chars().all(plain) && !(cfg!(unix) && text.contains('\\')) {
        return text;
    }
    if cfg!(windows) { format!("\"{text}\"") } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_names_what_is_unusual() {
        let question = QUESTION;
        let table = [
            (None, None, format!("tandem chat {question}")),
            (None, Some("/var/t"), format!("tandem chat --state /var/t {question}")),
            (Some("/a/tandem"), Some("/my state"), format!("/a/tandem chat --state '/my state' {question}")),
        ];
        for (program, state, expected) in table {
            assert_eq!(words(program.map(Path::new), state.map(Path::new)), expected);
        }
        #[cfg(unix)]
        assert_eq!(quoted(Path::new("it's $HOME")), "'it'\\''s $HOME'");
    }

    #[test]
    fn the_first_program_on_the_path_counts() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let name = format!("tandem{}", std::env::consts::EXE_SUFFIX);
        for dir in [&one, &two] {
            std::fs::write(dir.path().join(&name), "").unwrap();
        }
        let path = std::env::join_paths([one.path(), two.path()]).unwrap();
        assert!(is_found_first(&one.path().join(&name), Some(&path)));
        assert!(!is_found_first(&two.path().join(&name), Some(&path)));
        assert!(!is_found_first(&one.path().join(&name), None));
    }
}

//! Names of models on the hub: `org/name`, `org/name@revision`, `org/name:file.gguf`.

use std::fmt;
use std::str::FromStr;

/// Longest part of a repository's name, bytes (the hub's rule).
const PART_BYTES_MAX: usize = 96;
/// The revision that no revision means.
pub const MAIN: &str = "main";

/// A repository: `org/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepoId {
    org: String,
    name: String,
}

/// What a person asked for: a repository, perhaps at a revision, perhaps one file of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// The repository.
    pub repo: RepoId,
    /// Branch, tag or commit; [`MAIN`] if none was given.
    pub revision: String,
    /// A file of it, or a part of one's name, e.g. `Q4_K_M`.
    pub file: Option<String>,
}

/// A name that no repository can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no name of a model on the hub; write org/name, org/name@revision or org/name:file.gguf")]
pub struct BadName(pub String);

fn is_part(text: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty()
        && text.len() <= PART_BYTES_MAX
        && text.chars().all(fine)
        && !text.starts_with(['.', '-'])
        && !text.ends_with(['.', '-'])
        && !text.contains("..")
        // Stands for `/` in the store.
        && !text.contains("--")
}

/// Whether `path` names something inside a repository and cannot lead out of it: parts between `/`,
/// none of them empty, `.` or `..`, none with a backslash. Ask this of every name a hub gives before
/// it becomes a path.
#[must_use]
pub fn is_file(path: &str) -> bool {
    !path.is_empty() && path.split('/').all(crate::store::is_plain)
}

impl RepoId {
    /// Reads `org/name`.
    ///
    /// # Errors
    /// [`BadName`].
    pub fn parse(text: &str) -> Result<Self, BadName> {
        match text.split_once('/') {
            Some((org, name)) if is_part(org) && is_part(name) => {
                Ok(Self { org: org.to_owned(), name: name.to_owned() })
            }
            _ => Err(BadName(text.to_owned())),
        }
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)
    }
}

impl FromStr for HubName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let bad = || BadName(text.to_owned());
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) if is_file(file) => (rest, Some(file.to_owned())),
            Some(_) => return Err(bad()),
            None => (text, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            // A revision may hold slashes, e.g. refs/pr/3.
            Some((repo, revision)) if is_file(revision) => (repo, revision.to_owned()),
            Some(_) => return Err(bad()),
            None => (rest, MAIN.to_owned()),
        };
        Ok(Self { repo: RepoId::parse(repo).map_err(|_| bad())?, revision, file })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repo.fmt(f)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        let good = [
            "Qwen/Qwen3-0.6B",
            "bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
            "a/b@refs/pr/3",
            "a/b@v1:dir/model-00001-of-00002.gguf",
        ];
        for text in good {
            assert_eq!(text.parse::<HubName>().expect(text).to_string(), text);
        }
        assert_eq!("a/b@main".parse::<HubName>().expect("main").to_string(), "a/b");
        let bad = [
            "",
            "a",
            "/b",
            "a/",
            "a/b/c",
            "a/..",
            "../b",
            "a/b:",
            "a/b:../c",
            "a/b:/etc/passwd",
            "a/b@",
            "a/b@../x",
            "a/b c",
            "a/b\0",
            "a/x--y",
            ".a/b",
            "a/b:c\\d",
            "a/b@x//y",
        ];
        for text in bad {
            assert_eq!(text.parse::<HubName>(), Err(BadName(text.to_owned())), "{text:?}");
        }
        assert!(RepoId::parse(&format!("a/{}", "b".repeat(97))).is_err());
    }
}

//! One answer to "which model is that?" for every command: an embedded name, a GGUF file, a folder in
//! Hugging Face layout, or a name in the local store.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use tandem_engine::{ModelFiles, split_part};
use tandem_proto::limits::NAME_BYTES_MAX;

use crate::repo::HubName;
use crate::store::{Store, StoredFile, files_under};
use crate::{ALL, EmbeddedModel, find};

/// Most names that an error lists.
const LISTED_MAX: usize = 12;

/// Where a model's files are.
#[derive(Clone)]
pub enum Place {
    /// In this program.
    Embedded(&'static EmbeddedModel),
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// A GGUF file; of a split one, any part.
    Gguf(PathBuf),
}

/// A model that was found.
#[derive(Clone)]
pub struct Found {
    /// Name under which it is served.
    pub name: String,
    /// Its files.
    pub place: Place,
}

/// Why a model was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Nothing is called so.
    #[error("model `{name}` not found; {there_is}. {advice}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        there_is: String,
        /// What to do.
        advice: String,
    },
    /// A path to something that is no model.
    #[error("{} is no model: {problem}", path.display())]
    NoModel {
        /// The path.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// Several files would do.
    #[error("`{name}` could be any of {files}; add one, e.g. `{name}:{first}`")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// The files.
        files: String,
        /// One of them.
        first: String,
    },
}

impl Found {
    /// The files, as the engine takes them.
    #[must_use]
    pub fn files(&self) -> ModelFiles {
        match &self.place {
            Place::Embedded(model) => ModelFiles::Embedded { config: model.config, weights: model.weights },
            Place::Folder(dir) => ModelFiles::HfDir(dir.clone()),
            Place::Gguf(path) => ModelFiles::Gguf(path.clone()),
        }
    }

    /// True for a model inside this program.
    #[must_use]
    pub fn is_embedded(&self) -> bool {
        matches!(self.place, Place::Embedded(_))
    }
}

/// Finds the model that `name` means. A path that exists wins over a name in the store.
///
/// # Errors
/// A [`ResolveError`] that lists what there is, or says what to download.
pub fn resolve(name: &str, store: Option<&Store>) -> Result<Found, ResolveError> {
    if let Some(model) = find(name) {
        return Ok(Found { name: model.name.to_owned(), place: Place::Embedded(model) });
    }
    let path = Path::new(name);
    if path.is_dir() {
        return folder(path, served_name(path.file_name().map(|n| n.to_string_lossy()).as_deref().unwrap_or(name)));
    }
    if path.is_file() {
        return file(path);
    }
    if let Ok(hub) = name.parse::<HubName>() {
        return stored(&hub, store);
    }
    let advice = if name.contains(['/', '\\', '.']) {
        "If it is a path, nothing is there; check it"
    } else {
        "Give a GGUF file, a folder in Hugging Face layout, or org/name from the hub"
    };
    Err(unknown(name, store, advice.to_owned()))
}

fn unknown(name: &str, store: Option<&Store>, advice: String) -> ResolveError {
    let embedded = ALL.map(|model| model.name).join(", ");
    let repos = store.map(Store::repos).unwrap_or_default();
    let mut cached: Vec<String> = repos.iter().take(LISTED_MAX).map(ToString::to_string).collect();
    if repos.len() > LISTED_MAX {
        cached.push("…".into());
    }
    let there_is = match cached.as_slice() {
        [] => format!("there is {embedded}"),
        cached => format!("there is {embedded}, and in the store {}", cached.join(", ")),
    };
    ResolveError::Unknown { name: name.to_owned(), there_is, advice }
}

/// A name that fits on the wire and in a model list.
fn served_name(name: &str) -> String {
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}

fn no_model(path: &Path, problem: impl Into<String>) -> ResolveError {
    ResolveError::NoModel { path: path.to_owned(), problem: problem.into() }
}

fn file(path: &Path) -> Result<Found, ResolveError> {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        return Err(no_model(path, "give the folder it lies in, which also has config.json and tokenizer.json"));
    }
    if read.is_err() || &magic != b"GGUF" {
        return Err(no_model(path, "it does not begin with `GGUF`; a GGUF file or a folder is needed"));
    }
    let stem = path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
    let stem = split_part(&stem).map_or(stem.as_ref(), |split| split.base);
    Ok(Found { name: served_name(stem), place: Place::Gguf(path.to_owned()) })
}

/// Whether a folder with these files is a model in Hugging Face layout. Of a repository of GGUF files many
/// have a `config.json` too.
fn is_hf_layout(files: &[StoredFile]) -> bool {
    let has = |wanted: fn(&str) -> bool| files.iter().any(|file| !file.name.contains('/') && wanted(&file.name));
    has(|name| name == "config.json") && has(|name| name.ends_with(".safetensors"))
}

fn folder(dir: &Path, name: String) -> Result<Found, ResolveError> {
    let files = files_under(dir);
    if is_hf_layout(&files) {
        return Ok(Found { name, place: Place::Folder(dir.to_owned()) });
    }
    // Of the folder itself: what lies deeper belongs to other models.
    let mut gguf = gguf_files(files.iter().map(|file| file.name.as_str()));
    gguf.retain(|name| !name.contains('/'));
    match gguf.as_slice() {
        [] => Err(no_model(dir, "it has neither a config.json with .safetensors files nor a .gguf file")),
        [one] => Ok(Found { name, place: Place::Gguf(dir.join(one)) }),
        several => Err(no_model(dir, format!("it has several GGUF files; name one: {}", several.join(", ")))),
    }
}

/// The GGUF models among the files of a repository, in their order; of a split one the first part.
/// Vision projectors are no models.
#[must_use]
pub fn gguf_files<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let is_model = |name: &&str| {
        let base = name.rsplit('/').next().unwrap_or(name);
        name.ends_with(".gguf") && !base.starts_with("mmproj") && split_part(name).is_none_or(|split| split.part == 1)
    };
    names.into_iter().filter(is_model).map(str::to_owned).collect()
}

fn stored(hub: &HubName, store: Option<&Store>) -> Result<Found, ResolveError> {
    let pull = || format!("Try: tandem model pull {hub}");
    let text = hub.to_string();
    let Some(snapshot) = store.and_then(|store| store.snapshot(&hub.repo, &hub.revision)) else {
        return Err(unknown(&text, store, pull()));
    };
    let name = served_name(&text);
    let files = snapshot.files();
    let gguf = gguf_files(files.iter().map(|file| file.name.as_str()));
    let Some(wanted) = &hub.file else {
        if is_hf_layout(&files) {
            return Ok(Found { name, place: Place::Folder(snapshot.dir) });
        }
        return match gguf.as_slice() {
            [one] => Ok(Found { name, place: Place::Gguf(snapshot.dir.join(one)) }),
            [] => Err(unknown(&text, store, format!("Its snapshot is incomplete. {}", pull()))),
            [first, ..] => Err(ResolveError::Ambiguous { name: text, files: gguf.join(", "), first: first.clone() }),
        };
    };
    match matching(wanted, &gguf).as_slice() {
        [one] => Ok(Found { name, place: Place::Gguf(snapshot.dir.join(one)) }),
        [] => Err(unknown(&text, store, pull())),
        several => Err(ResolveError::Ambiguous {
            name: hub.repo.to_string(),
            files: several.join(", "),
            first: several[0].clone(),
        }),
    }
}

/// The files that `wanted` means: the one called so, else those whose names contain it (`Q4_K_M`).
#[must_use]
pub fn matching(wanted: &str, files: &[String]) -> Vec<String> {
    if files.iter().any(|file| file == wanted) {
        return vec![wanted.to_owned()];
    }
    let wanted = wanted.to_ascii_lowercase();
    let tag = |file: &&String| {
        let file = file.to_ascii_lowercase();
        let stem = file.strip_suffix(".gguf").unwrap_or(&file);
        let stem = split_part(stem).map_or(stem, |split| split.base);
        stem.ends_with(&format!("-{wanted}")) || stem.ends_with(&format!(".{wanted}")) || stem == wanted
    };
    files.iter().filter(tag).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store_with(files: &[&str]) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("a folder");
        let repo = dir.path().join("models--org--tiny");
        let snapshot = repo.join("snapshots/abc");
        for file in files {
            let path = snapshot.join(file);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
            std::fs::write(path, "GGUF").expect("a file");
        }
        std::fs::create_dir_all(repo.join("refs")).expect("refs");
        std::fs::write(repo.join("refs/main"), "abc\n").expect("a ref");
        let store = Store::at(dir.path());
        (dir, store)
    }

    fn found(name: &str, store: &Store) -> Result<(String, String), String> {
        let found = resolve(name, Some(store)).map_err(|e| e.to_string())?;
        let place = match found.place {
            Place::Embedded(model) => format!("embedded {}", model.name),
            Place::Folder(dir) => format!("folder {}", dir.file_name().unwrap_or_default().display()),
            Place::Gguf(path) => format!("gguf {}", path.file_name().unwrap_or_default().display()),
        };
        Ok((found.name, place))
    }

    #[test]
    fn names_of_every_kind() {
        let (dir, store) =
            store_with(&["tiny-Q4_0.gguf", "tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"]);
        assert_eq!(found("demo-edge", &store).expect("embedded"), ("demo-edge".into(), "embedded demo-edge".into()));
        let ok = [
            ("org/tiny:tiny-Q4_0.gguf", "gguf tiny-Q4_0.gguf"),
            ("org/tiny:q4_0", "gguf tiny-Q4_0.gguf"),
            ("org/tiny@abc:Q4_0", "gguf tiny-Q4_0.gguf"),
            ("org/tiny:Q8_0", "gguf tiny-Q8_0-00001-of-00002.gguf"),
        ];
        for (name, place) in ok {
            assert_eq!(found(name, &store).expect(name), (name.to_owned(), place.to_owned()));
        }
        let path = dir.path().join("models--org--tiny/snapshots/abc/tiny-Q8_0-00002-of-00002.gguf");
        assert_eq!(found(path.to_str().expect("utf-8"), &store).expect("a path").0, "tiny-Q8_0");
        let bad = [
            ("org/tiny", "could be any of"),
            ("org/tiny:Q5_0", "tandem model pull org/tiny:Q5_0"),
            ("org/tiny@v2:Q4_0", "tandem model pull org/tiny@v2:Q4_0"),
            ("org/other", "in the store org/tiny. Try: tandem model pull org/other"),
            ("nothing", "demo-edge, demo-cloud"),
            ("../nothing.gguf", "check it"),
        ];
        for (name, part) in bad {
            let error = found(name, &store).expect_err(name);
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn a_config_beside_a_gguf_makes_no_other_model_of_it() {
        let (dir, store) = store_with(&["config.json", "x-Q4_0.gguf", "onnx/model.safetensors"]);
        assert_eq!(found("org/tiny", &store).expect("the GGUF").1, "gguf x-Q4_0.gguf");
        let inside = dir.path().join("models--org--tiny/snapshots/abc");
        let path = inside.to_str().expect("utf-8");
        assert_eq!(found(path, &store).expect("the GGUF").1, "gguf x-Q4_0.gguf");
        std::fs::remove_file(inside.join("x-Q4_0.gguf")).expect("removed");
        let error = found(path, &store).expect_err("a configuration is no model");
        assert!(error.contains(".safetensors"), "{error}");
    }

    #[test]
    fn names_of_files() {
        let files =
            ["a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "mmproj-a.gguf", "d/mmproj.gguf", "a.json"];
        assert_eq!(gguf_files(files), ["a.gguf", "b-00001-of-00002.gguf"]);
        let split = split_part("d/b-00002-of-00013.gguf").expect("a part");
        assert_eq!((split.base, split.part, split.parts), ("d/b", 2, 13));
        assert_eq!(split_part("d/b-00002-of-00013"), Some(split));
        for whole in ["a.gguf", "a-1-of-2.gguf", "a-00001-of-0000x.gguf", "00001-of-00002.gguf", "a-00001-of-00002.bin"]
        {
            assert_eq!(split_part(whole), None, "{whole}");
        }
    }

    #[test]
    fn folders_and_files() {
        let (dir, store) = store_with(&["config.json", "model.safetensors", "x.gguf"]);
        assert_eq!(found("org/tiny", &store).expect("safetensors win"), ("org/tiny".into(), "folder abc".into()));
        let inside = dir.path().join("models--org--tiny/snapshots/abc");
        let text = |path: &Path| path.to_str().expect("utf-8").to_owned();
        assert_eq!(found(&text(&inside), &store).expect("a folder").1, "folder abc");
        let error = found(&text(&inside.join("model.safetensors")), &store).expect_err("one file of several");
        assert!(error.contains("give the folder"), "{error}");
        std::fs::write(inside.join("notes.txt"), "hello").expect("a file");
        let error = found(&text(&inside.join("notes.txt")), &store).expect_err("no model");
        assert!(error.contains("GGUF"), "{error}");
        let error = found(&text(dir.path()), &store).map(drop);
        assert!(error.is_err(), "a folder of folders is no model");
    }
}

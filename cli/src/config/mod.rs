//! Settings: what they are ([`settings`]), and which of flag, environment, file and default each
//! one comes from ([`Layers`]).

mod describe;
mod environment;
mod layers;
mod settings;

pub(crate) use describe::descriptions;
pub use layers::{Entry, Layers, Source};
pub use settings::{ApiSettings, EngineSettings, LinkProfile, LinkSettings, ListenSettings, PeerSettings, Settings};

use std::path::{Path, PathBuf};

use self::environment::Stray;
use crate::args::Global;
use crate::failure::{Code, Failure, OrFail as _};
use crate::terminal::{json_line, visible};

/// Name of the configuration file in the state folder.
pub const FILE_NAME: &str = "tandem.toml";
/// Largest configuration file, bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Settings that a command's own flags give: `(key, value, flag)`.
pub(crate) type Flags = Vec<(&'static str, toml::Value, &'static str)>;

/// Puts the layers on top of each other; nothing is checked against the types yet.
pub(crate) fn layers(global: &Global, state: &Path, flags: Flags) -> Result<Layers, Failure> {
    let mut layers = Layers::defaults();
    if let Some(path) = file(global, state) {
        let text = read(&path)?;
        layers.file(&path, &text).or_fail(Code::Config)?;
    }
    layers.environment(std::env::vars_os()).or_fail(Code::Config)?;
    if let Some(filter) = &global.log {
        layers.set("log", filter.clone().into(), Source::Flag("--log")).or_fail(Code::Config)?;
    }
    for (key, value, flag) in flags {
        layers.set(key, value, Source::Flag(flag)).or_fail(Code::Config)?;
    }
    for assignment in &global.set {
        layers.assign(assignment).or_fail(Code::Config)?;
    }
    Ok(layers)
}

/// Names the variables of the environment that look like ours and mean nothing.
pub(crate) fn strays() -> Vec<Stray> {
    let defaults = Layers::defaults();
    environment::strays(std::env::vars_os(), &defaults.entries().map(|(key, _)| key).collect::<Vec<_>>())
}

/// Says on standard error which variables of the environment mean nothing.
pub(crate) fn warn_of_strays(json: bool) {
    // Most environments have none, and then there is nothing to look up.
    if !std::env::vars_os().any(|(name, _)| name.to_string_lossy().starts_with("TANDEM_")) {
        return;
    }
    for Stray { name, problem } in strays() {
        if json {
            let warning = serde_json::json!({ "warning": { "message": problem, "variable": name } });
            eprintln!("{}", json_line(&warning));
        } else {
            eprintln!("warning: {}", visible(&problem));
        }
    }
}

/// The settings in force.
pub(crate) fn load(global: &Global, state: &Path, flags: Flags) -> Result<Settings, Failure> {
    layers(global, state, flags)?.settings().or_fail(Code::Config)
}

/// The file that counts: the one named, which must be there, or the state folder's, if there.
pub(crate) fn file(global: &Global, state: &Path) -> Option<PathBuf> {
    let own = || Some(state.join(FILE_NAME)).filter(|path| path.exists());
    global.config.clone().or_else(own)
}

fn read(path: &Path) -> Result<String, Failure> {
    let unreadable = |e: std::io::Error| {
        let path = path.display();
        Failure::new(Code::Config, format!("the configuration file {path} cannot be read: {e}; check --config"))
    };
    let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if bytes > FILE_BYTES_MAX {
        let path = path.display();
        let message = format!("the configuration file {path} has {bytes} bytes, more than {FILE_BYTES_MAX}");
        return Err(Failure::new(Code::Config, message));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

#[cfg(test)]
mod tests;

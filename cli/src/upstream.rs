//! Engines behind URLs that run the large model: how they are named on the command line, and waiting for them.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use tandem_cloud_node::settings::CloudSettings;
use tandem_cloud_node::target::upstream::{ConnectError, Upstream, UpstreamOptions};
use tandem_proto::message::{Exactness, ModelCard};
use tandem_upstream::Key;

use crate::args::UpstreamArgs;
use crate::cloud::Served;
use crate::config::{Flags, Layers};
use crate::failure::{Code, Failure, OrFail as _};
use crate::pair;

/// Name under which `up` serves an upstream's model.
pub(crate) const MODEL_NAME: &str = "upstream";

/// Longest key file that is read, bytes.
const KEY_BYTES_MAX: u64 = 16 << 10;

/// Waits between two attempts to reach the upstream: the first, and the longest.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What was typed, as settings. The key is not among them: `up` hands settings to its children on their command line.
pub(crate) fn flags(args: &UpstreamArgs) -> Flags {
    let mut flags = Flags::new();
    flags.extend((!args.upstream.is_empty()).then(|| ("cloud.upstream", args.upstream.clone().into(), "--upstream")));
    let tokenizer = args.upstream_tokenizer.as_deref();
    flags.extend(tokenizer.map(|name| ("cloud.upstream_tokenizer", name.into(), "--upstream-tokenizer")));
    flags
}

/// The same for a child, with what follows from the settings.
pub(crate) fn child_args(settings: &CloudSettings, args: &UpstreamArgs) -> Vec<OsString> {
    let mut given: Vec<OsString> = Vec::new();
    for url in &settings.upstream {
        given.extend(["--upstream".into(), url.into()]);
    }
    if !settings.upstream.is_empty() {
        given.extend(["--upstream-tokenizer".into(), OsString::from(&settings.upstream_tokenizer)]);
        given.extend(args.upstream_key_file.iter().flat_map(|path| ["--upstream-key-file".into(), path.into()]));
    }
    given
}

/// Whether an upstream runs the cloud's model.
pub(crate) fn is_set(layers: &Layers) -> bool {
    layers.has_any("cloud.upstream")
}

/// The key in the file that was named.
pub(crate) fn key_of_file(args: &UpstreamArgs) -> Result<Option<String>, Failure> {
    let Some(path) = &args.upstream_key_file else { return Ok(None) };
    let refuse =
        |problem: String| Failure::new(Code::Config, format!("--upstream-key-file {}: {problem}", path.display()));
    let length = std::fs::metadata(path).map_err(|e| refuse(e.to_string()))?.len();
    if length > KEY_BYTES_MAX {
        return Err(refuse(format!("{length} bytes are no key")));
    }
    let key = std::fs::read_to_string(path).map_err(|e| refuse(e.to_string()))?;
    match key.trim() {
        "" => Err(refuse("it is empty".into())),
        key => Ok(Some(key.to_owned())),
    }
}

/// Connects to the engines, waiting for them as long as they may come.
pub(crate) async fn connect(settings: &CloudSettings) -> Result<Served, Failure> {
    if settings.upstream_tokenizer.is_empty() {
        let message = "name the tokenizer of the upstream's model with --upstream-tokenizer: a GGUF file, a folder with \
                       tokenizer.json, or a name in the store (`tandem model pull org/name`)";
        return Err(Failure::new(Code::Config, message));
    }
    let found = pair::find(&settings.upstream_tokenizer, Code::Config)?;
    let tokenizer = tokio::task::spawn_blocking(move || found.tokenizer()).await.or_fail(Code::Failed)?;
    let tokenizer = tokenizer
        .map_err(|e| Failure::new(Code::Config, format!("the tokenizer {}: {e}", settings.upstream_tokenizer)))?;
    let key = settings.upstream_key.as_deref().map(Key::new);
    let options = UpstreamOptions { urls: settings.upstream.clone(), key };
    let upstream = wait_for(&options, &tokenizer).await.or_fail(Code::Config)?;
    tracing::info!("{}", upstream.summary());
    let name = if settings.model.is_empty() { served_name(upstream.model()) } else { &settings.model };
    let card = ModelCard {
        name: name.to_owned(),
        digest: upstream.digest(tokenizer.digest()),
        tokenizer: tokenizer.digest(),
        tokenizer_marks: tokenizer.marks().to_vec(),
        layers: Vec::new(),
        numerics: upstream.numerics(),
        hidden_size: 0,
        context_tokens: u32::try_from(upstream.context_tokens()).unwrap_or(u32::MAX),
        exactness: Exactness::UpToTies,
    };
    Ok(Served { target: Arc::new(upstream), tokenizer, card })
}

async fn wait_for(
    options: &UpstreamOptions,
    tokenizer: &tandem_engine::tokenizer::Tokenizer,
) -> Result<Upstream, ConnectError> {
    let mut wait = RETRY;
    loop {
        match Upstream::connect(options, tokenizer).await {
            Err(e) if e.passes() => {
                tracing::warn!("waiting for the upstream: {e}");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MAX);
            }
            done => return done,
        }
    }
}

/// What an upstream calls its model may be the path of a file.
fn served_name(model: &str) -> &str {
    let file = model.rsplit(['/', '\\']).next().unwrap_or(model);
    file.strip_suffix(".gguf").map_or(model, |stem| stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_served_under_its_name() {
        assert_eq!(served_name("/models/SmolLM2-135M.Q4_1.gguf"), "SmolLM2-135M.Q4_1");
        assert_eq!(served_name("Qwen/Qwen3-30B-A3B"), "Qwen/Qwen3-30B-A3B");
    }

    #[test]
    fn a_key_file_has_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let args = UpstreamArgs { upstream_key_file: Some(path.clone()), ..UpstreamArgs::default() };
        assert!(key_of_file(&args).unwrap_err().to_string().contains("--upstream-key-file"));
        std::fs::write(&path, "\n").unwrap();
        assert!(key_of_file(&args).unwrap_err().to_string().contains("empty"));
        std::fs::write(&path, "sk-1\n").unwrap();
        assert_eq!(key_of_file(&args).unwrap().as_deref(), Some("sk-1"));
    }
}

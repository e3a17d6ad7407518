//! What the nodes of an experiment are, out of flags and settings; what no experiment uses is refused.

use std::path::Path;
use std::sync::Arc;

use tandem_lab::cluster::ClusterOptions;
use tandem_lab::pair::PairFiles;
use tandem_router::policy::{PolicyFile, PolicySpec};

use crate::args::{Global, LabModelArgs};
use crate::config::{self, Layers, Settings, Source};
use crate::failure::{Code, Failure, OrFail as _};
use crate::terminal::visible;
use crate::{pair, state};

/// An experiment, and the settings that change what it does; `*` at the end stands for a whole table.
pub(super) struct Experiment {
    pub(super) name: &'static str,
    pub(super) uses: &'static [&'static str],
}

pub(super) const EVAL: Experiment = Experiment {
    name: "lab eval",
    uses: &[
        "log",
        "edge.model",
        "cloud.model",
        "policy.*",
        "edge.trunk_layers",
        "edge.kv_blocks",
        "edge.prefix_cache_mib_max",
        "edge.exact",
        "edge.speculate_tokens_max",
        "edge.escalation_ms_max",
        "edge.reconnect_ms_max",
        "edge.send_hidden",
        "edge.fetch_prompt",
        "cloud.trunk_layers",
        "cloud.bounds.*",
        "cloud.batch_rows_max",
        "cloud.batch_sequences_max",
        "cloud.prefill_chunk",
        "cloud.pull_trunk",
    ],
};

pub(super) const LINK: Experiment = Experiment {
    name: "lab link",
    // Strategies and exchanges are what it compares.
    uses: &[
        "log",
        "edge.model",
        "cloud.model",
        "policy.*",
        "edge.trunk_layers",
        "edge.kv_blocks",
        "edge.speculate_tokens_max",
        "edge.escalation_ms_max",
        "edge.reconnect_ms_max",
        "cloud.trunk_layers",
        "cloud.batch_rows_max",
        "cloud.batch_sequences_max",
        "cloud.prefill_chunk",
    ],
};

pub(super) const CALIBRATE: Experiment =
    Experiment { name: "lab calibrate", uses: &["log", "edge.model", "cloud.model"] };

impl Experiment {
    fn uses(&self, key: &str) -> bool {
        self.uses.iter().any(|used| *used == key || used.strip_suffix('*').is_some_and(|table| key.starts_with(table)))
    }
}

/// The settings of an experiment: those of flags, environment and files, with the defaults of its pair.
/// `policy` is the file of a fitted rule.
pub(super) fn settings(
    global: &Global,
    models: &LabModelArgs,
    policy: Option<&Path>,
    experiment: &Experiment,
) -> Result<Settings, Failure> {
    let mut flags = config::Flags::new();
    flags.extend(models.edge_model.as_deref().map(|model| ("edge.model", model.into(), "--edge-model")));
    flags.extend(models.cloud_model.as_deref().map(|model| ("cloud.model", model.into(), "--cloud-model")));
    let mut layers = config::layers(global, &state::path(global)?, flags)?;
    refuse_unused(&layers, global.config.as_deref(), experiment)?;
    if policy.is_some() {
        refuse_two_rules(&layers)?;
    }
    let cloud = pair::find_set(&layers, "cloud.model")?.name;
    pair::find_set(&layers, "edge.model")?;
    layers.prefer("edge.cloud_model", cloud.into());
    pair::prefer(&mut layers);
    layers.settings().or_fail(Code::Config)
}

/// Refuses what was given for this command and changes nothing about it. What stands in the state folder's
/// file or in the environment is meant for the nodes as well, so it is named and not refused.
fn refuse_unused(layers: &Layers, named: Option<&Path>, experiment: &Experiment) -> Result<(), Failure> {
    let Experiment { name, uses } = experiment;
    if layers.has_any("cloud.upstream") {
        let message = format!("`{name}` runs both models itself, so `cloud.upstream` cannot be used; remove it");
        return Err(Failure::new(Code::Config, message));
    }
    let mut elsewhere = Vec::new();
    for (key, entry) in layers.entries() {
        if entry.value.is_none() || entry.source == Source::Default || experiment.uses(key) {
            continue;
        }
        let typed = match &entry.source {
            Source::Flag(_) => true,
            Source::File(path) => named == Some(path.as_path()),
            _ => false,
        };
        if typed {
            let advice = instead(key);
            let message = format!(
                "`{name}` does not use the setting `{key}` (from {}){advice}; it uses {}",
                entry.source,
                uses.join(", ")
            );
            return Err(Failure::new(Code::Usage, message));
        }
        elsewhere.push(format!("{key} (from {})", entry.source));
    }
    if !elsewhere.is_empty() {
        eprintln!("note: {name} does not use {}", visible(&elsewhere.join(", ")));
    }
    Ok(())
}

/// Refuses a rule of the settings beside the fitted one of a file.
fn refuse_two_rules(layers: &Layers) -> Result<(), Failure> {
    let rule = layers.text("policy.policy").unwrap_or_default();
    if layers.is_default("policy.policy") || rule == "calibrated" {
        return Ok(());
    }
    let message = format!("--policy gives a fitted rule, and the setting `policy` says `{rule}`; leave one out");
    Err(Failure::new(Code::Usage, message))
}

/// The option that does what a setting does elsewhere.
fn instead(key: &str) -> &'static str {
    match key {
        "engine.edge_threads" | "engine.cloud_threads" => ", give --threads",
        "edge.requests_max" => ", give --at-once",
        "edge.default_mode" => ", give --mode",
        "edge.threshold" => ", give --set policy.threshold or a policy with a threshold",
        _ => "",
    }
}

/// The models that the settings name.
pub(super) fn models(settings: &Settings) -> Result<PairFiles, Failure> {
    Ok(PairFiles {
        edge: pair::find(&settings.edge.model, Code::Config)?,
        cloud: pair::find(&settings.cloud.model, Code::Config)?,
    })
}

/// Nodes as the settings want them, with the rule of the file `policy` in `auto` if there is one.
pub(super) fn nodes(settings: Settings, policy: Option<&Path>, threads: usize) -> Result<ClusterOptions, Failure> {
    let models = models(&settings)?;
    let (policy, policy_file) = match policy {
        Some(path) => {
            let threshold = match settings.policy {
                PolicySpec::Calibrated { threshold } => threshold,
                _ => None,
            };
            let file = PolicyFile::load(path).map(Arc::new).or_fail(Code::Failed)?;
            (PolicySpec::Calibrated { threshold }, Some(file))
        }
        None => (settings.policy, pair::policy_file()?),
    };
    Ok(ClusterOptions {
        models,
        edge: settings.edge,
        cloud: settings.cloud,
        policy,
        policy_file,
        threads,
        ..ClusterOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_experiment_does_not_use_is_refused_by_name() {
        let file = Path::new("lab.toml");
        // Setting, experiment, whether it is used.
        let table = [
            ("edge.trunk_layers=2", &EVAL, true),
            ("policy.policy=\"never\"", &EVAL, true),
            ("cloud.bounds.sessions_max=9", &EVAL, true),
            ("edge.requests_max=3", &EVAL, false),
            ("engine.edge_threads=2", &EVAL, false),
            ("listen.api=\"127.0.0.1:1\"", &EVAL, false),
            ("edge.exact=\"draft\"", &EVAL, true),
            ("edge.exact=\"draft\"", &LINK, false),
            ("policy.policy=\"never\"", &CALIBRATE, false),
            ("edge.model=\"demo-edge\"", &CALIBRATE, true),
        ];
        for (setting, experiment, used) in table {
            let key = setting.split('=').next().unwrap_or_default();
            let mut typed = Layers::defaults();
            typed.assign(setting).expect("a setting");
            let mut read = Layers::defaults();
            read.file(file, setting).expect("a file");
            for (layers, named) in [(&typed, None), (&read, Some(file))] {
                let refused = refuse_unused(layers, named, experiment).err();
                assert_eq!(refused.is_none(), used, "{setting} {}: {refused:?}", experiment.name);
                assert!(refused.is_none_or(|why| why.to_string().contains(key)), "{setting}");
            }
            // The file of the state folder is the nodes' as well.
            assert!(refuse_unused(&read, None, experiment).is_ok(), "{setting}");
        }
        for (setting, refused) in [("policy.policy=\"never\"", true), ("policy.threshold=0.1", false)] {
            let mut typed = Layers::defaults();
            typed.assign(setting).expect("a setting");
            assert_eq!(refuse_two_rules(&typed).is_err(), refused, "{setting}");
        }
        let mut upstream = Layers::defaults();
        upstream.file(file, "cloud.upstream = [\"http://h:1\"]").expect("a file");
        assert!(refuse_unused(&upstream, None, &EVAL).is_err());
    }
}

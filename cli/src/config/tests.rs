use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;

use super::{Layers, Settings, Source};

fn env(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn source_of(layers: &Layers, key: &str) -> Source {
    layers.entries().find(|(known, _)| *known == key).map(|(_, entry)| entry.source).expect(key)
}

#[test]
fn defaults_give_the_default_settings() {
    assert_eq!(Layers::defaults().settings(), Ok(Settings::default()));
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let mut layers = Layers::defaults();
    let file = "[edge]\nrequests_max = 1\nkv_blocks = 2\nanswers_kept = 3\n[listen]\napi = \"127.0.0.1:1\"\n";
    layers.file(Path::new("t.toml"), file).unwrap();
    let env = env(&[
        ("TANDEM_EDGE__KV_BLOCKS", "20"),
        ("TANDEM_EDGE__ANSWERS_KEPT", "30"),
        ("TANDEM_CLOUD__BOUNDS__SESSIONS_MAX", "7"),
        ("TANDEM_PEERS__ROUTERS", "[\"a:1\", \"b:2\"]"),
        ("TANDEM_API_KEY", "007"),
        ("PATH", "/bin"),
    ]);
    layers.environment(env.into_iter()).unwrap();
    layers.assign("edge.answers_kept=300").unwrap();
    let settings = layers.settings().unwrap();
    assert_eq!((settings.edge.requests_max, settings.edge.kv_blocks, settings.edge.answers_kept), (1, 20, 300));
    assert_eq!(settings.cloud.bounds.sessions_max, 7);
    assert_eq!(settings.peers.routers, ["a:1", "b:2"]);
    assert_eq!(settings.listen.api.port(), 1);
    assert_eq!(source_of(&layers, "edge.requests_max"), Source::File("t.toml".into()));
    assert_eq!(source_of(&layers, "edge.kv_blocks"), Source::Environment("TANDEM_EDGE__KV_BLOCKS".into()));
    assert_eq!(source_of(&layers, "edge.answers_kept"), Source::Flag("--set"));
    assert_eq!(source_of(&layers, "edge.model"), Source::Default);
}

#[test]
fn names_are_addresses() {
    let mut layers = Layers::defaults();
    layers.file(Path::new("t.toml"), "[listen]\napi = \"localhost:8081\"\nmetrics = \"localhost:9\"").unwrap();
    let listen = layers.settings().unwrap().listen;
    assert_eq!(listen.api, SocketAddr::from(([127, 0, 0, 1], 8081)));
    assert_eq!(listen.metrics, Some(SocketAddr::from(([127, 0, 0, 1], 9))));
}

#[test]
fn numbers_of_a_policy_are_finite() {
    for nats in ["nan", "inf", "1e39"] {
        let mut layers = Layers::defaults();
        layers.assign("policy.policy=entropy").unwrap();
        layers.assign(&format!("policy.nats={nats}")).unwrap();
        let message = layers.settings().unwrap_err().to_string();
        assert!(message.contains("policy.nats") && message.contains("--set"), "{nats}: {message}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let mut layers = Layers::defaults();
    let given = env(&[("TANDEM_API_KEY", "hush"), ("TANDEM_UPSTREAM_KEY", "hush, too")]);
    layers.environment(given.into_iter()).unwrap();
    let settings = layers.settings().unwrap();
    assert_eq!(settings.api.key.as_deref(), Some("hush"));
    assert_eq!(settings.cloud.upstream_key.as_deref(), Some("hush, too"));
    assert!(layers.entries().all(|(_, entry)| !format!("{entry:?}").contains("hush")));
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let mut layers = Layers::defaults();
    for (text, key, hint) in [
        ("[edge]\nrequest_max = 1", "`edge.request_max`", "requests_max"),
        ("nonsense = 1", "`nonsense`", "there is"),
        ("[cloud.bounds]\nsessions = 1", "`cloud.bounds.sessions`", "sessions_max"),
        ("[edgy]\nmodel = \"x\"", "`edgy.model`", "edge"),
    ] {
        let message = layers.clone().file(Path::new("t.toml"), text).unwrap_err().to_string();
        assert!(message.contains(key) && message.contains(hint) && message.contains("t.toml"), "{message}");
    }
    let stray = env(&[("TANDEM_EDGE__REQUEST_MAX", "1")]);
    let message = layers.environment(stray.into_iter()).unwrap_err().to_string();
    assert!(message.contains("TANDEM_EDGE__REQUEST_MAX"), "{message}");
    assert!(layers.assign("edge.requests_max").is_err());
}

#[test]
fn wrong_values_name_the_key_and_where_it_was_given() {
    for (assignment, key) in [
        ("edge.requests_max=many", "edge.requests_max"),
        ("edge.requests_max=-1", "edge.requests_max"),
        ("listen.api=nowhere", "listen.api"),
        ("listen.metrics=:80", "listen.metrics"),
        ("edge.threshold=nan", "edge.threshold"),
        ("edge.cloud_share=inf", "edge.cloud_share"),
        ("edge.quality=-inf", "edge.quality"),
        ("edge.quality=1e300", "edge.quality"),
        ("edge.default_mode=fast", "edge.default_mode"),
        ("link.profile=middling", "link.profile"),
    ] {
        let mut layers = Layers::defaults();
        layers.assign(assignment).unwrap();
        let message = layers.settings().unwrap_err().to_string();
        assert!(message.contains(key) && message.contains("--set"), "{assignment}: {message}");
    }
}

#[test]
fn a_policy_is_given_as_a_whole() {
    use tandem_router::policy::PolicySpec;
    let mut layers = Layers::defaults();
    layers.file(Path::new("t.toml"), "[policy]\npolicy = \"entropy\"\nnats = 1.5").unwrap();
    assert_eq!(layers.settings().unwrap().policy, PolicySpec::Entropy { nats: 1.5 });
    layers.assign("policy.policy=never").unwrap();
    assert_eq!(layers.settings().unwrap().policy, PolicySpec::Never);
    layers.assign("policy.policy=calibrated").unwrap();
    layers.assign("policy.threshold=0.25").unwrap();
    assert_eq!(layers.settings().unwrap().policy, PolicySpec::Calibrated { threshold: Some(0.25) });
    layers.assign("policy.nats=1").unwrap();
    assert!(layers.settings().unwrap_err().to_string().contains("nats"));
}

#[test]
fn broken_toml_says_where() {
    let message = Layers::defaults().file(Path::new("t.toml"), "[edge\n").unwrap_err().to_string();
    assert!(message.contains("t.toml") && message.contains("line 1"), "{message}");
}

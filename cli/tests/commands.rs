//! Commands that need no running node, as processes: what they print and how they end.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn tandem(args: &[&str]) -> Output {
    let state = tempfile::tempdir().expect("a folder");
    command(state.path()).args(args).output().expect("the binary runs")
}

/// The binary, without the settings of the environment that the tests run in.
fn command(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TANDEM_")) {
        command.env_remove(name);
    }
    command.env("TANDEM_STATE", state);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn version_and_completions() {
    let version = tandem(&["--version"]);
    assert!(version.status.success());
    assert_eq!(text(&version.stdout).trim(), concat!("tandem ", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = tandem(&["completions", shell]);
        assert!(script.status.success() && text(&script.stdout).contains("explain"), "{shell}");
    }
}

#[test]
fn config_check_refuses_unknown_keys_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("tandem.toml");
    let path = file.to_str().expect("text");
    std::fs::write(&file, "[edge]\nrequest_max = 3\n").expect("written");
    let checked = tandem(&["config", "check", "--config", path]);
    assert_eq!(checked.status.code(), Some(3));
    let said = text(&checked.stderr);
    assert!(said.contains("`edge.request_max`") && said.contains("requests_max") && said.contains(path), "{said}");
    std::fs::write(&file, "[edge]\nrequests_max = 3\n").expect("written");
    assert!(tandem(&["config", "check", "--config", path]).status.success());
    let missing = tandem(&["config", "check", "--config", "/nowhere/tandem.toml"]);
    assert_eq!(missing.status.code(), Some(3));
}

#[test]
fn config_show_says_where_values_come_from() {
    let shown = tandem(&["config", "show", "--json", "--set", "edge.requests_max=3"]);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let all: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let is = |key: &str, value: Value, source: &str| {
        assert_eq!((&all[key]["value"], &all[key]["source"]), (&value, &source.into()), "{key}");
    };
    is("edge.requests_max", 3.into(), "--set");
    is("listen.api", "127.0.0.1:8080".into(), "default");
    for (key, shown) in all.as_object().expect("an object") {
        assert!(shown["description"].as_str().is_some_and(|text| text.len() > 8), "{key} is not described: {shown}");
    }
    let bad = tandem(&["config", "show", "--set", "edge.requests_max=no"]);
    assert_eq!(bad.status.code(), Some(3));
    assert!(text(&bad.stdout).contains("edge.requests_max = \"no\""), "shown all the same");
}

#[test]
fn an_experiment_refuses_what_it_does_not_use() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("own.toml");
    let path = file.to_str().expect("text");
    std::fs::write(&file, "[listen]\napi = \"127.0.0.1:1\"\n").expect("written");
    let none = dir.path().join("none.gguf");
    let none = none.to_str().expect("text");
    // Arguments, exit code, what is said.
    let table: [(&[&str], i32, &str); 8] = [
        (&["eval", "--set", "edge.requests_max=3"], 2, "`edge.requests_max`"),
        (&["link", "--config", path], 2, "`listen.api`"),
        (&["calibrate", "--out", "p.json", "--set", "policy.policy=never"], 2, "`policy.policy`"),
        (&["eval", "--set", "cloud.upstream=[\"http://h:1\"]"], 3, "`cloud.upstream`"),
        (&["eval", "--edge-model", none], 2, "none.gguf"),
        (&["link", "--set", "cloud.model=org/none"], 2, "org/none"),
        (&["eval", "--data", path, "--split", "a"], 2, "--split"),
        (&["eval", "--data", path, "--curve", "none"], 1, "own.toml:1"),
    ];
    for (args, code, said) in table {
        let ended = tandem(&[&["lab"], args].concat());
        assert_eq!(ended.status.code(), Some(code), "{args:?}: {}", text(&ended.stderr));
        assert!(text(&ended.stderr).contains(said), "{args:?}: {}", text(&ended.stderr));
    }
}

#[test]
fn without_a_node_the_error_names_the_next_command() {
    for command in ["chat hello", "chat", "explain last"] {
        let mut args: Vec<&str> = command.split(' ').collect();
        // Port 9 (discard) is closed on any machine that could run this.
        args.extend(["--url", "http://127.0.0.1:9"]);
        let ended = tandem(&args);
        assert_eq!(ended.status.code(), Some(6), "{command}");
        assert!(text(&ended.stderr).contains("Try: tandem up"), "{command}: {}", text(&ended.stderr));
    }
    let json = tandem(&["chat", "hello", "--json", "--url", "http://127.0.0.1:9"]);
    let error: Value = serde_json::from_slice(&json.stderr).expect("JSON");
    assert_eq!(error["error"]["code"], "no_node");
}

#[test]
fn bench_engine_prints_json() {
    for operators in ["own", "candle"] {
        let options = "--threads 1 --prompt 32 --decode 4 --rounds 1 --operators";
        let mut args = vec!["bench", "engine", "--model", "demo-edge"];
        args.extend(options.split(' ').chain([operators]));
        let measured = tandem(&args);
        assert!(measured.status.success(), "{}", text(&measured.stderr));
        let report: Value = serde_json::from_slice(&measured.stdout).expect("JSON");
        assert_eq!(report["prompt_tokens"], 32);
        assert!(report["threads"] == 1 || operators == "candle", "{report}");
        assert!(report["median"]["decode_tokens_per_s"].as_f64().is_some_and(|rate| rate > 0.0));
        let verify = report["median"]["verify"].as_array().expect("a list");
        assert_eq!(verify.iter().map(|v| v["tokens"].as_u64()).collect::<Vec<_>>(), [Some(4), Some(8)]);
        assert_eq!(report["engine"].as_str().is_some_and(|name| name.contains("candle")), operators == "candle");
    }
    let unknown = tandem(&["bench", "engine", "--model", "gpt-9"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("demo-edge"), "{}", text(&unknown.stderr));
}

#[test]
fn a_broken_model_file_is_a_line_and_not_a_panic() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("broken.gguf");
    std::fs::write(&file, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").expect("written");
    let ended = tandem(&["bench", "engine", "--model", file.to_str().expect("text")]);
    assert_eq!(ended.status.code(), Some(1));
    let said = text(&ended.stderr);
    assert!(said.starts_with("error: ") && said.contains("cannot be loaded"), "{said}");
}

#[test]
fn fleet_parts_refuse_what_cannot_work() {
    let hidden = tandem(&["cloud", "--listen", "0.0.0.0:0", "--router", "127.0.0.1:9"]);
    assert_eq!(hidden.status.code(), Some(3));
    assert!(text(&hidden.stderr).contains("--advertise"), "{}", text(&hidden.stderr));
    let open = tandem(&["router", "--listen", "127.0.0.1:0", "--metrics", "0.0.0.0:0"]);
    assert_eq!(open.status.code(), Some(4));
    let said = text(&open.stderr);
    assert!(
        said.contains("--metrics 0.0.0.0:0") && said.contains("127.0.0.1") && said.contains("--insecure"),
        "{said}"
    );
    assert!(!said.contains("key"), "a router's metrics take none: {said}");
    let name = tandem(&["edge", "--listen", "127.0.0.1:0", "--name", "My Phone"]);
    assert_eq!(name.status.code(), Some(5));
    assert!(text(&name.stderr).contains("not a node name"), "{}", text(&name.stderr));
    let cloud = tandem(&["edge", "--listen", "127.0.0.1:0", "--cloud", "nowhere"]);
    assert_eq!(cloud.status.code(), Some(3));
}

#[test]
fn an_unknown_model_ends_with_2_if_typed_and_with_3_if_set() {
    for line in ["up --edge-model gpt-9", "up --cloud-model gpt-9", "edge --model gpt-9", "cloud --model gpt-9"] {
        let mut args: Vec<&str> = line.split(' ').collect();
        args.extend(["--listen", "127.0.0.1:0"]);
        let typed = tandem(&args);
        assert_eq!(typed.status.code(), Some(2), "{line}: {}", text(&typed.stderr));
        assert!(text(&typed.stderr).contains("demo-edge"), "{line}: {}", text(&typed.stderr));
    }
    let state = tempfile::tempdir().expect("a folder");
    std::fs::write(state.path().join("tandem.toml"), "[edge]\nmodel = \"gpt-9\"\n").expect("written");
    let set = command(state.path()).args(["edge", "--listen", "127.0.0.1:0"]).output().expect("the binary runs");
    assert_eq!(set.status.code(), Some(3), "{}", text(&set.stderr));
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let state = tempfile::tempdir().expect("a folder");
    for line in ["completions bash", "config show"] {
        let mut command = command(state.path());
        command.args(line.split(' ')).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        drop(child.stdout.take());
        let ended = child.wait_with_output().expect("it ends");
        assert!(ended.stderr.is_empty(), "{line}: {}", text(&ended.stderr));
    }
}

#[test]
fn a_missing_text_says_how_to_name_one() {
    let missing = tandem(&["bench", "perplexity", "--model", "demo-edge", "--text", "/nowhere/text"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("name one with --text"), "{}", text(&missing.stderr));
}

#[test]
fn with_json_every_error_is_json() {
    for line in
        ["chat --no-such-flag", "explode", "chat --temperature nan hi", "up --listen nowhere", "config check --set x=1"]
    {
        let args: Vec<&str> = line.split(' ').chain(["--json"]).collect();
        let ended = tandem(&args);
        let error: Value =
            serde_json::from_slice(&ended.stderr).unwrap_or_else(|e| panic!("{line}: {e}: {}", text(&ended.stderr)));
        let usage = !line.starts_with("config");
        assert_eq!(error["error"]["code"], if usage { "usage" } else { "config" }, "{line}");
        assert_eq!(ended.status.code(), Some(if usage { 2 } else { 3 }), "{line}");
    }
    assert!(text(&tandem(&["chat", "--help", "--json"]).stdout).contains("Usage"));
    assert!(text(&tandem(&["chat", "--no-such-flag"]).stderr).starts_with("error: "), "people get clap's words");
}

#[test]
fn variables_that_mean_nothing_are_named() {
    let state = tempfile::tempdir().expect("a folder");
    let run = |line: &str, name: &str| {
        command(state.path()).args(line.split(' ')).env(name, "x").output().expect("the binary runs")
    };
    let shown = run("config show", "TANDEM_EDGE_MODEL");
    assert!(shown.status.success());
    let said = text(&shown.stderr);
    assert!(said.contains("TANDEM_EDGE_MODEL means nothing") && said.contains("TANDEM_EDGE__MODEL"), "{said}");
    let checked = run("config check", "TANDEM_EDGE_MODEL");
    assert_eq!(checked.status.code(), Some(3));
    assert!(text(&checked.stderr).contains("TANDEM_EDGE_MODEL"), "{}", text(&checked.stderr));
    assert!(run("config check", "TANDEM_LOG").status.success());
}

#[test]
fn control_characters_of_foreign_words_do_not_reach_the_terminal() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("\u{1b}]0;owned\u{7}\u{9b}2J.gguf");
    std::fs::write(&file, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").expect("written");
    for command in ["model show", "bench engine --model"] {
        let mut args: Vec<&str> = command.split(' ').collect();
        args.push(file.to_str().expect("text"));
        let ended = tandem(&args);
        assert!(!ended.status.success());
        let printed = text(&ended.stdout) + &text(&ended.stderr);
        assert!(printed.contains("owned"), "{printed:?}");
        assert!(!printed.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{printed:?}");
    }
}

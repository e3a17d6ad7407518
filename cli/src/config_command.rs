//! `tandem config check | show`.

use serde_json::{Map, json};
use toml::Value;

use crate::args::{ConfigArgs, ConfigCommand, Global};
use crate::config::{self, Entry};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::{print_json, print_line};
use crate::state;

/// Checks or shows the settings.
pub(crate) fn run(global: &Global, args: &ConfigArgs) -> Result<(), Failure> {
    let state = state::path(global)?;
    let layers = config::layers(global, &state, Vec::new())?;
    let checked = layers.settings().or_fail(Code::Config);
    match args.command {
        ConfigCommand::Check => {
            checked?;
            if let Some(stray) = config::strays().into_iter().next() {
                return Err(Failure::new(Code::Config, stray.problem));
            }
            let file = config::file(global, &state);
            if global.json {
                print_json(&json!({ "ok": true, "file": file }));
            } else {
                let from = file.map_or_else(|| "no file; defaults".to_owned(), |path| path.display().to_string());
                print_line(&format!("the configuration is fine ({from})"));
            }
        }
        ConfigCommand::Show => {
            let descriptions = config::descriptions();
            let described = |key: &str| descriptions.get(key).map_or("", String::as_str);
            // Values that cannot be are shown as well, so that one sees where they come from.
            if global.json {
                let all: Map<_, _> = layers
                    .entries()
                    .map(|(key, Entry { value, source })| {
                        let description = described(key);
                        let shown = json!({ "value": value, "source": source.to_string(), "description": description });
                        (key.to_owned(), shown)
                    })
                    .collect();
                print_json(&serde_json::Value::Object(all));
            } else {
                for (key, Entry { value, source }) in layers.entries() {
                    let value = value.map_or_else(|| "(none)".to_owned(), |value: Value| value.to_string());
                    print_line(&format!("# {}", described(key)));
                    print_line(&format!("{:<48} # {source}\n", format!("{key} = {value}")));
                }
            }
            checked?;
        }
    }
    Ok(())
}

//! Environment variables that mean nothing: a misspelt one must not be passed over in silence.

use std::ffi::OsString;

use super::layers::{LEVEL, PREFIX, SHORT};

/// Variables that are no settings, and who reads them.
const OTHERS: [&str; 3] = ["TANDEM_STATE", "TANDEM_CONFIG", "TANDEM_URL"];

/// A variable that means nothing, with what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stray {
    /// Its name.
    pub(crate) name: String,
    /// What is wrong and what would be right.
    pub(crate) problem: String,
}

/// The variables called `TANDEM_…` that no part reads; `keys` are those of the settings. A setting's variable
/// whose key is unknown is refused where the settings are read.
pub(crate) fn strays(variables: impl Iterator<Item = (OsString, OsString)>, keys: &[&str]) -> Vec<Stray> {
    let mut found: Vec<Stray> = variables
        .filter_map(|(name, value)| {
            let name = name.to_string_lossy().into_owned();
            let rest = name.strip_prefix(PREFIX)?;
            let read = rest.contains(LEVEL) || OTHERS.contains(&name.as_str());
            let short = SHORT.iter().any(|(short, _)| *short == name);
            let problem = match (read || short, value.to_str()) {
                (true, Some(_)) => return None,
                (true, None) => format!("the environment variable {name} is no UTF-8 text and is ignored"),
                (false, _) => {
                    let hint = meant(&name, keys).map_or_else(
                        || format!("settings are {PREFIX}<TABLE>{LEVEL}<KEY>; `tandem config show` lists them"),
                        |meant| format!("did you mean {meant}?"),
                    );
                    format!("the environment variable {name} means nothing and is ignored; {hint}")
                }
            };
            Some(Stray { name, problem })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The variable that differs in its underscores only: `TANDEM_EDGE_MODEL` for `TANDEM_EDGE__MODEL`.
fn meant(name: &str, keys: &[&str]) -> Option<String> {
    let letters = |text: &str| text.replace('_', "").to_ascii_uppercase();
    let fixed = OTHERS.iter().map(|name| (*name).to_owned());
    let short = SHORT.iter().map(|(name, _)| (*name).to_owned());
    let settings = keys.iter().map(|key| format!("{PREFIX}{}", key.replace('.', LEVEL).to_ascii_uppercase()));
    fixed.chain(short).chain(settings).find(|known| letters(known) == letters(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_reads_is_named_with_what_was_meant() {
        let keys = ["edge.model", "edge.requests_max"];
        let table = [
            ("TANDEM_EDGE_MODEL", Some("TANDEM_EDGE__MODEL")),
            ("TANDEM_EDGE_REQUESTS_MAX", Some("TANDEM_EDGE__REQUESTS_MAX")),
            ("TANDEM_APIKEY", Some("TANDEM_API_KEY")),
            ("TANDEM_Url", Some("TANDEM_URL")),
            ("TANDEM_SPEED", Some("TANDEM_<TABLE>__<KEY>")),
            ("TANDEM_API_KEY", None),
            ("TANDEM_STATE", None),
            ("TANDEM_EDGE__MODEL", None),
            ("HOME", None),
        ];
        for (name, hint) in table {
            let found = strays(std::iter::once((name.into(), "x".into())), &keys);
            match hint {
                None => assert_eq!(found, [], "{name}"),
                Some(hint) => {
                    assert!(found.len() == 1 && found[0].name == name, "{found:?}");
                    assert!(found[0].problem.contains(name) && found[0].problem.contains(hint), "{found:?}");
                }
            }
        }
    }
}

//! Model names: `tandem`, the loaded models' own names, and `…:local|auto|exact|cloud` of each.

use super::backend::ModelEntry;
use super::error::ApiError;
use super::fields::{quoted, short};
use crate::request::Mode;

/// The name that means the pair as a whole.
pub(crate) const TANDEM: &str = "tandem";

/// Names that clients send where their user named no model: Hugging Face's client, and before it text-generation-inference.
const PLACEHOLDERS: [&str; 2] = ["dummy", "tgi"];

/// Every mode, in the order in which names are listed.
pub(crate) const MODES: [Mode; 4] = [Mode::Local, Mode::Auto, Mode::Exact, Mode::Cloud];

/// What a model name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Name in the answer: the one asked for, or the alias's if the name was unknown.
    pub(crate) name: String,
    /// Mode that the name asks for, if it does.
    pub(crate) mode: Option<Mode>,
}

/// True for a name that a client sends where its user named no model, unless a model is called so.
pub(crate) fn is_placeholder(name: &str, models: &[ModelEntry]) -> bool {
    PLACEHOLDERS.contains(&name) && known(name, models).is_none()
}

/// Looks `name` up among the loaded models; unknown names become `alias` if there is one. A mode's
/// suffix on an unknown name stays in force, so that `…:local` never loses its meaning.
pub(crate) fn resolve(name: &str, models: &[ModelEntry], alias: Option<&str>) -> Result<Target, ApiError> {
    let (base, suffix) = split(name);
    if let Some(mode) = known(name, models) {
        return Ok(Target { name: name.to_owned(), mode });
    }
    if let (Some(_), Some(mode)) = (known(base, models), suffix) {
        return Ok(Target { name: name.to_owned(), mode: Some(mode) });
    }
    if let Some(alias) = alias
        && let Ok(found) = resolve(alias, models, None)
    {
        return Ok(Target { mode: suffix.or(found.mode), ..found });
    }
    Err(ApiError::not_found(
        "model_not_found",
        format!(
            "model `{}` is not here; there is {}, each also with a suffix :local, :auto, :exact or :cloud; the setting \
             `api.default_model` (`--default-model`) names one that answers for all others",
            short(name),
            quoted(&base_names(models)),
        ),
    )
    .about("model"))
}

/// The names without suffixes, `tandem` first.
pub(crate) fn base_names(models: &[ModelEntry]) -> Vec<&str> {
    std::iter::once(TANDEM).chain(models.iter().map(|m| m.id.as_str()).filter(|id| *id != TANDEM)).collect()
}

/// The mode that a whole name stands for (`Some(None)`: the node's default); `None` if unknown.
fn known(name: &str, models: &[ModelEntry]) -> Option<Option<Mode>> {
    match models.iter().find(|model| model.id == name) {
        Some(model) => Some(model.mode),
        None => (name == TANDEM).then_some(None),
    }
}

/// Takes a mode's suffix off. Other colons belong to the name.
fn split(name: &str) -> (&str, Option<Mode>) {
    match name.rsplit_once(':') {
        Some((base, suffix)) => match Mode::parse(suffix) {
            Some(mode) => (base, Some(mode)),
            None => (name, None),
        },
        None => (name, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn models() -> Vec<ModelEntry> {
        let entry = |id: &str, mode| ModelEntry { id: id.into(), created: 0, owned_by: "test".into(), mode };
        vec![entry("demo-edge", Some(Mode::Local)), entry("qwen:0.5b", None)]
    }

    #[test]
    fn names_and_suffixes() {
        let table = [
            ("tandem", None, Some(("tandem", None))),
            ("tandem:local", None, Some(("tandem:local", Some(Mode::Local)))),
            ("tandem:auto", None, Some(("tandem:auto", Some(Mode::Auto)))),
            ("tandem:exact", None, Some(("tandem:exact", Some(Mode::Exact)))),
            ("tandem:cloud", None, Some(("tandem:cloud", Some(Mode::Cloud)))),
            ("demo-edge", None, Some(("demo-edge", Some(Mode::Local)))),
            ("demo-edge:cloud", None, Some(("demo-edge:cloud", Some(Mode::Cloud)))),
            ("qwen:0.5b", None, Some(("qwen:0.5b", None))),
            ("qwen:0.5b:exact", None, Some(("qwen:0.5b:exact", Some(Mode::Exact)))),
            ("tandem:fast", None, None),
            ("tandem:local:local", None, None),
            ("", None, None),
            ("gpt-4o", None, None),
            ("gpt-4o", Some("tandem"), Some(("tandem", None))),
            ("gpt-4o", Some("tandem:auto"), Some(("tandem:auto", Some(Mode::Auto)))),
            ("gpt-4o:local", Some("tandem:auto"), Some(("tandem:auto", Some(Mode::Local)))),
            ("gpt-4o", Some("gone"), None),
        ];
        for (name, alias, expected) in table {
            let got = resolve(name, &models(), alias).ok();
            let expected = expected.map(|(name, mode): (&str, _)| Target { name: name.into(), mode });
            assert_eq!(got, expected, "{name:?} with alias {alias:?}");
        }
    }

    #[test]
    fn placeholders() {
        let table = [("dummy", true), ("tgi", true), ("tandem", false), ("gpt-4o", false), ("dummy:local", false)];
        for (name, expected) in table {
            assert_eq!(is_placeholder(name, &models()), expected, "{name}");
        }
        let own = ModelEntry { id: "dummy".into(), ..models().remove(0) };
        assert!(!is_placeholder("dummy", &[own]));
    }

    #[test]
    fn unknown_names_list_what_there_is() {
        let error = resolve("gpt-4o", &models(), None).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.code, error.param.as_deref()),
            (404, Some("model_not_found"), Some("model"))
        );
        for name in ["gpt-4o", "tandem", "demo-edge", "qwen:0.5b", ":local"] {
            assert!(error.message.contains(name), "{}", error.message);
        }
    }
}

//! The grammar that an answer must follow: from `response_format` and forced tool calls, compiled off
//! the async threads.

use std::sync::Arc;

use serde_json::Value;
use tandem_engine::constraint::{Compiled, ConstraintError, json_object, json_schema};
use tandem_proto::message::{Grammar, GrammarSyntax};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::backend::Backend;
use super::error::ApiError;
use super::fields::{Fields, short, type_error};
use super::short_json;

/// Most grammars compiled at a time; further requests wait.
const COMPILING_MAX: usize = 2;
/// Most requests that wait; further ones are told to come again.
const WAITING_MAX: usize = 32;
/// When those may come again, milliseconds.
const RETRY_AFTER_MS: u64 = 500;

/// Where the schema of a `response_format` stands.
pub(crate) const SCHEMA_PARAM: &str = "response_format.json_schema.schema";

/// What `response_format` asks for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON of this schema. It holds whether or not `strict` is set.
    JsonSchema(Value),
}

impl Format {
    /// Takes `response_format`; none for plain text. Beside OpenAI's forms, `json_object` and `json` may
    /// carry a schema under `value` (Hugging Face's clients) or `schema` (llama.cpp's).
    pub(crate) fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
        let taken = match format.string("type")?.as_deref() {
            Some("text") => None,
            Some("json_object" | "json") => {
                Some(take_bare_schema(&mut format)?.map_or(Self::JsonObject, Self::JsonSchema))
            }
            Some("json_schema") => {
                let spec = format.object("json_schema")?.or(format.object("value")?);
                let mut spec = spec.ok_or_else(|| format.missing("json_schema"))?;
                let schema = take_schema(&mut spec)?;
                spec.finish()?;
                Some(Self::JsonSchema(schema))
            }
            Some(other) => {
                let message = format!(
                    "`response_format` of type `{}` is not supported; `text`, `json_object` and `json_schema` are",
                    short(other)
                );
                return Err(ApiError::bad_request("unsupported_field", message).about("response_format"));
            }
            None => return Err(format.missing("type")),
        };
        format.finish()?;
        Ok(taken)
    }

    /// The grammar of the format.
    pub(crate) fn grammar(&self) -> Result<Grammar, ApiError> {
        match self {
            Self::JsonObject => Ok(json_object()),
            Self::JsonSchema(schema) => json_schema(schema).map_err(|e| refused(&e, SCHEMA_PARAM)),
        }
    }

    /// The format with bounds for the strings and lists of its schema, see [`short_json`].
    pub(crate) fn bounded(self) -> Self {
        match self {
            Self::JsonSchema(schema) => Self::JsonSchema(short_json::bounded(schema)),
            Self::JsonObject => self,
        }
    }

    /// The format as a schema.
    pub(crate) fn schema(&self) -> Value {
        match self {
            Self::JsonObject => serde_json::json!({ "type": "object" }),
            Self::JsonSchema(schema) => schema.clone(),
        }
    }
}

/// Takes a named schema: `schema` and what goes with it. Its name is a label: no token depends on it.
pub(crate) fn take_schema(spec: &mut Fields) -> Result<Value, ApiError> {
    spec.string("name")?;
    spec.ignore(&["description"]);
    spec.boolean("strict")?;
    spec.take("schema").ok_or_else(|| spec.missing("schema"))
}

/// The schema beside the type, under either of its names. `{}` says no more than the type does.
fn take_bare_schema(format: &mut Fields) -> Result<Option<Value>, ApiError> {
    for name in ["value", "schema"] {
        match format.take(name) {
            None => {}
            Some(Value::Object(schema)) if schema.is_empty() => {}
            Some(Value::Object(schema)) => return Ok(Some(Value::Object(schema))),
            Some(other) => return Err(type_error(&format.path(name), "an object", &other)),
        }
    }
    Ok(None)
}

/// At least `tokens` tokens of which none ends the answer, then any.
pub(crate) fn tokens_min(tokens: usize, vocabulary: usize, stop_tokens: &[u32]) -> Grammar {
    let mut stops = stop_tokens.to_vec();
    stops.sort_unstable();
    let (mut ranges, mut from) = (Vec::new(), 0);
    for stop in stops.into_iter().chain([vocabulary as u32]) {
        if stop > from {
            ranges.push(format!("{from}-{}", stop - 1));
        }
        from = from.max(stop + 1);
    }
    let text = format!("start: token{{{tokens},}}\ntoken: <[{}]>\n", ranges.join(","));
    Grammar { syntax: GrammarSyntax::Lark, text }
}

/// Turns for the compiler.
#[derive(Debug)]
pub(crate) struct Turns {
    /// Of those that compile and those that wait.
    places: Semaphore,
    turns: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Self { places: Semaphore::new(COMPILING_MAX + WAITING_MAX), turns: Semaphore::new(COMPILING_MAX) }
    }
}

impl Turns {
    /// Compiles a grammar on a thread that may block.
    pub(crate) async fn compile(
        &self,
        backend: &Arc<dyn Backend>,
        grammar: Grammar,
    ) -> Result<Result<Arc<Compiled>, ConstraintError>, ApiError> {
        let gone = |e: &dyn std::fmt::Display| ApiError::internal(format!("the grammar could not be compiled: {e}"));
        let _place = self.place()?;
        let _turn = self.turns.acquire().await.map_err(|e| gone(&e))?;
        let backend = Arc::clone(backend);
        let work = move || backend.constraints().compile(&grammar);
        tokio::task::spawn_blocking(work).await.map_err(|e| gone(&e))
    }

    fn place(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        let full = |_| ApiError::busy(format!("{WAITING_MAX} grammars wait to be compiled"), RETRY_AFTER_MS);
        self.places.try_acquire().map_err(full)
    }
}

/// What a grammar that cannot be used is to the client.
pub(crate) fn refused(error: &ConstraintError, param: &str) -> ApiError {
    let message = format!("`{param}`: {error}");
    match error {
        ConstraintError::Vocabulary(_) => ApiError::bad_request("unsupported_field", message).about(param),
        _ => ApiError::bad_request("invalid_json_schema", message).about(param),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    #[test]
    fn requests_that_wait_for_the_compiler_are_bounded() {
        let turns = Turns::default();
        let taken: Vec<_> = (0..COMPILING_MAX + WAITING_MAX).map(|_| turns.place()).collect();
        assert!(taken.iter().all(Result::is_ok));
        let Err(refused) = turns.place() else { panic!("no place is left") };
        assert_eq!((refused.status, refused.retry_after_ms), (StatusCode::TOO_MANY_REQUESTS, Some(RETRY_AFTER_MS)));
        drop(taken);
        assert!(turns.place().is_ok());
    }
}

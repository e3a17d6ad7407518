//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::Api;
use super::answer_fields::MODEL_NAME_BYTES_MAX;
use super::completion_fields::take_prompts;
use super::endpoints::{limits, resolve};
use super::error::{ApiError, Params};
use super::fields::Fields;
use super::prompt;
use crate::request::Mode;

/// Most texts of one request.
pub(crate) const INPUTS_MAX: usize = 256;

/// How the numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// As a list.
    Float,
    /// As base64 of little-endian 32-bit floats.
    Base64,
}

/// The handler. Texts are embedded one after the other.
pub(crate) async fn embeddings(State(api): State<Arc<Api>>, request: Request) -> Result<Json<Value>, ApiError> {
    let limits = limits(api.backend.as_ref())?;
    let body = api.heavy.read_json(request).await?;
    let (mut fields, weight) = body.parse(&api.heavy, Fields::from_body).await?;
    fields.ignore(&["user"]);
    let model = fields.string("model")?;
    if model.as_ref().is_some_and(|name| name.len() > MODEL_NAME_BYTES_MAX) {
        return Err(ApiError::invalid("model", format!("`model` is longer than {MODEL_NAME_BYTES_MAX} bytes")));
    }
    let encoding = match fields.choice("encoding_format", &["float", "base64"])? {
        Some("base64") => Encoding::Base64,
        _ => Encoding::Float,
    };
    let dimensions = fields.integer("dimensions", 1..=i64::from(i32::MAX))?;
    let inputs = take_prompts(&mut fields, "input", INPUTS_MAX, &limits)?;
    fields.finish()?;
    let target = resolve(&api, model.as_deref())?;
    if let Some(mode @ (Mode::Exact | Mode::Cloud)) = target.mode {
        let message = format!("`model`: embeddings are the device's own; mode `{}` has none", mode.name());
        return Err(ApiError::bad_request("unsupported_field", message).about("model"));
    }
    let renamed = |error: ApiError| error.renamed(&[("prompt", "input")]);
    let inputs = prompt::may_fit_all(&api, inputs).await.map_err(renamed)?;
    let texts = prompt::of_texts(&api, inputs).await.map_err(renamed)?;
    drop(weight);
    let mut data = Vec::with_capacity(texts.len());
    let mut tokens = 0;
    for (index, text) in texts.into_iter().enumerate() {
        tokens += text.len();
        let params = Params { prompt: "input", grammar: "input" };
        let values = api.backend.embed(text).await.map_err(|e| ApiError::from_generation(&e, params))?;
        if let Some(wanted) = dimensions
            && wanted != values.len() as i64
        {
            let message = format!(
                "`dimensions`: this model's embeddings have {}; cutting them is not supported, remove the field",
                values.len()
            );
            return Err(ApiError::bad_request("unsupported_field", message).about("dimensions"));
        }
        data.push(json!({ "object": "embedding", "index": index, "embedding": encoding.write(&values) }));
    }
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    Ok(Json(json!({ "object": "list", "data": data, "model": target.name, "usage": usage })))
}

impl Encoding {
    fn write(self, values: &[f32]) -> Value {
        match self {
            Self::Float => json!(values),
            Self::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                STANDARD.encode(bytes).into()
            }
        }
    }
}

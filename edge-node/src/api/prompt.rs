//! Prompts become token ids; long ones off the async threads.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tandem_engine::EngineError;

use super::backend::Backend;
use super::call_syntax::Past;
use super::completion_fields::Prompt;
use super::error::ApiError;
use super::messages::{ChatMessage, Role, one_call_each};
use super::thoughts::ThoughtTags;
use super::untaught;

/// Text from this length on is tokenized on a blocking thread, bytes.
const INLINE_BYTES_MAX: usize = 8 * 1024;

/// Says that a system message is not in the prompt.
pub(crate) const SYSTEM_IGNORED: &str = "the model's chat template leaves system messages out";

/// Says that the tools are not in the prompt.
pub(crate) const TOOLS_UNTOLD: &str =
    "the model's chat template knows neither tools nor system messages: the tools are not described to the model";

/// What a model is told of tools.
pub(crate) struct Told {
    /// The descriptions, as the template takes them; none if there are no tools to be told of.
    pub(crate) tools: Option<Value>,
    /// The descriptions as a text, for a template that knows no tools.
    pub(crate) text: Option<String>,
    /// The template knows tools, calls and results.
    pub(crate) in_template: bool,
    /// What the template wants to see of earlier turns.
    pub(crate) past: Past,
}

/// A conversation as the model gets it.
pub(crate) struct ChatPrompt {
    pub(crate) ids: Vec<u32>,
    /// What the template left out, if it did.
    pub(crate) notice: Option<&'static str>,
    /// The prompt ends inside the tags of the model's reasoning.
    pub(crate) thinks: bool,
}

/// The prompt of a conversation. `variables` are the request's own for the template.
pub(crate) async fn of_chat(
    backend: &Arc<dyn Backend>,
    messages: Vec<ChatMessage>,
    told: Told,
    variables: Map<String, Value>,
) -> Result<ChatPrompt, ApiError> {
    // Some templates know histories of calls and no descriptions of tools.
    let template = backend.chat_template();
    let shows_calls = told.in_template || template.takes_calls() && template.takes_results();
    let messages = match &told {
        _ if !shows_calls => untaught::without_calls(messages),
        Told { past: Past { one_call_each: true, .. }, .. } => one_call_each(messages),
        _ => messages,
    };
    let tools = told.tools.as_ref().map_or(0, |tools| tools.to_string().len());
    let text = told.text.as_ref().map_or(0, String::len);
    let bytes = tools + text + messages.iter().map(ChatMessage::bytes).sum::<usize>();
    on_right_thread(backend, bytes, move |backend| {
        let now_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let render = |messages: &[ChatMessage]| {
            let called =
                |id: &str| messages.iter().flat_map(|m| &m.calls).find(|c| c.id == id).map(|c| c.name.as_str());
            let turns: Value =
                messages.iter().map(|m| m.for_template(told.past, m.answers.as_deref().and_then(called))).collect();
            backend.chat_template().render_json(&turns, told.tools.as_ref(), &variables, true, now_unix_s)
        };
        // What the template shows of a system text is seen by trying.
        let taught = told.text.as_ref().and_then(|tools| {
            let text = render(&untaught::with_tools(&messages, tools)).ok()?;
            text.contains(tools.trim()).then_some(text)
        });
        let untold = told.text.is_some() && taught.is_none();
        let text = match taught {
            Some(text) => text,
            None => render(&messages).map_err(|error| {
                ApiError::invalid("messages", format!("the model's chat template refuses it: {error}"))
            })?,
        };
        let left_out = |message: &ChatMessage| message.role == Role::System && !text.contains(message.content.trim());
        let notice = if messages.iter().any(left_out) { Some(SYSTEM_IGNORED) } else { untold.then_some(TOOLS_UNTOLD) };
        let thinks = ThoughtTags::of_template(backend.chat_template().source()).are_open_after(&text);
        let ids = backend.tokenizer().encode(&text).map_err(|error| untokenizable("messages", &error))?;
        Ok(ChatPrompt { ids, notice, thinks })
    })
    .await
}

/// The token ids of text prompts.
pub(crate) async fn of_texts(backend: &Arc<dyn Backend>, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, ApiError> {
    let length = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    let bytes = prompts.iter().map(length).sum();
    on_right_thread(backend, bytes, move |backend| {
        let one = |prompt| match prompt {
            Prompt::Text(text) => {
                backend.tokenizer().encode_whole(&text).map_err(|error| untokenizable("prompt", &error))
            }
            Prompt::Tokens(tokens) => Ok(tokens),
        };
        prompts.into_iter().map(one).collect()
    })
    .await
}

/// The token ids of a text; `special`: with the tokens that a prompt begins with.
pub(crate) async fn of_text(backend: &Arc<dyn Backend>, text: String, special: bool) -> Result<Vec<u32>, ApiError> {
    on_right_thread(backend, text.len(), move |backend| {
        let tokenizer = backend.tokenizer();
        let ids = if special { tokenizer.encode_whole(&text) } else { tokenizer.encode(&text) };
        ids.map_err(|error| untokenizable("prompt", &error))
    })
    .await
}

/// The text of token ids, special tokens as they are spelt.
pub(crate) async fn text_of(backend: &Arc<dyn Backend>, tokens: Vec<u32>) -> Result<String, ApiError> {
    on_right_thread(backend, tokens.len() * size_of::<u32>(), move |backend| {
        let tokenizer = backend.tokenizer();
        let mut text = String::new();
        for run in tokens.chunk_by(|a, b| tokenizer.is_special(*a) == tokenizer.is_special(*b)) {
            if tokenizer.is_special(run[0]) {
                text.extend(run.iter().filter_map(|id| tokenizer.token(*id)));
            } else {
                let error = |e| ApiError::invalid("tokens", format!("`tokens`: they have no text: {e}"));
                text.push_str(&tokenizer.decode(run).map_err(error)?);
            }
        }
        Ok(text)
    })
    .await
}

fn untokenizable(param: &str, error: &EngineError) -> ApiError {
    ApiError::invalid(param, format!("the text cannot be tokenized: {error}"))
}

async fn on_right_thread<T: Send + 'static>(
    backend: &Arc<dyn Backend>,
    bytes: usize,
    work: impl FnOnce(&dyn Backend) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_BYTES_MAX {
        return work(backend.as_ref());
    }
    let backend = Arc::clone(backend);
    match tokio::task::spawn_blocking(move || work(backend.as_ref())).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the tokenizer failed: {error}"))),
    }
}

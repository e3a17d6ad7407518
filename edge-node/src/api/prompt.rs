//! Prompts become text and token ids, unless they are too long to be prompts; long ones off the async
//! threads.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tandem_engine::EngineError;

use super::Api;
use super::backend::Backend;
use super::call_syntax::Past;
use super::completion_fields::Prompt;
use super::error::ApiError;
use super::messages::{ChatMessage, Role, one_call_each};
use super::thoughts::ThoughtTags;
use super::untaught;

/// Longest text whose tokens are told although they are more than the context holds, bytes.
const COUNTED_BYTES_MAX: usize = 64 * 1024;

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

/// The prompt of a conversation as text.
pub(crate) struct ChatText {
    text: String,
    /// What the template left out, if it did.
    pub(crate) notice: Option<&'static str>,
    /// The prompt ends inside the tags of the model's reasoning.
    pub(crate) thinks: bool,
    /// Field that holds the conversation.
    param: &'static str,
}

/// Renders the prompt of a conversation, unless it is longer than any prompt. `variables` are the request's
/// own for the template.
pub(crate) async fn of_chat(
    api: &Api,
    messages: Vec<ChatMessage>,
    told: Told,
    variables: Map<String, Value>,
    param: &'static str,
) -> Result<ChatText, ApiError> {
    // Some templates know histories of calls and no descriptions of tools.
    let template = api.backend.chat_template();
    let shows_calls = told.in_template || template.takes_calls() && template.takes_results();
    let messages = match &told {
        _ if !shows_calls => untaught::without_calls(messages),
        Told { past: Past { one_call_each: true, .. }, .. } => one_call_each(messages),
        _ => messages,
    };
    let tools = told.tools.as_ref().map_or(0, |tools| tools.to_string().len());
    let text = told.text.as_ref().map_or(0, String::len);
    let bytes = tools + text + messages.iter().map(ChatMessage::bytes).sum::<usize>();
    let backend = Arc::clone(&api.backend);
    let work = move || {
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
            None => render(&messages)
                .map_err(|error| ApiError::invalid(param, format!("the model's chat template refuses it: {error}")))?,
        };
        let left_out = |message: &ChatMessage| message.role == Role::System && !text.contains(message.content.trim());
        let notice = if messages.iter().any(left_out) { Some(SYSTEM_IGNORED) } else { untold.then_some(TOOLS_UNTOLD) };
        let thinks = ThoughtTags::of_template(backend.chat_template().source()).are_open_after(&text);
        may_fit(backend.as_ref(), &text, param)?;
        Ok(ChatText { text, notice, thinks, param })
    };
    api.heavy.work(bytes, work).await
}

impl ChatText {
    /// Its length, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.text.len()
    }

    /// Its token ids. For a request that was admitted: this is most of the work of reading it.
    pub(crate) async fn tokenize(self, api: &Api) -> Result<Vec<u32>, ApiError> {
        let (bytes, backend) = (self.bytes(), Arc::clone(&api.backend));
        let tokenize =
            move || backend.tokenizer().encode(&self.text).map_err(|error| untokenizable(self.param, &error));
        api.heavy.work(bytes, tokenize).await
    }
}

/// Checks that text prompts may fit.
pub(crate) async fn may_fit_all(api: &Api, prompts: Vec<Prompt>) -> Result<Vec<Prompt>, ApiError> {
    let (bytes, backend) = (bytes(&prompts), Arc::clone(&api.backend));
    let check = move || {
        for prompt in &prompts {
            if let Prompt::Text(text) = prompt {
                may_fit(backend.as_ref(), text, "prompt")?;
            }
        }
        Ok(prompts)
    };
    api.heavy.work(bytes, check).await
}

/// The token ids of text prompts. For a request that was admitted.
pub(crate) async fn of_texts(api: &Api, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, ApiError> {
    let (bytes, backend) = (bytes(&prompts), Arc::clone(&api.backend));
    let tokenize = move || {
        let one = |prompt| match prompt {
            Prompt::Text(text) => {
                backend.tokenizer().encode_whole(&text).map_err(|error| untokenizable("prompt", &error))
            }
            Prompt::Tokens(tokens) => Ok(tokens),
        };
        prompts.into_iter().map(one).collect()
    };
    api.heavy.work(bytes, tokenize).await
}

/// Bytes of text in prompts.
pub(crate) fn bytes(prompts: &[Prompt]) -> usize {
    let length = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    prompts.iter().map(length).sum()
}

/// Refuses a text that is more tokens than the context holds however it is split: to tokenize it takes a
/// hundred times its bytes.
fn may_fit(backend: &dyn Backend, text: &str, param: &'static str) -> Result<(), ApiError> {
    let (least, context) = (backend.tokenizer().tokens_min(text), backend.context_tokens());
    if least < context {
        return Ok(());
    }
    let message =
        format!("the prompt has more than {least} tokens, the model's context is {context}; shorten the prompt");
    Err(ApiError::bad_request("context_length_exceeded", message).about(param))
}

/// The token ids of a text that is no prompt; `special`: with the tokens that a prompt begins with.
pub(crate) async fn of_text(api: &Api, text: String, special: bool) -> Result<Vec<u32>, ApiError> {
    let (bytes, backend) = (text.len(), Arc::clone(&api.backend));
    let tokenize = move || {
        if bytes > COUNTED_BYTES_MAX {
            may_fit(backend.as_ref(), &text, "prompt")?;
        }
        let tokenizer = backend.tokenizer();
        let ids = if special { tokenizer.encode_whole(&text) } else { tokenizer.encode(&text) };
        ids.map_err(|error| untokenizable("prompt", &error))
    };
    api.heavy.work(bytes, tokenize).await
}

/// The text of token ids, special tokens as they are spelt.
pub(crate) async fn text_of(api: &Api, tokens: Vec<u32>) -> Result<String, ApiError> {
    let (bytes, backend) = (tokens.len() * size_of::<u32>(), Arc::clone(&api.backend));
    let spell = move || {
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
    };
    api.heavy.work(bytes, spell).await
}

fn untokenizable(param: &str, error: &EngineError) -> ApiError {
    ApiError::invalid(param, format!("the text cannot be tokenized: {error}"))
}

//! Writes answers as response objects and as the events that build them up.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::items::{Conversation, Item, Spoken, text_part};
use super::store::{ResponseStore, Stored, response_id};
use crate::api::backend::Backend;
use crate::api::error::ApiError;
use crate::api::messages::ChatMessage;
use crate::api::pieces::WrittenToken;
use crate::api::reading::{Reading, Said};
use crate::api::reply::{Usage, call_id, chat_logprob, unix_s};
use crate::api::writer::{Ended, Frames, WholeChoice, Writer, encode};
use crate::request::FinishReason;

/// Status of what is under way.
const IN_PROGRESS: &str = "in_progress";
const COMPLETED: &str = "completed";
const INCOMPLETE: &str = "incomplete";
const FAILED: &str = "failed";

/// The writer of one answer.
pub(crate) struct ResponsesWriter {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) store: Arc<ResponseStore>,
    /// What the ids of the answer and its items end in.
    pub(crate) key: String,
    pub(crate) model: String,
    /// Fields of the request that the response object repeats.
    pub(crate) echo: Map<String, Value>,
    /// The conversation before the answer, if it is to be kept.
    pub(crate) kept: Option<Vec<ChatMessage>>,
    /// How the answer is read, for the ids of calls.
    pub(crate) reading: Option<Reading>,
    /// Log probabilities with this many alternatives.
    pub(crate) logprobs: Option<usize>,
    pub(crate) answer: Answer,
}

/// The answer as far as it has come.
#[derive(Debug)]
pub(crate) struct Answer {
    created_at: u64,
    status: &'static str,
    items: Vec<Item>,
    /// The last item is under way.
    open: bool,
    error: Value,
    usage: Option<Usage>,
    /// Number of the next event.
    sequence: u64,
}

impl Default for Answer {
    fn default() -> Self {
        let (error, usage) = (Value::Null, None);
        Self { created_at: unix_s(), status: IN_PROGRESS, items: Vec::new(), open: false, error, usage, sequence: 0 }
    }
}

impl ResponsesWriter {
    /// The response object.
    fn response(&self) -> Value {
        let Answer { created_at, status, items, error, usage, .. } = &self.answer;
        let incomplete = (*status == INCOMPLETE).then(|| json!({ "reason": "max_output_tokens" }));
        let mut response = json!({
            "id": response_id(&self.key),
            "object": "response",
            "created_at": created_at,
            "completed_at": (*status == COMPLETED).then(unix_s),
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": items.iter().map(|item| item.to_json(false)).collect::<Vec<_>>(),
            "usage": usage.as_ref().map(|usage| json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details":
                    { "cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0 },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": { "reasoning_tokens": usage.reasoning_tokens },
                "total_tokens": usage.total_tokens,
                "tandem": usage.tandem,
            })),
        });
        if let Some(response) = response.as_object_mut() {
            response.extend(self.echo.clone());
        }
        response
    }

    /// Queues an event with its number.
    fn emit(&mut self, event: &'static str, mut body: Value, out: &mut Frames) -> Result<(), ApiError> {
        body["type"] = event.into();
        body["sequence_number"] = self.answer.sequence.into();
        self.answer.sequence += 1;
        out.push_named(event, &body)
    }

    /// Queues an event about the last item's text or arguments.
    fn emit_part(&mut self, event: &'static str, name: &str, value: Value, out: &mut Frames) -> Result<(), ApiError> {
        let Some(item) = self.answer.items.last() else { return Ok(()) };
        let mut body = json!({ "item_id": item.id, "output_index": self.answer.items.len() - 1 });
        if !matches!(item.said, Spoken::Call { .. }) {
            body["content_index"] = 0.into();
        }
        body[name] = value;
        self.emit(event, body, out)
    }

    fn emit_item(&mut self, event: &'static str, empty: bool, out: &mut Frames) -> Result<(), ApiError> {
        let Some(item) = self.answer.items.last() else { return Ok(()) };
        let body = json!({ "output_index": self.answer.items.len() - 1, "item": item.to_json(empty) });
        self.emit(event, body, out)
    }

    fn open(&mut self, kind: &str, said: Spoken, out: &mut Frames) -> Result<(), ApiError> {
        self.finish_item(COMPLETED, out)?;
        let part = match &said {
            Spoken::Message { .. } => Some(text_part("", &[])),
            Spoken::Reasoning { .. } => Some(json!({ "type": "reasoning_text", "text": "" })),
            Spoken::Call { .. } => None,
        };
        let id = format!("{kind}_{}_{}", self.key, self.answer.items.len());
        self.answer.items.push(Item { id, status: IN_PROGRESS, said });
        self.answer.open = true;
        self.emit_item("response.output_item.added", true, out)?;
        part.map_or(Ok(()), |part| self.emit_part("response.content_part.added", "part", part, out))
    }

    /// Ends the item under way.
    fn finish_item(&mut self, status: &'static str, out: &mut Frames) -> Result<(), ApiError> {
        if !std::mem::take(&mut self.answer.open) {
            return Ok(());
        }
        let Some(item) = self.answer.items.last_mut() else { return Ok(()) };
        item.status = status;
        let part = item.part();
        match item.said.clone() {
            Spoken::Message { text, logprobs } => {
                let mut body = json!({ "item_id": item.id, "output_index": self.answer.items.len() - 1 });
                body["content_index"] = 0.into();
                body["text"] = text.into();
                body["logprobs"] = logprobs.into();
                self.emit("response.output_text.done", body, out)?;
            }
            Spoken::Reasoning { text } => {
                self.emit_part("response.reasoning_text.done", "text", text.into(), out)?;
            }
            Spoken::Call { name, arguments, .. } => {
                let body = json!({
                    "item_id": item.id, "output_index": self.answer.items.len() - 1, "name": name, "arguments": arguments,
                });
                self.emit("response.function_call_arguments.done", body, out)?;
            }
        }
        if !part.is_null() {
            self.emit_part("response.content_part.done", "part", part, out)?;
        }
        self.emit_item("response.output_item.done", false, out)
    }

    /// The last item's words, if it is under way.
    fn current(&mut self) -> Option<&mut Spoken> {
        if !self.answer.open {
            return None;
        }
        self.answer.items.last_mut().map(|item| &mut item.said)
    }

    fn say_content(&mut self, more: &str, scores: &[Value], out: &mut Frames) -> Result<(), ApiError> {
        if !matches!(self.current(), Some(Spoken::Message { .. })) {
            self.open("msg", Spoken::Message { text: String::new(), logprobs: Vec::new() }, out)?;
        }
        let Some(Spoken::Message { text, logprobs }) = self.current() else { return Ok(()) };
        text.push_str(more);
        logprobs.extend_from_slice(scores);
        let body = json!({
            "item_id": self.answer.items.last().map(|item| item.id.as_str()),
            "output_index": self.answer.items.len() - 1,
            "content_index": 0,
            "delta": more,
            "logprobs": scores,
        });
        self.emit("response.output_text.delta", body, out)
    }

    /// Takes all that is said in the order it is said.
    fn take(&mut self, said: Vec<Said>, tokens: &[WrittenToken], out: &mut Frames) -> Result<(), ApiError> {
        let score = |token: &WrittenToken| {
            let top = self.logprobs?;
            serde_json::to_value(chat_logprob(&token.event, top, self.backend.tokenizer())).ok()
        };
        let mut scores: Vec<Value> = tokens.iter().filter_map(score).collect();
        for what in said {
            match what {
                Said::Content(text) if text.is_empty() && scores.is_empty() => {}
                Said::Content(text) => self.say_content(&text, &std::mem::take(&mut scores), out)?,
                Said::Reasoning(more) => {
                    if !matches!(self.current(), Some(Spoken::Reasoning { .. })) {
                        self.open("rs", Spoken::Reasoning { text: String::new() }, out)?;
                    }
                    if let Some(Spoken::Reasoning { text }) = self.current() {
                        text.push_str(&more);
                    }
                    self.emit_part("response.reasoning_text.delta", "delta", more.into(), out)?;
                }
                Said::Call { name, .. } => {
                    let call_id = call_id(self.reading.as_ref());
                    self.open("fc", Spoken::Call { call_id, name, arguments: String::new() }, out)?;
                }
                // Calls come one after the other: these are the last one's.
                Said::Arguments { text, .. } => {
                    if let Some(Spoken::Call { arguments, .. }) = self.current() {
                        arguments.push_str(&text);
                        self.emit_part("response.function_call_arguments.delta", "delta", text.into(), out)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn keep(&mut self, response: &Value) -> Result<(), ApiError> {
        let Some(before) = self.kept.take() else { return Ok(()) };
        let mut conversation = Conversation::after(before);
        self.answer.items.iter().for_each(|item| conversation.add(item));
        let (messages, output) = (conversation.into_messages(), self.answer.items.clone());
        self.store.put(&response_id(&self.key), Stored { messages, output, response: encode(response)? });
        Ok(())
    }
}

impl Writer for ResponsesWriter {
    fn begin(&mut self, _: usize, _: &Usage, out: &mut Frames) -> Result<(), ApiError> {
        for event in ["response.created", "response.in_progress"] {
            let body = json!({ "response": self.response() });
            self.emit(event, body, out)?;
        }
        Ok(())
    }

    fn say(&mut self, _: usize, said: Vec<Said>, tokens: &[WrittenToken], out: &mut Frames) -> Result<(), ApiError> {
        self.take(said, tokens, out)
    }

    fn end(&mut self, _: usize, ended: Ended, out: &mut Frames) -> Result<(), ApiError> {
        if self.answer.items.is_empty() {
            self.say_content("", &[], out)?;
        }
        self.answer.status = match ended.finish {
            FinishReason::Stop => COMPLETED,
            FinishReason::Length => INCOMPLETE,
        };
        self.finish_item(self.answer.status, out)
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) -> Result<(), ApiError> {
        self.answer.usage = Some(usage);
        let response = self.response();
        self.keep(&response)?;
        let event = if self.answer.status == INCOMPLETE { "response.incomplete" } else { "response.completed" };
        self.emit(event, json!({ "response": response }), out)
    }

    fn fail(&mut self, error: &ApiError, out: &mut Frames) {
        let code = match error.status.as_u16() {
            429 => "rate_limit_exceeded",
            400 => "invalid_prompt",
            _ => "server_error",
        };
        self.answer.status = FAILED;
        self.answer.error = json!({ "code": code, "message": error.message });
        let event = json!({ "code": error.code, "message": error.message, "param": error.param });
        let response = self.response();
        // What cannot be encoded was encoded before, or there is nothing left to say.
        let _ = self.emit("error", event, out);
        let _ = self.emit("response.failed", json!({ "response": response }), out);
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> Result<Vec<u8>, ApiError> {
        let mut unsent = Frames::default();
        for (i, WholeChoice { said, tokens, ended }) in choices.into_iter().enumerate() {
            self.say(i, said, &tokens, &mut unsent)?;
            self.end(i, ended, &mut unsent)?;
        }
        self.answer.usage = Some(usage);
        let response = self.response();
        self.keep(&response)?;
        encode(&response)
    }
}

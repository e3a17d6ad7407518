//! Writes answers as messages and as the events that build them up.

use axum::response::sse::Event as SseEvent;
use serde_json::{Value, json};

use super::errors;
use crate::api::error::ApiError;
use crate::api::pieces::WrittenToken;
use crate::api::reading::{Reading, Said};
use crate::api::reply::{Usage, call_id};
use crate::api::respond::Plan;
use crate::api::writer::{Ended, Frames, WholeChoice, Writer, encode};
use crate::request::FinishReason;

/// The writer of one answer.
pub(super) struct MessagesWriter {
    id: String,
    model: String,
    /// How the answer is read, for the ids of calls.
    reading: Option<Reading>,
    hide_thinking: bool,
    blocks: Vec<Block>,
    /// The last block is under way.
    open: bool,
    stop_reason: &'static str,
    stop_sequence: Option<String>,
}

#[derive(Debug)]
enum Block {
    Text(String),
    Thinking(String),
    ToolUse { id: String, name: String, input: String },
}

impl Block {
    fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => json!({ "type": "text", "text": text }),
            // Nothing here signs what a model thinks; the field must be there.
            Self::Thinking(text) => json!({ "type": "thinking", "thinking": text, "signature": "" }),
            Self::ToolUse { id, name, input } => {
                // What was cut short is no input.
                let input: Value = serde_json::from_str(input).ok().filter(Value::is_object).unwrap_or(json!({}));
                json!({ "type": "tool_use", "id": id, "name": name, "input": input })
            }
        }
    }
}

impl MessagesWriter {
    /// For the answer to a plan.
    pub(super) fn new(plan: &Plan, hide_thinking: bool) -> Self {
        Self {
            id: format!("msg_{}", plan.request_id.as_str()),
            model: plan.target.name.clone(),
            reading: plan.reading.clone(),
            hide_thinking,
            blocks: Vec::new(),
            open: false,
            stop_reason: "end_turn",
            stop_sequence: None,
        }
    }

    fn message(&self, stop_reason: Option<&str>, usage: &Usage) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self.blocks.iter().map(Block::to_json).collect::<Vec<_>>(),
            "stop_reason": stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": usage_body(usage),
        })
    }

    fn stop_block(&mut self, out: &mut Frames) -> Result<(), ApiError> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        if let Some(Block::Thinking(_)) = self.blocks.last() {
            self.delta(&json!({ "type": "signature_delta", "signature": "" }), out)?;
        }
        let event = "content_block_stop";
        out.push_named(event, &json!({ "type": event, "index": self.blocks.len() - 1 }))
    }

    fn start_block(&mut self, block: Block, out: &mut Frames) -> Result<(), ApiError> {
        self.stop_block(out)?;
        self.open = true;
        let event = "content_block_start";
        let body = json!({ "type": event, "index": self.blocks.len(), "content_block": block.to_json() });
        self.blocks.push(block);
        out.push_named(event, &body)
    }

    fn delta(&self, delta: &Value, out: &mut Frames) -> Result<(), ApiError> {
        let event = "content_block_delta";
        out.push_named(event, &json!({ "type": event, "index": self.blocks.len() - 1, "delta": delta }))
    }

    /// The last block, if it is under way.
    fn current(&mut self) -> Option<&mut Block> {
        if self.open { self.blocks.last_mut() } else { None }
    }

    fn take(&mut self, said: Vec<Said>, out: &mut Frames) -> Result<(), ApiError> {
        for what in said {
            match what {
                Said::Content(more) if more.is_empty() => {}
                Said::Content(more) => {
                    if !matches!(self.current(), Some(Block::Text(_))) {
                        self.start_block(Block::Text(String::new()), out)?;
                    }
                    if let Some(Block::Text(text)) = self.current() {
                        text.push_str(&more);
                    }
                    self.delta(&json!({ "type": "text_delta", "text": more }), out)?;
                }
                Said::Reasoning(_) if self.hide_thinking => {}
                Said::Reasoning(more) => {
                    if !matches!(self.current(), Some(Block::Thinking(_))) {
                        self.start_block(Block::Thinking(String::new()), out)?;
                    }
                    if let Some(Block::Thinking(text)) = self.current() {
                        text.push_str(&more);
                    }
                    self.delta(&json!({ "type": "thinking_delta", "thinking": more }), out)?;
                }
                Said::Call { name, .. } => {
                    let id = call_id(self.reading.as_ref());
                    self.start_block(Block::ToolUse { id, name, input: String::new() }, out)?;
                }
                // Calls come one after the other: these are the last one's.
                Said::Arguments { text, .. } => {
                    if let Some(Block::ToolUse { input, .. }) = self.current() {
                        input.push_str(&text);
                        self.delta(&json!({ "type": "input_json_delta", "partial_json": text }), out)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn usage_body(usage: &Usage) -> Value {
    json!({
        // Without those read from the cache, as Anthropic counts.
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.prompt_tokens_details.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.prompt_tokens_details.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "tandem": usage.tandem,
    })
}

impl Writer for MessagesWriter {
    fn begin(&mut self, _: usize, usage: &Usage, out: &mut Frames) -> Result<(), ApiError> {
        let message = self.message(None, usage);
        out.push_named("message_start", &json!({ "type": "message_start", "message": message }))?;
        out.push_named("ping", &json!({ "type": "ping" }))
    }

    fn say(&mut self, _: usize, said: Vec<Said>, _: &[WrittenToken], out: &mut Frames) -> Result<(), ApiError> {
        self.take(said, out)
    }

    fn end(&mut self, _: usize, ended: Ended, out: &mut Frames) -> Result<(), ApiError> {
        if self.blocks.is_empty() {
            self.start_block(Block::Text(String::new()), out)?;
        }
        self.stop_block(out)?;
        self.stop_reason = match ended.finish {
            FinishReason::Length => "max_tokens",
            FinishReason::Stop if ended.stop.is_some() => "stop_sequence",
            FinishReason::Stop if ended.called => "tool_use",
            FinishReason::Stop => "end_turn",
        };
        self.stop_sequence = ended.stop;
        Ok(())
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) -> Result<(), ApiError> {
        let body = json!({
            "type": "message_delta",
            "delta": { "stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence },
            "usage": usage_body(&usage),
        });
        out.push_named("message_delta", &body)?;
        out.push_named("message_stop", &json!({ "type": "message_stop" }))
    }

    fn fail(&mut self, error: &ApiError, out: &mut Frames) {
        // JSON values can always be encoded.
        let _ = out.push_named("error", &errors::shape(error));
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> Result<Vec<u8>, ApiError> {
        let mut unsent = Frames::default();
        for (i, WholeChoice { said, ended, .. }) in choices.into_iter().enumerate() {
            self.take(said, &mut unsent)?;
            self.end(i, ended, &mut unsent)?;
        }
        encode(&self.message(Some(self.stop_reason), &usage))
    }

    fn keep_alive(&self) -> Option<SseEvent> {
        Some(SseEvent::default().event("ping").data(json!({ "type": "ping" }).to_string()))
    }
}

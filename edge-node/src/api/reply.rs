//! Bodies of answers, whole and in chunks, for both kinds of completion.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::Alternative;

use super::answer_fields::StreamOptions;
use super::echo::{Echoed, EchoedToken};
use super::pieces::WrittenToken;
use super::reading::{Reading, Said};
use super::request_id::random_u64;
use super::respond::Plan;
use crate::request::{FinishReason, RouteSummary, TokenEvent};

/// Stands for log probabilities that JSON cannot hold, as at OpenAI.
const LOGPROB_MIN: f32 = -9999.0;

/// Names build and hence numerics: equal seeds give equal text while it is equal.
const FINGERPRINT: &str = concat!("tandem-", env!("CARGO_PKG_VERSION"));

/// Which endpoint's bodies to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// What all bodies of one answer share.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Log probabilities with this many alternatives.
    pub(crate) logprobs: Option<usize>,
    /// Report origin and scores of each token.
    pub(crate) tokens: bool,
    pub(crate) stream_options: StreamOptions,
    /// How the answer is read, if it may be more than text.
    pub(crate) reading: Option<Reading>,
    /// The one call of an answer is a `function_call`.
    pub(crate) legacy: bool,
    /// Prompts that come before their answers, if they do.
    pub(crate) echoed: Vec<Echoed>,
    /// Choices per prompt.
    pub(crate) n: usize,
}

/// A whole answer or one chunk of it.
#[derive(Debug, Serialize)]
pub(crate) struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Vec<Choice>,
    /// Absent, `null` (chunks before the usage chunk) or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    /// What the choice that ends in this chunk took.
    #[serde(skip_serializing_if = "Option::is_none")]
    tandem: Option<RouteSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    obfuscation: Option<String>,
}

/// Tokens and what they took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) total_tokens: u64,
    pub(crate) prompt_tokens_details: PromptTokens,
    /// Tokens of the completion that are reasoning and nothing else.
    #[serde(skip)]
    pub(crate) reasoning_tokens: u64,
    pub(crate) tandem: RouteSummary,
}

/// What became of the tokens of the prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct PromptTokens {
    /// Tokens whose state was held from earlier requests.
    pub(crate) cached_tokens: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Choice {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tandem: Option<Tokens>,
}

#[derive(Debug, Serialize)]
struct Message {
    role: &'static str,
    /// `null` in an answer that is calls only.
    content: Option<String>,
    refusal: Option<String>,
    /// What the model said to itself before, under the name that DeepSeek's and vLLM's clients know.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WholeCall>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<WholeFunction>,
}

#[derive(Debug, Serialize)]
struct WholeCall {
    id: String,
    r#type: &'static str,
    function: WholeFunction,
}

#[derive(Debug, Serialize)]
struct WholeFunction {
    name: String,
    arguments: String,
}

#[derive(Debug, Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<FunctionDelta>,
}

/// The beginning of a call, or more of its arguments.
#[derive(Debug, Serialize)]
struct CallDelta {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta,
}

#[derive(Debug, Serialize)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

#[derive(Debug, Serialize)]
struct Tokens {
    tokens: Vec<Token>,
}

#[derive(Debug, Serialize)]
struct Token {
    text: String,
    #[serde(flatten)]
    event: TokenEvent,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Logprobs {
    Chat { content: Vec<ChatLogprob>, refusal: Option<Vec<ChatLogprob>> },
    Text(TextLogprobs),
}

/// A token's log probability with those of alternatives.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprob {
    #[serde(flatten)]
    candidate: Candidate,
    top_logprobs: Vec<Candidate>,
}

#[derive(Debug, Serialize)]
struct Candidate {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

#[derive(Debug, Default, Serialize)]
struct TextLogprobs {
    tokens: Vec<String>,
    /// The first token of a prompt has none.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    /// Characters of the text before each token.
    text_offset: Vec<usize>,
}

/// Alternatives as an object; the order of its keys is that of the probabilities.
#[derive(Debug, Default)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl Shape {
    /// For the answers to a plan.
    pub(crate) fn of(kind: Kind, plan: &Plan) -> Self {
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Text => "cmpl",
        };
        Self {
            kind,
            id: format!("{prefix}-{}", plan.request_id.as_str()),
            created: unix_s(),
            model: plan.target.name.clone(),
            logprobs: plan.logprobs.map(|top| top as usize),
            tokens: plan.fields.tokens,
            stream_options: if plan.fields.stream { plan.fields.stream_options } else { StreamOptions::default() },
            reading: plan.reading.clone(),
            legacy: plan.legacy,
            echoed: Vec::new(),
            n: plan.fields.n,
        }
    }

    /// The whole answer.
    pub(crate) fn whole(&self, choices: Vec<Choice>, usage: Usage) -> Body<'_> {
        Body { usage: Some(Some(usage)), ..self.body(self.object(false), choices) }
    }

    /// A choice of the whole answer.
    pub(crate) fn whole_choice(
        &self,
        index: usize,
        said: Vec<Said>,
        tokens: &[WrittenToken],
        finish: &'static str,
        tokenizer: &Tokenizer,
    ) -> Choice {
        let echoed = self.echoed(index);
        let mut choice = Choice { finish_reason: Some(finish), ..self.choice(index, tokens, tokenizer, echoed) };
        let (mut content, mut reasoning_content) = (String::new(), None::<String>);
        let mut tool_calls = Vec::<WholeCall>::new();
        for what in said {
            match what {
                Said::Content(text) => content.push_str(&text),
                Said::Reasoning(text) => reasoning_content.get_or_insert_default().push_str(&text),
                Said::Call { name, .. } => tool_calls.push(WholeCall {
                    id: call_id(self.reading.as_ref()),
                    r#type: "function",
                    function: WholeFunction { name, arguments: String::new() },
                }),
                Said::Arguments { index, text } => {
                    if let Some(call) = tool_calls.get_mut(index) {
                        call.function.arguments.push_str(&text);
                    }
                }
            }
        }
        match self.kind {
            Kind::Chat => {
                let content = (tool_calls.is_empty() || !content.is_empty()).then_some(content);
                let function_call =
                    self.legacy.then(|| tool_calls.drain(..).next()).flatten().map(|call| call.function);
                let role = "assistant";
                choice.message =
                    Some(Message { role, content, refusal: None, reasoning_content, tool_calls, function_call });
            }
            Kind::Text => {
                let echoed = self.echoed(index).map(|echoed| echoed.text.clone());
                choice.text = Some(echoed.unwrap_or_default() + &content);
            }
        }
        choice
    }

    /// First chunk of a choice; text completions have none.
    pub(crate) fn role_chunk(&self, index: usize) -> Option<Body<'_>> {
        (self.kind == Kind::Chat).then(|| {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            self.chunk(vec![Choice { delta: Some(delta), ..empty_choice(index) }])
        })
    }

    /// The prompt of a choice, if it comes before the answer.
    pub(crate) fn echo_chunk(&self, index: usize, tokenizer: &Tokenizer) -> Option<Body<'_>> {
        let echoed = self.echoed(index)?;
        let logprobs = self.logprobs.map(|top| Logprobs::Text(text_logprobs(Some(echoed), &[], top, tokenizer)));
        Some(self.chunk(vec![Choice { text: Some(echoed.text.clone()), logprobs, ..empty_choice(index) }]))
    }

    /// The prompt that comes before a choice, if it does.
    fn echoed(&self, index: usize) -> Option<&Echoed> {
        self.echoed.get(index / self.n)
    }

    /// Chunk with the next part of a choice.
    pub(crate) fn piece_chunk(
        &self,
        index: usize,
        said: Vec<Said>,
        tokens: &[WrittenToken],
        tokenizer: &Tokenizer,
    ) -> Body<'_> {
        let mut choice = self.choice(index, tokens, tokenizer, None);
        let mut delta = Delta::default();
        let bytes: usize = said.iter().map(Said::bytes).sum();
        for what in said {
            match what {
                Said::Content(text) => delta.content.get_or_insert_default().push_str(&text),
                Said::Reasoning(text) => delta.reasoning_content.get_or_insert_default().push_str(&text),
                Said::Call { index, .. } | Said::Arguments { index, .. } if self.legacy && index > 0 => {}
                Said::Call { name, .. } if self.legacy => {
                    delta.function_call = Some(FunctionDelta { name: Some(name), arguments: String::new() });
                }
                Said::Arguments { text, .. } if self.legacy => {
                    let call = FunctionDelta { name: None, arguments: String::new() };
                    delta.function_call.get_or_insert(call).arguments.push_str(&text);
                }
                Said::Call { index, name } => delta.tool_calls.push(CallDelta {
                    index,
                    id: Some(call_id(self.reading.as_ref())),
                    r#type: Some("function"),
                    function: FunctionDelta { name: Some(name), arguments: String::new() },
                }),
                Said::Arguments { index, text } => match delta.tool_calls.last_mut() {
                    Some(call) if call.index == index => call.function.arguments.push_str(&text),
                    _ => delta.tool_calls.push(CallDelta {
                        index,
                        id: None,
                        r#type: None,
                        function: FunctionDelta { name: None, arguments: text },
                    }),
                },
            }
        }
        match self.kind {
            Kind::Chat => choice.delta = Some(delta),
            Kind::Text => choice.text = Some(delta.content.unwrap_or_default()),
        }
        let obfuscation = self.stream_options.obfuscated.then(|| letters(PADDED_BYTES - bytes % PADDED_BYTES));
        Body { obfuscation, ..self.chunk(vec![choice]) }
    }

    /// Last chunk of a choice.
    pub(crate) fn finish_chunk(&self, index: usize, finish: &'static str, route: RouteSummary) -> Body<'_> {
        let mut choice = Choice { finish_reason: Some(finish), ..empty_choice(index) };
        match self.kind {
            Kind::Chat => choice.delta = Some(Delta::default()),
            Kind::Text => choice.text = Some(String::new()),
        }
        Body { tandem: Some(route), ..self.chunk(vec![choice]) }
    }

    /// The one chunk without choices.
    pub(crate) fn usage_chunk(&self, usage: Usage) -> Body<'_> {
        Body { usage: Some(Some(usage)), ..self.chunk(Vec::new()) }
    }

    /// True if a piece without text is worth a chunk.
    pub(crate) fn reports_tokens(&self) -> bool {
        self.tokens || self.logprobs.is_some()
    }

    fn object(&self, chunk: bool) -> &'static str {
        match (self.kind, chunk) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        }
    }

    fn chunk(&self, choices: Vec<Choice>) -> Body<'_> {
        self.body(self.object(true), choices)
    }

    fn body(&self, object: &'static str, choices: Vec<Choice>) -> Body<'_> {
        Body {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage: self.stream_options.include_usage.then_some(None),
            tandem: None,
            obfuscation: None,
        }
    }

    fn choice(&self, index: usize, tokens: &[WrittenToken], tokenizer: &Tokenizer, echoed: Option<&Echoed>) -> Choice {
        let logprobs = self.logprobs.map(|top| match self.kind {
            Kind::Chat => Logprobs::Chat {
                content: tokens.iter().map(|token| chat_logprob(&token.event, top, tokenizer)).collect(),
                refusal: None,
            },
            Kind::Text => {
                let mut report = text_logprobs(echoed, tokens, top, tokenizer);
                // In a stream the prompt has a chunk of its own.
                if echoed.is_none() {
                    let before = self.echoed(index).map_or(0, |echoed| echoed.chars);
                    report.text_offset.iter_mut().for_each(|offset| *offset += before);
                }
                Logprobs::Text(report)
            }
        });
        let report = |token: &WrittenToken| Token { text: token.text.clone(), event: token.event.clone() };
        let tandem = self.tokens.then(|| Tokens { tokens: tokens.iter().map(report).collect() });
        Choice { logprobs, tandem, ..empty_choice(index) }
    }
}

/// A fresh id for a call, in the form that the model's template takes back.
pub(crate) fn call_id(reading: Option<&Reading>) -> String {
    if reading.is_some_and(Reading::has_short_ids) { letters(9) } else { format!("call_{}", letters(12)) }
}

/// Seconds since the Unix epoch.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Body<'_> {
    /// With what the request has taken so far.
    pub(crate) fn with_usage(mut self, usage: Usage) -> Self {
        self.usage = Some(Some(usage));
        self
    }
}

/// Chunks are padded to a multiple of so many bytes of text.
const PADDED_BYTES: usize = 16;

/// Random letters and digits.
fn letters(n: usize) -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rest = 0;
    let mut letter = |i: usize| {
        // One number is enough for twelve.
        if i.is_multiple_of(12) {
            rest = random_u64();
        }
        let at = rest % LETTERS.len() as u64;
        rest /= LETTERS.len() as u64;
        char::from(LETTERS[at as usize])
    };
    (0..n).map(&mut letter).collect()
}

/// Why a choice ended, in the API's words.
pub(crate) fn finish_word(finish: FinishReason, called: bool, legacy: bool) -> &'static str {
    match finish {
        FinishReason::Stop if called && legacy => "function_call",
        FinishReason::Stop if called => "tool_calls",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn empty_choice(index: usize) -> Choice {
    Choice { index, message: None, delta: None, text: None, logprobs: None, finish_reason: None, tandem: None }
}

/// The log probability of a token.
pub(crate) fn chat_logprob(event: &TokenEvent, top: usize, tokenizer: &Tokenizer) -> ChatLogprob {
    let alternatives = event.alternatives.iter().take(top);
    ChatLogprob {
        candidate: candidate(event.id, event.logprob, tokenizer),
        top_logprobs: alternatives.map(|other| candidate(other.id, other.logprob, tokenizer)).collect(),
    }
}

fn candidate(id: u32, logprob: f32, tokenizer: &Tokenizer) -> Candidate {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    Candidate { token: token_name(&bytes), logprob: finite(logprob), bytes }
}

fn text_logprobs(echoed: Option<&Echoed>, tokens: &[WrittenToken], top: usize, tokenizer: &Tokenizer) -> TextLogprobs {
    let mut report = TextLogprobs::default();
    for EchoedToken { id, logprob, alternatives, chars_before } in echoed.iter().flat_map(|echoed| &echoed.tokens) {
        report.add(*id, *logprob, alternatives, *chars_before, top, tokenizer);
    }
    let before = echoed.map_or(0, |echoed| echoed.chars);
    for WrittenToken { event, chars_before, .. } in tokens {
        report.add(event.id, Some(event.logprob), &event.alternatives, before + chars_before, top, tokenizer);
    }
    report
}

impl TextLogprobs {
    fn add(
        &mut self,
        id: u32,
        logprob: Option<f32>,
        others: &[Alternative],
        chars_before: usize,
        top: usize,
        tokenizer: &Tokenizer,
    ) {
        let name = |id| token_name(&tokenizer.token_bytes(id).unwrap_or_default());
        let alternatives = logprob.map(|logprob| {
            let mut alternatives: Vec<(String, f32)> = Vec::with_capacity(top + 1);
            let others = others.iter().take(top).map(|other| (other.id, other.logprob));
            // As at OpenAI, the token itself is always among them.
            for (id, logprob) in others.chain([(id, logprob)]) {
                let name = name(id);
                if alternatives.iter().all(|(known, _)| *known != name) {
                    alternatives.push((name, finite(logprob)));
                }
            }
            TopLogprobs(alternatives)
        });
        self.tokens.push(name(id));
        self.token_logprobs.push(logprob.map(finite));
        self.top_logprobs.push(alternatives);
        self.text_offset.push(chars_before);
    }
}

/// A token's text; parts of a character as OpenAI writes them, `bytes:\xf0\x9f`.
fn token_name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}")),
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOGPROB_MIN }
}

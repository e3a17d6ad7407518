//! What the tools of a request come to with the model at hand: what the prompt says of them, how its
//! answers are read, and the grammar that forces a call.

use std::sync::Arc;

use tandem_engine::constraint::Compiled;

use super::Api;
use super::backend::Backend;
use super::call_syntax::{CallSyntax, GENERIC, Past};
use super::error::ApiError;
use super::grammar::{Format, SCHEMA_PARAM, refused};
use super::messages::ChatMessage;
use super::prompt::Told;
use super::reading::Reading;
use super::tools::{ToolChoice, Tools};

/// Says that the tools are not in the prompt.
pub(crate) const TOOLS_UNTOLD: &str =
    "the model's chat template knows no tools: the call's form is forced, the tools are not described to the model";

/// The tools of a request, matched with the model.
pub(crate) struct Tooling {
    tools: Option<Tools>,
    /// How the model writes calls, if the request allows any.
    syntax: Option<&'static CallSyntax>,
    /// The syntax of all the model's answers, if they have one.
    whole: Option<&'static CallSyntax>,
    /// The template writes the tools into the prompt.
    in_template: bool,
    past: Past,
}

impl Tooling {
    /// Checks that the model can do what is asked.
    pub(crate) fn of(backend: &dyn Backend, tools: Option<Tools>, messages: &[ChatMessage]) -> Result<Self, ApiError> {
        let template = backend.chat_template();
        let known = CallSyntax::of_template(template.source());
        let in_template = template.takes_tools();
        if let Some(i) = messages.iter().position(ChatMessage::needs_tools)
            && !in_template
        {
            let field = if messages[i].answers.is_some() { "role" } else { "tool_calls" };
            return Err(unsupported(
                &format!("messages[{i}].{field}"),
                "the model's chat template knows no tool messages",
            ));
        }
        let past = known.map_or(Past::default(), |s| s.past);
        let whole = known.filter(|s| s.is_of_whole_answers());
        let choice = tools.as_ref().map_or(&ToolChoice::None, |t| &t.choice);
        let syntax = match choice {
            ToolChoice::None => None,
            ToolChoice::Auto if !in_template => {
                return Err(unsupported(
                    "tools",
                    "the model's chat template knows no tools; with `tool_choice` `required` a call can be forced",
                ));
            }
            ToolChoice::Auto if known.is_none() => {
                return Err(unsupported(
                    "tools",
                    "how this model writes tool calls is not known here; with `tool_choice` `required` a call can be forced",
                ));
            }
            ToolChoice::Auto => known,
            ToolChoice::Required | ToolChoice::Named(_) => {
                // What cannot be forced in the model's own syntax can be as JSON.
                let callable = tools.as_ref().map(Tools::callable).unwrap_or_default();
                let forces = |s: &&CallSyntax| in_template && s.forces(backend.tokenizer(), &callable);
                Some(whole.or(known.filter(forces)).unwrap_or(&GENERIC))
            }
        };
        Ok(Self { tools, syntax, whole, in_template, past })
    }

    /// What the prompt is to say. Tools that must not be called are not mentioned.
    pub(crate) fn told(&self) -> Told {
        let tools = self.tools.as_ref().filter(|t| self.in_template && t.choice != ToolChoice::None);
        Told { tools: tools.map(|tools| tools.described(self.past.descriptions)), past: self.past }
    }

    /// For the client, if the model is not told of the tools it must call.
    pub(crate) fn notice(&self) -> Option<&'static str> {
        (self.syntax.is_some() && !self.in_template).then_some(TOOLS_UNTOLD)
    }

    /// How the answer is read, if it may be more than text.
    pub(crate) fn reading(&self) -> Option<Reading> {
        let tools = self.tools.as_ref().filter(|_| self.syntax.is_some()).map(Tools::callable).unwrap_or_default();
        let syntax = self.syntax.or(self.whole)?;
        Some(Reading { syntax, tools: tools.into_iter().cloned().collect() })
    }

    /// The field that a grammar comes from.
    pub(crate) fn grammar_param(&self) -> &'static str {
        if self.syntax.is_some() { "tools" } else { "response_format" }
    }

    /// The grammar of the answer: the format's, that of a forced call, or one of both where the model
    /// may choose.
    pub(crate) async fn grammar(&self, api: &Api, format: Option<&Format>) -> Result<Option<Arc<Compiled>>, ApiError> {
        let (Some(tools), Some(syntax)) = (&self.tools, self.syntax) else {
            let Some(format) = format else { return Ok(None) };
            let grammar = match self.whole {
                Some(syntax) => syntax
                    .grammar(api.backend.tokenizer(), &[], false, Some(&format.schema()))
                    .map_err(|e| refused(&e, SCHEMA_PARAM))?,
                None => format.grammar()?,
            };
            let compiled = api.turns.compile(&api.backend, grammar).await?;
            return compiled.map(Some).map_err(|e| refused(&e, SCHEMA_PARAM));
        };
        if !tools.forced() && format.is_none() {
            return Ok(None);
        }
        let instead = format.filter(|_| !tools.forced()).map(Format::schema);
        let several = tools.parallel && !matches!(tools.choice, ToolChoice::Named(_));
        let grammar = |which: &Tools, instead| {
            let tokenizer = api.backend.tokenizer();
            syntax.grammar(tokenizer, &which.callable(), several, instead).map_err(|e| refused(&e, "tools"))
        };
        let whole = match api.turns.compile(&api.backend, grammar(tools, instead.as_ref())?).await? {
            Ok(compiled) => return Ok(Some(compiled)),
            Err(e) => e,
        };
        // Which part of it is to blame?
        if let Some(format) = format.filter(|_| instead.is_some())
            && let Err(e) = api.turns.compile(&api.backend, format.grammar()?).await?
        {
            return Err(refused(&e, SCHEMA_PARAM));
        }
        for (i, tool) in tools.list.iter().enumerate() {
            let described = tools.described;
            let alone = Tools { list: vec![tool.clone()], choice: ToolChoice::Required, parallel: false, described };
            if let Err(e) = api.turns.compile(&api.backend, grammar(&alone, None)?).await? {
                return Err(refused(&e, &described.schema_path(i)));
            }
        }
        Err(refused(&whole, "tools"))
    }
}

fn unsupported(param: &str, why: &str) -> ApiError {
    ApiError::bad_request("unsupported_field", format!("`{param}`: {why}")).about(param)
}

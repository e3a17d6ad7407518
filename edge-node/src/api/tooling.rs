//! What the tools of a request come to with the model at hand: what the prompt says of them, how its
//! answers are read, and the grammar that forces a call.

use std::sync::Arc;

use serde_json::Value;
use tandem_engine::constraint::Compiled;

use super::Api;
use super::backend::Backend;
use super::call_syntax::{CallSyntax, GENERIC, Past};
use super::error::ApiError;
use super::grammar::{Format, SCHEMA_PARAM, refused};
use super::prompt::Told;
use super::reading::Reading;
use super::thoughts::ThoughtTags;
use super::tools::{ToolChoice, Tools};
use super::untaught;

/// Says that calls of the model's own accord are not found.
pub(crate) const CALLS_UNKNOWN: &str =
    "how this model writes tool calls is not known here: they may come as text; `tool_choice` `required` forces one";

/// The tools of a request, matched with the model.
pub(crate) struct Tooling {
    tools: Option<Tools>,
    /// How the model writes calls, if the request allows any.
    syntax: Option<&'static CallSyntax>,
    /// The syntax of all the model's answers, if they have one.
    whole: Option<&'static CallSyntax>,
    thoughts: &'static ThoughtTags,
    /// The template writes the tools into the prompt.
    in_template: bool,
    past: Past,
    notice: Option<&'static str>,
}

impl Tooling {
    /// Matches a request's tools with the model.
    pub(crate) fn of(backend: &dyn Backend, tools: Option<Tools>) -> Self {
        let template = backend.chat_template();
        let known = CallSyntax::of_template(template.source());
        let in_template = template.takes_tools();
        let mut past = known.map_or(Past::default(), |s| s.past);
        past.arguments_as_text |= template.wants_arguments_as_text();
        let whole = known.filter(|s| s.is_of_whole_answers());
        let mut notice = None;
        let syntax = match tools.as_ref().map_or(&ToolChoice::None, |t| &t.choice) {
            ToolChoice::None => None,
            // The model is told of the form that a template without tools does not have.
            ToolChoice::Auto if !in_template => Some(whole.unwrap_or(&GENERIC)),
            ToolChoice::Auto => {
                notice = known.is_none().then_some(CALLS_UNKNOWN);
                Some(known.unwrap_or(&GENERIC))
            }
            ToolChoice::Required | ToolChoice::Named(_) => {
                // What cannot be forced in the model's own syntax can be as JSON.
                let callable = tools.as_ref().map(Tools::callable).unwrap_or_default();
                let forces = |s: &&CallSyntax| in_template && s.forces(backend.tokenizer(), &callable);
                Some(whole.or(known.filter(forces)).unwrap_or(&GENERIC))
            }
        };
        let thoughts = ThoughtTags::of_template(template.source());
        Self { tools, syntax, whole, thoughts, in_template, past, notice }
    }

    /// What the prompt is to say. Tools that must not be called are not mentioned.
    pub(crate) fn told(&self) -> Told {
        let tools = self.tools.as_ref().filter(|t| t.choice != ToolChoice::None);
        let in_template = self.in_template;
        let text = tools.filter(|_| !in_template).map(|tools| untaught::description(&tools.callable()));
        let tools = tools.filter(|_| in_template).map(|tools| tools.described(self.past.descriptions));
        Told { tools, text, in_template, past: self.past }
    }

    /// For the client, if calls may be missed.
    pub(crate) fn notice(&self) -> Option<&'static str> {
        self.notice
    }

    /// How the answer is read; `open` if the prompt ends inside the tags of the reasoning.
    pub(crate) fn reading(&self, open: bool) -> Reading {
        let tools = self.tools.as_ref().filter(|_| self.syntax.is_some()).map(Tools::callable).unwrap_or_default();
        let tools = tools.into_iter().cloned().collect();
        Reading { syntax: self.syntax.or(self.whole), tools, thoughts: self.thoughts, open }
    }

    /// True if the answer speaks of a function instead of tools.
    pub(crate) fn is_legacy(&self) -> bool {
        self.tools.as_ref().is_some_and(|tools| tools.legacy)
    }

    /// The field that a grammar comes from.
    pub(crate) fn grammar_param(&self) -> &'static str {
        if self.syntax.is_some() { "tools" } else { "response_format" }
    }

    /// The grammar of the answer: the format's, that of a forced call, or one of both where the model
    /// may choose. Where the prompt has opened the reasoning (`open`), that comes first and is free.
    pub(crate) async fn grammar(
        &self,
        api: &Api,
        format: Option<&Format>,
        open: bool,
    ) -> Result<Option<Arc<Compiled>>, ApiError> {
        let thought = open.then_some(self.thoughts);
        let (Some(tools), Some(syntax)) = (&self.tools, self.syntax) else {
            let Some(format) = format else { return Ok(None) };
            let grammar = match (self.whole, thought) {
                (None, None) => format.grammar()?,
                (whole, _) => whole
                    .unwrap_or(&GENERIC)
                    .grammar(api.backend.tokenizer(), &[], false, Some(&format.schema()), thought)
                    .map_err(|e| refused(&e, SCHEMA_PARAM))?,
            };
            let compiled = api.turns.compile(&api.backend, grammar).await?;
            return compiled.map(Some).map_err(|e| refused(&e, SCHEMA_PARAM));
        };
        if !tools.forced() && format.is_none() {
            return Ok(None);
        }
        let instead = format.filter(|_| !tools.forced()).map(Format::schema);
        let several = tools.parallel && !matches!(tools.choice, ToolChoice::Named(_));
        // A schema may be refused when the grammar is written, or when that is compiled.
        let compiled = async |which: &Tools, instead: Option<&Value>| {
            let grammar = syntax.grammar(api.backend.tokenizer(), &which.callable(), several, instead, thought);
            match grammar {
                Ok(grammar) => api.turns.compile(&api.backend, grammar).await,
                Err(e) => Ok(Err(e)),
            }
        };
        let whole = match compiled(tools, instead.as_ref()).await? {
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
            let choice = ToolChoice::Required;
            let alone = Tools { list: vec![tool.clone()], choice, parallel: false, legacy: tools.legacy, described };
            if let Err(e) = compiled(&alone, None).await? {
                let path = if tools.legacy { format!("functions[{i}].parameters") } else { described.schema_path(i) };
                return Err(refused(&e, &path));
            }
        }
        Err(refused(&whole, "tools"))
    }
}

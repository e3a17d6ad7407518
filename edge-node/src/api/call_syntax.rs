//! How model families write tool calls: one table for finding calls in an answer and for forcing them.
//!
//! A family is known by what its chat template spells out. The syntax of templates that are not in the
//! table is unknown: such a model's calls cannot be found, so `tools` are refused for it unless the
//! call is forced, which needs no template.

use tandem_engine::tokenizer::Tokenizer;

/// What stands between the markers of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// One JSON object with the name under `name` and the arguments under this key.
    Object { arguments: &'static str },
    /// The bare name, this text, then the arguments.
    Parts { middle: &'static str },
    /// The bare name, then each argument between tags of its own, with its value as raw text.
    Tagged(Tags),
    /// The whole answer is messages with headers that say what each is: reasoning, text or a call.
    Channels,
}

/// The tags around the parts of a call whose values are raw text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tags {
    pub(crate) name_begin: &'static str,
    /// Ends the name; so do a line break and the next tag.
    pub(crate) name_end: &'static str,
    pub(crate) key_begin: &'static str,
    pub(crate) key_end: &'static str,
    pub(crate) value_begin: &'static str,
    pub(crate) value_end: &'static str,
    /// End a value too, where the model forgot `value_end`.
    pub(crate) value_end_lost: &'static [&'static str],
    /// A value stands on lines of its own; the breaks around it are no part of it.
    pub(crate) own_lines: bool,
    /// End the call.
    pub(crate) ends: &'static [&'static str],
    /// What the model writes between tags.
    pub(crate) gap: &'static str,
}

/// What a template wants to see of earlier turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Past {
    /// Arguments of earlier calls as text, not as an object.
    pub(crate) arguments_as_text: bool,
    /// Reasoning under `thinking` too, and never beside the content of a message with calls.
    pub(crate) thinking: bool,
    /// One call per message, its result right after it.
    pub(crate) one_call_each: bool,
    /// A description of every tool and parameter, if only an empty one.
    pub(crate) descriptions: bool,
}

/// How a family writes calls: `begin call (between call)* end`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CallSyntax {
    pub(crate) name: &'static str,
    /// What the chat template spells out, and what it must not.
    template: (&'static [&'static str], &'static [&'static str]),
    pub(crate) begin: &'static str,
    pub(crate) end: &'static str,
    pub(crate) call_begin: &'static str,
    pub(crate) call_end: &'static str,
    pub(crate) between: &'static str,
    pub(crate) body: Body,
    /// Parts of the texts above that may be single tokens without text of their own.
    pub(crate) markers: &'static [&'static str],
    /// Several calls can be written in one answer.
    pub(crate) several: bool,
    /// The template wants call ids of nine letters and digits.
    pub(crate) short_ids: bool,
    pub(crate) past: Past,
}

const PLAIN: CallSyntax = CallSyntax {
    name: "plain",
    template: (&[], &[]),
    begin: "",
    end: "",
    call_begin: "",
    call_end: "",
    between: "",
    body: Body::Object { arguments: "arguments" },
    markers: &[],
    several: false,
    short_ids: false,
    past: Past { arguments_as_text: false, thinking: false, one_call_each: false, descriptions: false },
};

const ARGUMENTS_AS_TEXT: Past = Past { arguments_as_text: true, ..PLAIN.past };

/// For forced calls of a model whose template knows no tools: one JSON object.
pub(crate) static GENERIC: CallSyntax = PLAIN;

/// The first entry that fits counts.
static TABLE: [CallSyntax; 10] = [
    // gpt-oss.
    CallSyntax {
        name: "harmony",
        template: (&["<|start|>assistant", "<|channel|>", "<|message|>"], &[]),
        body: Body::Channels,
        markers: &HARMONY,
        past: Past { thinking: true, one_call_each: true, descriptions: true, ..PLAIN.past },
        ..PLAIN
    },
    // Qwen 2.5 and 3, Hermes and others after it.
    CallSyntax {
        name: "hermes",
        template: (&["<tool_call>", "</tool_call>", "\"arguments\""], &["<function=", "<arg_key>"]),
        call_begin: "<tool_call>\n",
        call_end: "\n</tool_call>",
        between: "\n",
        markers: &["<tool_call>", "</tool_call>"],
        several: true,
        ..PLAIN
    },
    // Qwen3-Coder, Qwen 3.5 and later.
    CallSyntax {
        name: "qwen3-coder",
        template: (&["<tool_call>", "<function=", "<parameter="], &[]),
        call_begin: "<tool_call>\n",
        call_end: "\n</tool_call>",
        between: "\n",
        body: Body::Tagged(Tags {
            name_begin: "<function=",
            name_end: ">",
            key_begin: "<parameter=",
            key_end: ">",
            value_begin: "",
            value_end: "</parameter>",
            value_end_lost: &["\n<parameter=", "\n</function>"],
            own_lines: true,
            ends: &["</function>", "</tool_call>"],
            gap: "\n",
        }),
        markers: &["<tool_call>", "</tool_call>"],
        several: true,
        ..PLAIN
    },
    // GLM-4.5 and 4.6.
    CallSyntax {
        name: "glm-4.5",
        template: (&["<tool_call>", "<arg_key>", "<arg_value>"], &["</arg_key><arg_value>"]),
        body: Body::Tagged(GLM),
        ..GLM_CALLS
    },
    // GLM-4.7 and later: the same on one line.
    CallSyntax {
        name: "glm-4.7",
        template: (&["<tool_call>", "</arg_key><arg_value>"], &[]),
        body: Body::Tagged(Tags { gap: "", ..GLM }),
        between: "",
        ..GLM_CALLS
    },
    // Mistral from tokenizer v11 on.
    CallSyntax {
        name: "mistral-args",
        template: (&["[TOOL_CALLS]", "[ARGS]"], &["[CALL_ID]"]),
        call_begin: "[TOOL_CALLS]",
        body: Body::Parts { middle: "[ARGS]" },
        markers: &["[TOOL_CALLS]", "[ARGS]"],
        several: true,
        short_ids: true,
        past: ARGUMENTS_AS_TEXT,
        ..PLAIN
    },
    // Mistral up to tokenizer v7.
    CallSyntax {
        name: "mistral",
        template: (&["[TOOL_CALLS]"], &["[ARGS]", "[CALL_ID]"]),
        begin: "[TOOL_CALLS][",
        end: "]",
        between: ", ",
        markers: &["[TOOL_CALLS]"],
        several: true,
        short_ids: true,
        ..PLAIN
    },
    // Llama 3.1 and later.
    CallSyntax {
        name: "llama3",
        template: (&["\"parameters\": dictionary of argument name"], &[]),
        body: Body::Object { arguments: "parameters" },
        ..PLAIN
    },
    // DeepSeek-V3 and R1.
    CallSyntax {
        name: "deepseek",
        template: (&["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"], &[]),
        begin: "<｜tool▁calls▁begin｜>",
        end: "<｜tool▁calls▁end｜>",
        call_begin: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        call_end: "\n```<｜tool▁call▁end｜>",
        between: "\n",
        body: Body::Parts { middle: "\n```json\n" },
        several: true,
        markers: &DEEPSEEK,
        past: ARGUMENTS_AS_TEXT,
        ..PLAIN
    },
    CallSyntax {
        name: "deepseek-v3.1",
        template: (&["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"], &["```json"]),
        begin: "<｜tool▁calls▁begin｜>",
        end: "<｜tool▁calls▁end｜>",
        call_begin: "<｜tool▁call▁begin｜>",
        call_end: "<｜tool▁call▁end｜>",
        body: Body::Parts { middle: "<｜tool▁sep｜>" },
        several: true,
        markers: &DEEPSEEK,
        past: ARGUMENTS_AS_TEXT,
        ..PLAIN
    },
];

const GLM: Tags = Tags {
    name_begin: "<tool_call>",
    name_end: "",
    key_begin: "<arg_key>",
    key_end: "</arg_key>",
    value_begin: "<arg_value>",
    value_end: "</arg_value>",
    value_end_lost: &[],
    own_lines: false,
    ends: &["</tool_call>"],
    gap: "\n",
};

/// What all GLM have in common; the name's tag is that of the call.
const GLM_CALLS: CallSyntax = CallSyntax {
    call_end: "</tool_call>",
    between: "\n",
    markers: &["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    several: true,
    ..PLAIN
};

const DEEPSEEK: [&str; 5] = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
];

const HARMONY: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];

impl CallSyntax {
    /// The syntax that a chat template spells out, if it is in the table.
    pub(crate) fn of_template(source: &str) -> Option<&'static Self> {
        // Templates write JSON keys with and without escaped quotes.
        let source = source.replace("\\\"", "\"");
        TABLE.iter().find(|s| {
            let (has, has_not) = s.template;
            has.iter().all(|text| source.contains(text)) && !has_not.iter().any(|text| source.contains(text))
        })
    }

    /// The texts that an answer's first call may begin with; none if a call has no mark of its own and
    /// is known only by standing at the answer's beginning.
    pub(crate) fn openers(&self) -> impl Iterator<Item = &'static str> {
        let first = if self.begin.is_empty() { self.call_begin } else { self.begin };
        let first = self.markers.iter().find(|m| first.starts_with(**m)).copied().unwrap_or(first);
        // Models leave the tag around a tagged call out at times.
        let name = if let Body::Tagged(tags) = self.body { tags.name_begin } else { "" };
        [first, name].into_iter().filter(|opener| !opener.is_empty())
    }

    /// True if nothing marks a call but its place and its keys.
    pub(crate) fn is_unmarked(&self) -> bool {
        self.openers().next().is_none()
    }

    /// The text right before the bare name of a call.
    pub(crate) fn name_begin(&self) -> Option<&'static str> {
        match self.body {
            Body::Parts { .. } => Some(self.call_begin),
            Body::Tagged(tags) => Some(tags.name_begin),
            Body::Object { .. } | Body::Channels => None,
        }
    }

    /// True if every answer is written in the syntax, with or without calls.
    pub(crate) fn is_of_whole_answers(&self) -> bool {
        self.body == Body::Channels
    }

    /// Special tokens whose spelling belongs to the calls although they are hidden in text.
    pub(crate) fn special_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        self.markers.iter().filter_map(|m| special(tokenizer, m)).collect()
    }
}

/// The id of `text`, if it is a special token.
pub(crate) fn special(tokenizer: &Tokenizer, text: &str) -> Option<u32> {
    tokenizer.token_id(text).filter(|&id| tokenizer.is_special(id))
}

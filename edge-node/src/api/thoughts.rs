//! Reasoning that stands between tags at the beginning of an answer (Qwen 3, DeepSeek R1, GLM, …).
//!
//! It is taken off before anything else is looked for: a call or a stop of the model's own that is only
//! thought of is neither.

use tandem_engine::tokenizer::Tokenizer;

use super::call_params::overlap;
use super::call_syntax::special;

/// The tags around a family's reasoning.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ThoughtTags {
    pub(crate) begin: &'static str,
    pub(crate) end: &'static str,
}

/// The first entry whose end the chat template spells out counts, else the first.
static TABLE: [ThoughtTags; 6] = [
    ThoughtTags { begin: "<think>", end: "</think>" },
    // Magistral.
    ThoughtTags { begin: "[THINK]", end: "[/THINK]" },
    // Seed-OSS.
    ThoughtTags { begin: "<seed:think>", end: "</seed:think>" },
    // Command A Reasoning.
    ThoughtTags { begin: "<|START_THINKING|>", end: "<|END_THINKING|>" },
    // Kimi-VL.
    ThoughtTags { begin: "◁think▷", end: "◁/think▷" },
    // EXAONE Deep.
    ThoughtTags { begin: "<thought>", end: "</thought>" },
];

impl ThoughtTags {
    /// The tags of the family that a chat template belongs to.
    pub(crate) fn of_template(source: &str) -> &'static Self {
        TABLE.iter().find(|tags| source.contains(tags.end)).unwrap_or(&TABLE[0])
    }

    /// True if an answer to this prompt begins inside the reasoning: the template has opened it.
    pub(crate) fn are_open_after(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.begin)
    }

    /// Those of the tags that are special tokens, whose spelling is otherwise hidden in text.
    pub(crate) fn special_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        [self.begin, self.end].into_iter().filter_map(|tag| special(tokenizer, tag)).collect()
    }
}

enum Phase {
    /// Before the first text that is no blank.
    Before {
        /// Text without a tag is reasoning, because the prompt has the tag.
        open: bool,
    },
    Inside,
    /// After the end of reasoning, before the first text that is no blank.
    After,
    Outside,
}

/// A part of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Reasoning(String),
    Rest(String),
}

/// Takes the reasoning off one answer.
pub(crate) struct ThoughtReader {
    tags: &'static ThoughtTags,
    phase: Phase,
    /// Text not decided yet: blanks, and the possible beginning of a tag.
    held: String,
    /// Reasoning has come that is not all blanks.
    begun: bool,
}

impl ThoughtReader {
    /// For an answer whose reasoning the prompt has opened, or not.
    pub(crate) fn new(tags: &'static ThoughtTags, open: bool) -> Self {
        Self { tags, phase: Phase::Before { open }, held: String::new(), begun: false }
    }

    /// Takes the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// The answer has ended: what was held is no tag.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.held);
        let inside = matches!(self.phase, Phase::Inside | Phase::Before { open: true });
        match self.phase {
            // The blanks after reasoning are its end's.
            Phase::After if rest.trim().is_empty() => Vec::new(),
            _ if rest.is_empty() => Vec::new(),
            _ if inside => vec![Part::Reasoning(rest)],
            _ => vec![Part::Rest(rest)],
        }
    }

    /// Decides on the held text; true if there is more to decide.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.phase {
            Phase::Before { .. } | Phase::After => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(self.tags.begin) {
                    self.held = rest.to_owned();
                    self.phase = Phase::Inside;
                    return true;
                }
                // Also where there are only blanks so far.
                if self.tags.begin.starts_with(text) {
                    return false;
                }
                match self.phase {
                    Phase::Before { open: true } => self.phase = Phase::Inside,
                    Phase::After => {
                        self.held = text.to_owned();
                        self.phase = Phase::Outside;
                    }
                    _ => self.phase = Phase::Outside,
                }
                true
            }
            Phase::Inside => self.inside(parts),
            Phase::Outside => {
                if !self.held.is_empty() {
                    parts.push(Part::Rest(std::mem::take(&mut self.held)));
                }
                false
            }
        }
    }

    fn inside(&mut self, parts: &mut Vec<Part>) -> bool {
        let (text, ended) = match self.held.split_once(self.tags.end) {
            Some((before, after)) => {
                let before = before.trim_end().to_owned();
                self.held = after.to_owned();
                self.phase = Phase::After;
                (before, true)
            }
            None => {
                // Blanks before the tag are the tag's.
                let sure = &self.held[..self.held.len() - overlap(&self.held, self.tags.end)];
                let sure = sure.trim_end().len();
                let rest = self.held.split_off(sure);
                (std::mem::replace(&mut self.held, rest), false)
            }
        };
        let text = if self.begun { text.as_str() } else { text.trim_start() };
        self.begun = !ended && (self.begun || !text.is_empty());
        if !text.is_empty() {
            parts.push(Part::Reasoning(text.to_owned()));
        }
        ended
    }
}

//! Layouts of rows: our own, and those that public sets of questions come in.

use fastrand::Rng;
use serde_json::{Map, Value};
use tandem_engine::chat::Message;
use tandem_proto::ids::Digest;

use super::{MESSAGES_MAX, RowError};
use crate::score::{CHOICES_MAX, ScorerName};

/// A layout of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `prompt` or `messages`; `answer`, `category`, `part`, `key`, `scorer`.
    Own,
    /// `question`, and an `answer` that ends with `#### n`.
    Gsm8k,
    /// A question, choices and which of them is right, as in MMLU, ARC, HellaSwag and TruthfulQA (mc1).
    Choice,
    /// `task_id`, `prompt`, `entry_point` and `test`.
    HumanEval,
}

/// What a row asks.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) messages: Vec<Message>,
    /// Empty if nobody knows it.
    pub(super) answer: String,
    pub(super) category: String,
    /// How many choices there are.
    pub(super) choices: usize,
}

type Fields = Map<String, Value>;

impl Layout {
    /// The layout that the fields of a row show.
    pub(super) fn of(fields: &Fields) -> Option<Self> {
        let has = |field: &str| fields.get(field).is_some_and(|value| !value.is_null());
        if has("entry_point") && has("test") {
            Some(Self::HumanEval)
        } else if ["choices", "endings", "mc1_targets", "options"].into_iter().any(has)
            || fields.get("question").is_some_and(|question| question.get("choices").is_some())
        {
            Some(Self::Choice)
        } else if gsm8k_answer(fields).is_some() {
            Some(Self::Gsm8k)
        } else {
            (has("prompt") || has("messages")).then_some(Self::Own)
        }
    }

    /// The scorer of rows that name none.
    pub(super) fn scorer(self) -> ScorerName {
        match self {
            Self::Own => ScorerName::Exact,
            Self::Gsm8k => ScorerName::Number,
            Self::Choice => ScorerName::Choice,
            Self::HumanEval => ScorerName::Command,
        }
    }

    /// Reads a row.
    pub(super) fn read(self, fields: &Fields) -> Result<Asked, RowError> {
        match self {
            Self::Own => own(fields),
            Self::Gsm8k => gsm8k(fields),
            Self::Choice => choice(fields),
            Self::HumanEval => human_eval(fields),
        }
    }
}

fn bad(field: &'static str, problem: impl Into<String>) -> RowError {
    RowError::Field { field, problem: problem.into() }
}

/// A field that must be text and not empty.
fn text<'a>(fields: &'a Fields, field: &'static str) -> Result<&'a str, RowError> {
    let value = fields.get(field).ok_or_else(|| bad(field, "is missing"))?;
    let text = value.as_str().ok_or_else(|| bad(field, "must be text"))?;
    if text.trim().is_empty() { Err(bad(field, "is empty")) } else { Ok(text) }
}

fn category(fields: &Fields, otherwise: &str) -> String {
    let named = ["category", "subject", "source"].into_iter().find_map(|field| fields.get(field)?.as_str());
    named.unwrap_or(otherwise).to_owned()
}

/// A right answer as text; JSON that is no text as it is written.
fn answer(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn own(fields: &Fields) -> Result<Asked, RowError> {
    let messages = match fields.get("messages") {
        None | Some(Value::Null) => vec![Message::new("user", text(fields, "prompt")?)],
        Some(list) => {
            let messages: Vec<Message> = serde_json::from_value(list.clone())
                .map_err(|e| bad("messages", format!("must be a list of `role` and `content`: {e}")))?;
            if messages.is_empty() || messages.len() > MESSAGES_MAX {
                return Err(bad("messages", format!("has {} entries, 1..={MESSAGES_MAX} are allowed", messages.len())));
            }
            if messages.last().is_some_and(|last| last.role == "assistant") {
                return Err(bad("messages", "ends with the assistant's: there is nothing to answer"));
            }
            messages
        }
    };
    let answer = answer(fields.get("answer").or_else(|| fields.get("expected")));
    Ok(Asked { messages, answer, category: category(fields, "other"), choices: CHOICES_MAX })
}

/// What stands behind `####` in an answer that is reasoned out.
fn gsm8k_answer(fields: &Fields) -> Option<&str> {
    let reasoned =
        ["answer", "upstream_answer"].into_iter().find_map(|field| fields.get(field)?.as_str()?.rsplit_once("####"));
    Some(reasoned?.1.trim())
}

fn gsm8k(fields: &Fields) -> Result<Asked, RowError> {
    let question = text(fields, "question").or_else(|_| text(fields, "prompt"))?;
    let answer = gsm8k_answer(fields).ok_or_else(|| bad("answer", "has no `#### number` at its end"))?;
    let messages = vec![Message::new("user", question)];
    Ok(Asked { messages, answer: answer.to_owned(), category: category(fields, "gsm8k"), choices: 0 })
}

fn human_eval(fields: &Fields) -> Result<Asked, RowError> {
    let ask = format!(
        "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```",
        text(fields, "prompt")?.trim_end()
    );
    text(fields, "entry_point")?;
    text(fields, "test")?;
    let answer = answer(fields.get("canonical_solution"));
    Ok(Asked { messages: vec![Message::new("user", ask)], answer, category: category(fields, "code"), choices: 0 })
}

/// Choices with their labels, where they have some.
#[derive(Debug, Default)]
struct Choices {
    texts: Vec<String>,
    labels: Vec<String>,
    /// The right one, if the choices themselves say so.
    right: Option<usize>,
}

fn texts(list: &[Value], field: &'static str) -> Result<Vec<String>, RowError> {
    let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| bad(field, "must hold texts"));
    list.iter().map(text).collect()
}

/// The choices in any of the public forms.
fn choices(fields: &Fields) -> Result<Choices, RowError> {
    // TruthfulQA: `{"choices": […], "labels": [1, 0, …]}`, or each text with 1 or 0.
    if let Some(targets) = fields.get("mc1_targets").and_then(Value::as_object) {
        let is_one = |value: &Value| value.as_i64() == Some(1);
        let (texts, right) = match (targets.get("choices").and_then(Value::as_array), targets.get("labels")) {
            (Some(list), Some(Value::Array(labels))) => (texts(list, "mc1_targets")?, labels.iter().position(is_one)),
            _ => (targets.keys().cloned().collect(), targets.values().position(is_one)),
        };
        return Ok(Choices { texts, labels: Vec::new(), right });
    }
    let inside = fields.get("question").and_then(|question| question.get("choices"));
    let (field, value) = ["choices", "endings", "options"]
        .into_iter()
        .find_map(|field| Some((field, fields.get(field).filter(|value| !value.is_null())?)))
        .or(inside.map(|value| ("choices", value)))
        .ok_or_else(|| bad("choices", "is missing"))?;
    let labelled = |list: &[Value], text: &str| -> Result<Choices, RowError> {
        let of = |key: &str| list.iter().map(|choice| choice.get(key).cloned().unwrap_or_default()).collect::<Vec<_>>();
        Ok(Choices { texts: texts(&of(text), field)?, labels: texts(&of("label"), field)?, right: None })
    };
    match value {
        Value::Array(list) if list.first().is_some_and(Value::is_object) => labelled(list, "text"),
        Value::Array(list) => Ok(Choices { texts: texts(list, field)?, ..Choices::default() }),
        // ARC on the hub: `{"text": […], "label": […]}`.
        Value::Object(map) => match (map.get("text"), map.get("label")) {
            (Some(Value::Array(list)), Some(Value::Array(labels))) => {
                Ok(Choices { texts: texts(list, field)?, labels: texts(labels, field)?, right: None })
            }
            _ => {
                let values: Vec<Value> = map.values().cloned().collect();
                Ok(Choices { texts: texts(&values, field)?, labels: map.keys().cloned().collect(), right: None })
            }
        },
        _ => Err(bad(field, "must be a list")),
    }
}

/// Which choice is right: by its label, its text (in `answer`), its letter, or its place from 0. None if the row
/// does not say.
fn right(fields: &Fields, choices: &Choices) -> Result<Option<usize>, RowError> {
    if let Some(at) = choices.right {
        let problem = || bad("mc1_targets", "calls a choice right that it does not list");
        return if at < choices.texts.len() { Ok(Some(at)) } else { Err(problem()) };
    }
    let names = ["answerKey", "expected_index", "answer_index", "answer_idx", "label", "gold", "answer", "expected"];
    let Some((field, value)) =
        names.into_iter().find_map(|name| Some((name, fields.get(name).filter(|v| !v.is_null())?)))
    else {
        return Ok(None);
    };
    let found = match value {
        Value::Number(place) => place.as_u64().map(|place| place as usize),
        // Test splits without labels have an empty text.
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => {
            let text = text.trim();
            let there = |at: Option<usize>| at.filter(|at| *at < choices.texts.len());
            let same = |list: &[String]| there(list.iter().position(|known| known.trim() == text));
            let letter = || match text.as_bytes() {
                [c] if c.is_ascii_alphabetic() => there(Some(usize::from(c.to_ascii_uppercase() - b'A'))),
                _ => None,
            };
            let place = || there(text.parse().ok());
            if matches!(field, "answer" | "expected") {
                same(&choices.labels).or_else(|| same(&choices.texts)).or_else(letter).or_else(place)
            } else {
                same(&choices.labels).or_else(letter).or_else(place)
            }
        }
        _ => None,
    };
    match found.filter(|at| *at < choices.texts.len()) {
        Some(at) => Ok(Some(at)),
        None => Err(bad(field, format!("is {value}, which is none of the {} choices", choices.texts.len()))),
    }
}

fn choice(fields: &Fields) -> Result<Asked, RowError> {
    let question = match fields.get("question") {
        Some(Value::Object(inner)) => text(inner, "stem")?.to_owned(),
        Some(_) => text(fields, "question")?.to_owned(),
        None if fields.contains_key("ctx") => format!("How does this go on?\n\n{}", text(fields, "ctx")?),
        None => text(fields, "prompt").map_err(|_| bad("question", "is missing"))?.to_owned(),
    };
    let choices = choices(fields)?;
    let count = choices.texts.len();
    if !(2..=CHOICES_MAX).contains(&count) {
        return Err(bad("choices", format!("has {count} entries, 2..={CHOICES_MAX} are allowed")));
    }
    let right = right(fields, &choices)?;
    let mut order: Vec<usize> = (0..count).collect();
    // TruthfulQA has the right one first: a model that likes `A` would be right.
    let source = fields.get("source").and_then(Value::as_str).unwrap_or_default();
    if fields.contains_key("mc1_targets") || source.contains("truthfulqa") {
        let seed = Digest::of(question.as_bytes()).0;
        Rng::with_seed(seed.iter().take(8).fold(0, |seed, byte| (seed << 8) | u64::from(*byte))).shuffle(&mut order);
    }
    let letter = |place: usize| char::from(b'A' + place as u8);
    let mut ask = question.trim_end().to_owned() + "\n";
    for (place, &at) in order.iter().enumerate() {
        ask += &format!("\n{}. {}", letter(place), choices.texts[at].trim());
    }
    ask += "\n\nAnswer with the letter of the right choice only.";
    let answer =
        right.and_then(|right| order.iter().position(|&at| at == right)).map(|place| letter(place).to_string());
    Ok(Asked {
        messages: vec![Message::new("user", ask)],
        answer: answer.unwrap_or_default(),
        category: category(fields, "choice"),
        choices: count,
    })
}

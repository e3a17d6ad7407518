//! Two models in one process: the embedded pair or any other with one tokenizer.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_engine::chat::ChatTemplate;
use tandem_engine::tokenizer::{Difference, Tokenizer};
use tandem_engine::{Model, trunk_layers};
use tandem_models::{CLOUD, EDGE, EmbeddedModel, Found, Place};
use tandem_proto::message::ModelCard;

use crate::error::LabError;
use crate::questions::RowError;
use crate::rows::Row;

/// The files of two models.
#[derive(Clone)]
pub struct PairFiles {
    /// The model on the device.
    pub edge: Found,
    /// The model in the cloud.
    pub cloud: Found,
}

impl Default for PairFiles {
    /// The embedded pair.
    fn default() -> Self {
        let found = |model: &'static EmbeddedModel| Found { name: model.name.into(), place: Place::Embedded(model) };
        Self { edge: found(&EDGE), cloud: found(&CLOUD) }
    }
}

/// What a model is called and which it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Name under which it is served.
    pub name: String,
    /// Digest of its tensors and its configuration.
    pub digest: String,
    /// The arithmetic it runs in.
    pub numerics: String,
}

/// The models of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairReport {
    /// The model on the device.
    pub edge: ModelReport,
    /// The model in the cloud.
    pub cloud: ModelReport,
    /// Leading layers that are the same numbers in both.
    pub shared_layers: usize,
}

impl PairReport {
    /// What the cards say.
    #[must_use]
    pub fn of(edge: &ModelCard, cloud: &ModelCard) -> Self {
        let model = |card: &ModelCard| ModelReport {
            name: card.name.clone(),
            digest: card.digest.to_string(),
            numerics: card.numerics.clone(),
        };
        let shared_layers = if edge.numerics == cloud.numerics { trunk_layers(&edge.layers, &cloud.layers) } else { 0 };
        Self { edge: model(edge), cloud: model(cloud), shared_layers }
    }

    /// As lines of Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let line = |what: &str, model: &ModelReport| {
            format!("{what}: {} (digest {}, numerics {})\n", model.name, model.digest, model.numerics)
        };
        line("- edge", &self.edge)
            + &line("- cloud", &self.cloud)
            + &format!("- shared layers: {}\n", self.shared_layers)
    }
}

/// Two models whose token ids do not mean the same text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the tokenizers of {edge} and {cloud} differ{first}, so one cannot judge the other's tokens; pair models of one family"
)]
pub struct TwoTokenizers {
    /// Name of the edge's model.
    pub edge: String,
    /// Name of the cloud's.
    pub cloud: String,
    /// Where they differ first, as far as that is known.
    pub first: String,
}

/// Refuses a pair with two tokenizers.
pub(crate) fn check_tokenizers(
    (edge, tokenizer): (&ModelCard, &Tokenizer),
    cloud: &ModelCard,
) -> Result<(), TwoTokenizers> {
    if edge.tokenizer == cloud.tokenizer {
        return Ok(());
    }
    let first = match tokenizer.first_difference(&cloud.tokenizer_marks) {
        Difference::Token(id) => format!(" first in token {id}"),
        Difference::Within(from, to) => format!(" first between tokens {from} and {to}"),
        Difference::Unknown => String::new(),
    };
    Err(TwoTokenizers { edge: edge.name.clone(), cloud: cloud.name.clone(), first })
}

/// Refuses a prompt that leaves no room in `context` for an answer of `answer` tokens.
pub(crate) fn check_room(rows: &[Row], prompts: &[Vec<u32>], answer: usize, context: usize) -> Result<(), LabError> {
    let long = rows.iter().zip(prompts).find(|(_, prompt)| prompt.len() + answer > context);
    let Some((row, prompt)) = long else { return Ok(()) };
    let problem = RowError::Tokens { tokens: prompt.len(), answer, context };
    Err(match &row.origin {
        Some(origin) => LabError::row(origin, problem),
        None => LabError::Empty(format!("{}: {problem}", row.at())),
    })
}

/// Two models that answer as one.
pub struct Pair {
    /// The model on the device.
    pub edge: Arc<Model>,
    /// The model in the cloud.
    pub cloud: Arc<Model>,
    /// Tokenizer of both.
    pub tokenizer: Tokenizer,
    /// The edge's chat template: a node's prompts are made there.
    pub chat: ChatTemplate,
    /// Token ids that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Leading layers that are run once for both; 0 for none.
    pub trunk: usize,
    /// Which models these are.
    pub report: PairReport,
}

impl Pair {
    /// Loads two models; each runs on `threads` threads (0 for one per core).
    ///
    /// # Errors
    /// What is wrong with the files, or that the models have two tokenizers.
    pub fn load(files: &PairFiles, threads: usize) -> Result<Self, LabError> {
        let (small, big) = (files.edge.load(threads)?, files.cloud.load(threads)?);
        check_tokenizers((&small.card, &small.tokenizer), &big.card)?;
        let report = PairReport::of(&small.card, &big.card);
        let (edge, cloud) = (small.model, big.model);
        // Of a model whose layers are all shared, the last one stays its own: it has a state of its own then.
        let trunk = report.shared_layers.min(edge.spec().layers - 1).min(cloud.spec().layers - 1);
        let (tokenizer, chat, stop_tokens) = (small.tokenizer, small.chat, small.stop_tokens);
        Ok(Self { edge, cloud, tokenizer, chat, stop_tokens, trunk, report })
    }

    /// Loads the embedded pair.
    ///
    /// # Errors
    /// What is wrong with the embedded files.
    pub fn embedded(threads: usize) -> Result<Self, LabError> {
        Self::load(&PairFiles::default(), threads)
    }

    /// Prompt tokens of one question through the chat template.
    ///
    /// # Errors
    /// The template or the tokenizer refuses it.
    pub fn prompt(&self, row: &Row) -> Result<Vec<u32>, LabError> {
        let text = self.chat.render(&row.conversation(), true, 0)?;
        Ok(self.tokenizer.encode(&text)?)
    }

    /// Prompt tokens of all questions.
    ///
    /// # Errors
    /// As [`Self::prompt`], or a prompt leaves no room for `answer` tokens.
    pub fn prompts(&self, rows: &[Row], answer: usize) -> Result<Vec<Vec<u32>>, LabError> {
        let context = self.edge.spec().context_tokens.min(self.cloud.spec().context_tokens);
        let prompts = rows.iter().map(|row| self.prompt(row)).collect::<Result<Vec<_>, _>>()?;
        check_room(rows, &prompts, answer, context)?;
        Ok(prompts)
    }

    /// Text of answer tokens.
    ///
    /// # Errors
    /// A token has no text.
    pub fn text(&self, tokens: &[u32]) -> Result<String, LabError> {
        Ok(self.tokenizer.decode(tokens)?)
    }

    /// True if `token` ends an answer.
    #[must_use]
    pub fn is_stop(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }
}

#[cfg(test)]
mod tests;

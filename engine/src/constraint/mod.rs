//! Constrained decoding: which tokens a grammar leaves at a position of an answer.
//!
//! [`Constraints`] compiles a grammar (bounded, cached), [`Compiled::follow`] begins to follow one
//! answer, [`Followed::allowed`] yields the mask of a position. The mask is a function of the grammar,
//! the vocabulary and the answer's tokens before the position, and of nothing else: two sides with one
//! tokenizer mask alike, and so draw the same tokens.
//!
//! Grammars work on bytes (a token may end inside a character); tokens that are special in the
//! tokenizer stand for no text and are allowed only where a grammar names them by id.

mod follow;
mod mask;
pub mod schema;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;
use tandem_proto::ids::Digest;
use tandem_proto::limits::GRAMMAR_BYTES_MAX;
use tandem_proto::message::{Grammar, GrammarSyntax};

pub use follow::{Followed, Follower};
pub use mask::TokenMask;

pub use crate::error::ConstraintError;
use crate::tokenizer::Tokenizer;

/// Most compiled grammars kept for the next request that brings the same one.
pub const GRAMMARS_CACHED_MAX: usize = 32;

/// Stack of the thread that compiles; memory that is not touched costs nothing.
const COMPILER_STACK_BYTES: usize = 64 << 20;

/// Longest text of a problem that is passed on, characters.
const PROBLEM_CHARS_MAX: usize = 240;

/// What one grammar may cost. The library counts in its own units; the comments give what they come to.
fn limits() -> ParserLimits {
    ParserLimits {
        // 2 000 optional members.
        max_items_in_row: 8_000,
        // 20 ms of compilation.
        initial_lexer_fuel: 1_000_000,
        // 15 ms for the worst mask.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // 40 MB per answer at most.
        max_lexer_states: 25_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        // Errors reach the client: they carry neither the answer's text nor the parser's state.
        verbose_errors: false,
    }
}

/// A JSON schema as a grammar. Keys come in the order of the schema's properties.
///
/// # Errors
/// [`ConstraintError::Rejected`] names what the schema asks for and cannot be held.
pub fn json_schema(schema: &Value) -> Result<Grammar, ConstraintError> {
    Ok(Grammar { syntax: GrammarSyntax::JsonSchema, text: held(schema, schema)?.to_string() })
}

/// Any JSON object.
#[must_use]
pub fn json_object() -> Grammar {
    let text = serde_json::json!({ "type": "object", "x-guidance": { "whitespace_pattern": schema::JSON_SPACE } });
    Grammar { syntax: GrammarSyntax::JsonSchema, text: text.to_string() }
}

/// `schema` as a grammar in Lark takes it after `%json`; its references point into `root`.
///
/// # Errors
/// [`ConstraintError::Rejected`] names what the schema asks for and cannot be held.
pub fn held(schema: &Value, root: &Value) -> Result<Value, ConstraintError> {
    schema::prepare(schema, root)
}

/// The grammars of one tokenizer. The token trie is built when the first grammar comes.
pub struct Constraints {
    tokenizer: Arc<Tokenizer>,
    factory: OnceLock<Result<ParserFactory, ConstraintError>>,
    /// Latest used last.
    compiled: Mutex<Vec<(Digest, Arc<Compiled>)>>,
}

impl std::fmt::Debug for Constraints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraints").field("tokenizer", &self.tokenizer).finish_non_exhaustive()
    }
}

impl Constraints {
    /// Grammars over the tokens of `tokenizer`.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, factory: OnceLock::new(), compiled: Mutex::default() }
    }

    /// Compiles a grammar, or finds it compiled. Takes up to some tens of milliseconds, the first time
    /// the time to build the trie too: not for a runtime's or the engine's thread.
    ///
    /// # Errors
    /// [`ConstraintError`] says what is wrong with the grammar.
    pub fn compile(&self, grammar: &Grammar) -> Result<Arc<Compiled>, ConstraintError> {
        let bytes = grammar.text.len();
        if bytes > GRAMMAR_BYTES_MAX {
            return Err(ConstraintError::TooLong { bytes, max: GRAMMAR_BYTES_MAX });
        }
        let key = key(grammar);
        if let Some(known) = self.cached(&key) {
            return Ok(known);
        }
        let built = Arc::new(self.build(grammar)?);
        let mut all = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= GRAMMARS_CACHED_MAX {
            all.remove(0);
        }
        all.push((key, built.clone()));
        Ok(built)
    }

    fn cached(&self, key: &Digest) -> Option<Arc<Compiled>> {
        let mut all = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let at = all.iter().position(|(k, _)| k == key)?;
        let entry = all.remove(at);
        let found = entry.1.clone();
        all.push(entry);
        Some(found)
    }

    fn build(&self, grammar: &Grammar) -> Result<Compiled, ConstraintError> {
        let factory = self.factory.get_or_init(|| factory(&self.tokenizer)).as_ref().map_err(Clone::clone)?;
        // The library goes down a level of the stack for each reference that leads to a further one: in 48 KiB
        // there are more than a thread of the runtime has room for, and that would end the process.
        let compile = || self.compile_here(factory, grammar);
        let failed = |what: &str| ConstraintError::Rejected(format!("the compiler {what}"));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILER_STACK_BYTES);
            let thread =
                thread.spawn_scoped(scope, compile).map_err(|e| failed(&format!("could not be started: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(failed("failed")))
        })
    }

    fn compile_here(&self, factory: &ParserFactory, grammar: &Grammar) -> Result<Compiled, ConstraintError> {
        let top = match grammar.syntax {
            GrammarSyntax::JsonSchema => {
                let schema = serde_json::from_str(&grammar.text)
                    .map_err(|e| ConstraintError::Rejected(format!("the schema is not JSON: {e}")))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            GrammarSyntax::Lark => TopLevelGrammar::from_lark(grammar.text.clone()),
        };
        let matcher = Matcher::new(factory.create_parser(top));
        let rejected = |problem: &str| Err(ConstraintError::Rejected(first_line(problem)));
        if let Some(problem) = matcher.get_error() {
            return rejected(&problem);
        }
        // A grammar without a text is found by its first mask only.
        if let Err(problem) = matcher.deep_clone().compute_mask() {
            return rejected(&problem.to_string());
        }
        Ok(Compiled { grammar: grammar.clone(), fresh: Mutex::new(matcher), vocabulary: self.tokenizer.vocab_size() })
    }
}

/// A grammar that compiles.
pub struct Compiled {
    grammar: Grammar,
    /// At the beginning of an answer; never advanced.
    fresh: Mutex<Matcher>,
    vocabulary: usize,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").field("grammar", &self.grammar).finish_non_exhaustive()
    }
}

impl Compiled {
    /// The grammar as it travels.
    #[must_use]
    pub fn grammar(&self) -> &Grammar {
        &self.grammar
    }

    /// Begins to follow an answer that ends with one of `stop_tokens`.
    #[must_use]
    pub fn follow(self: &Arc<Self>, stop_tokens: &[u32]) -> Followed {
        Followed::new(Follower::new(self.clone(), stop_tokens))
    }

    /// A matcher of its own: it shares no cache, so no answer's cost depends on another's.
    fn matcher(&self) -> Matcher {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }
}

fn factory(tokenizer: &Tokenizer) -> Result<ParserFactory, ConstraintError> {
    let env = vocabulary::environment(tokenizer)?;
    // Masks of the inside of JSON strings are made once.
    let slices = SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        .map_err(|e| ConstraintError::Vocabulary(first_line(&e.to_string())))?;
    factory.quiet();
    *factory.limits_mut() = limits();
    Ok(factory)
}

fn key(grammar: &Grammar) -> Digest {
    let mut hash = blake3::Hasher::new();
    hash.update(&[grammar.syntax as u8]);
    hash.update(grammar.text.as_bytes());
    Digest(*hash.finalize().as_bytes())
}

/// What the library says, without the traces that follow it.
fn first_line(problem: &str) -> String {
    let line = problem.lines().find(|l| !l.trim().is_empty()).unwrap_or("no reason given");
    line.trim().chars().take(PROBLEM_CHARS_MAX).collect()
}

//! Several engines that serve one model: which of them decides for a session, and what is done about one that
//! fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tandem_engine::EngineError;
use tandem_engine::tokenizer::Tokenizer;
use tandem_upstream::{Address, Engine, Fault, probe};

use super::UpstreamOptions;
use super::breaker::{Breaker, Health};
use super::lanes::{Lanes, Seat};

/// Most engines of one node.
const MEMBERS_MAX: usize = 64;

/// Tokens by which sequences are spread over engines: those with the same beginning find it computed.
const SPREAD_TOKENS: usize = 32;

/// Text that engines are tried with.
const SAMPLE: &str = "The quick brown fox jumps over the lazy dog. Then";

/// Texts whose tokens must be the engine's, too: letters, digits, blanks, scripts, signs, and what looks special.
const CORPUS: [&str; 14] = [
    "Hello world",
    " leading blank",
    "two  blanks   three",
    "tab\tand\nnew\n\nlines\r\n",
    "3.14159 + 2718281828 = 1,000,000",
    "naïve café Ångström Straße",
    "Привет, мир! Γειά σου",
    "你好,世界。こんにちは 안녕하세요",
    "مرحبا بالعالم שלום",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u{301}",
    "fn main() { println!(\"{}\", x[0] << 2); }",
    "don't you're I'll we've",
    "<|not_a_token|> </s> [INST] <think>",
    "ALLCAPS camelCase snake_case kebab-case",
];

/// Why engines cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No address was given, or too many.
    #[error("{0} upstream URLs were given, between 1 and {MEMBERS_MAX} are taken")]
    Count(usize),
    /// An engine cannot be used.
    #[error("{url}: {fault}")]
    Fault {
        /// Where it is.
        url: String,
        /// Why.
        fault: Fault,
    },
    /// It has another tokenizer.
    #[error(
        "{url}: the upstream makes other tokens of {text:?} than the tokenizer that was given ({theirs:?}, not \
         {ours:?}); name its own with --upstream-tokenizer"
    )]
    Tokenizer {
        /// Where it is.
        url: String,
        /// The text.
        text: &'static str,
        /// The engine's tokens.
        theirs: Vec<u32>,
        /// The tokenizer's.
        ours: Vec<u32>,
    },
    /// Its head has fewer rows than the tokenizer has tokens.
    #[error("{url}: the upstream's vocabulary has {theirs} tokens, the tokenizer that was given has {ours}")]
    Vocabulary {
        /// Where it is.
        url: String,
        /// The engine's tokens.
        theirs: usize,
        /// The tokenizer's.
        ours: usize,
    },
    /// Engines that serve different models.
    #[error("{url} serves {model}, the first upstream serves {first}: all must serve the same model")]
    Models {
        /// Where it is.
        url: String,
        /// Its model.
        model: String,
        /// The first one's.
        first: String,
    },
    /// The tokenizer fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl ConnectError {
    /// True if waiting may help.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::Fault { fault, .. } if fault.passes())
    }
}

/// One engine.
pub(super) struct Member {
    index: usize,
    engine: Engine,
    breaker: Mutex<Breaker>,
    lanes: Mutex<Lanes>,
    /// It failed since it was last asked which model it serves.
    unsure: AtomicBool,
}

impl Member {
    pub(super) fn index(&self) -> usize {
        self.index
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// A place for a sequence.
    pub(super) fn seat(&self, tenant: [u8; 32], tokens: &[u32]) -> Seat {
        let lane = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).take(tenant, tokens);
        Seat { member: self.index, lane }
    }

    pub(super) fn succeeded(&self) {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner).succeeded();
    }

    /// Asks an engine that failed which model it serves: it may have been started again with another.
    pub(super) async fn make_sure(&self) -> Result<(), Fault> {
        if self.unsure.load(Ordering::Relaxed) {
            self.engine.still_serves().await?;
            self.unsure.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(super) fn failed(&self, fault: &Fault) {
        self.unsure.store(true, Ordering::Relaxed);
        let wait = if let Fault::Busy { retry_after } = fault { *retry_after } else { None };
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner).failed(wait, Instant::now());
    }

    fn health(&self) -> Health {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner).health(Instant::now())
    }
}

/// All engines; never none.
pub(super) struct Members {
    all: Vec<Member>,
}

impl Members {
    pub(super) async fn connect(options: &UpstreamOptions, tokenizer: &Tokenizer) -> Result<Self, ConnectError> {
        if options.urls.is_empty() || options.urls.len() > MEMBERS_MAX {
            return Err(ConnectError::Count(options.urls.len()));
        }
        let sample = tokenizer.encode(SAMPLE)?;
        let mut all: Vec<Member> = Vec::new();
        for (index, given) in options.urls.iter().enumerate() {
            let at = Address::new(given, options.key.as_ref());
            let at = at.map_err(|fault| ConnectError::Fault { url: format!("--upstream {}", index + 1), fault })?;
            let url = at.shown();
            let engine = probe(at, &sample).await.map_err(|fault| ConnectError::Fault { url: url.clone(), fault })?;
            agrees(&engine, tokenizer, &url).await?;
            let model = engine.abilities().model.clone();
            if let Some(first) = all.first().map(|first| first.engine.abilities().model.clone())
                && first != model
            {
                return Err(ConnectError::Models { url, model, first });
            }
            let lanes = Mutex::new(Lanes::new(engine.abilities().lanes));
            all.push(Member { index, engine, breaker: Mutex::default(), lanes, unsure: AtomicBool::new(false) });
        }
        Ok(Self { all })
    }

    pub(super) fn all(&self) -> &[Member] {
        &self.all
    }

    /// The engine for a session whose tokens these are; `at` is where it was. None if none is to be asked.
    pub(super) fn choose(&self, at: Option<usize>, tokens: &[u32]) -> Option<&Member> {
        let healths: Vec<Health> = self.all.iter().map(Member::health).collect();
        place(&healths, at, tokens).map(|index| &self.all[index])
    }
}

/// Which of several engines decides for a session: the one where it was, if that is sound; else, of the soundest,
/// the one that its first tokens hash to (rendezvous hashing: a node that fails moves its own sessions only).
fn place(healths: &[Health], at: Option<usize>, tokens: &[u32]) -> Option<usize> {
    if let Some(at) = at
        && healths.get(at) == Some(&Health::Sound)
    {
        return Some(at);
    }
    let mut key = blake3::Hasher::new();
    for token in tokens.iter().take(SPREAD_TOKENS) {
        key.update(&token.to_le_bytes());
    }
    let weight = |index: usize| *key.clone().update(&(index as u64).to_le_bytes()).finalize().as_bytes();
    let usable = (0..healths.len()).filter(|&index| healths[index] != Health::Open);
    usable.min_by_key(|&index| (healths[index], weight(index)))
}

/// Whether the engine makes the same tokens of text.
async fn agrees(engine: &Engine, tokenizer: &Tokenizer, url: &str) -> Result<(), ConnectError> {
    let (theirs, ours) = (engine.abilities().vocabulary, tokenizer.vocab_size());
    if theirs < ours {
        return Err(ConnectError::Vocabulary { url: url.to_owned(), theirs, ours });
    }
    for text in CORPUS {
        let theirs = engine.tokenize(text).await;
        let theirs = theirs.map_err(|fault| ConnectError::Fault { url: url.to_owned(), fault })?;
        let ours = tokenizer.encode(text)?;
        if theirs != ours {
            return Err(ConnectError::Tokenizer { url: url.to_owned(), text, theirs, ours });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_stay_and_move_to_the_soundest() {
        use Health::{Open, Shunned, Sound};
        let tokens: Vec<u32> = (0..40).collect();
        let own = place(&[Sound; 4], None, &tokens).expect("one is there");
        // The same beginning, the same engine; another one's fault moves nothing.
        assert_eq!(place(&[Sound; 4], None, &tokens[..32]), Some(own));
        let mut healths = [Sound; 4];
        healths[(own + 1) % 4] = Open;
        assert_eq!(place(&healths, None, &tokens), Some(own));
        assert_eq!(place(&healths, Some((own + 2) % 4), &tokens), Some((own + 2) % 4), "a session stays");
        healths[own] = Shunned;
        let next = place(&healths, Some(own), &tokens).expect("two are sound");
        assert!(next != own && healths[next] == Sound);
        assert_eq!(place(&[Open, Shunned], None, &tokens), Some(1), "the last one left is asked");
        assert_eq!(place(&[Open, Open], Some(0), &tokens), None);
    }

    #[test]
    fn sequences_spread_over_engines() {
        let mut counts = [0; 4];
        for id in 0..400u32 {
            counts[place(&[Health::Sound; 4], None, &[id, 1, 2]).expect("one is there")] += 1;
        }
        assert!(counts.iter().all(|n| (60..140).contains(n)), "{counts:?}");
    }
}

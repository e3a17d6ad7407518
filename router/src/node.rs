//! What a cloud node says about itself: its card (what it is) and its load (how busy it is).

use serde::{Deserialize, Serialize};
use tandem_proto::{
    ids::Digest,
    limits::{MODELS_MAX, NAME_BYTES_MAX},
};

/// Most prefix blocks that a node may report.
pub const PREFIXES_PER_NODE_MAX: usize = 256;

/// A model that a node serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Name as in requests.
    pub name: String,
    /// Digest of the weights.
    #[serde(with = "hex_digest")]
    pub digest: Digest,
}

impl ModelCard {
    /// True if `wanted` is the model's name or its digest as 64 hex digits.
    #[must_use]
    pub fn answers_to(&self, wanted: &str) -> bool {
        self.name == wanted || (wanted.len() == 64 && self.digest.to_string() == wanted)
    }
}

/// What a cloud node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCard {
    /// Unique name.
    pub name: String,
    /// Where edges reach it: `host:port` of its QUIC endpoint.
    pub address: String,
    /// Name to check in its certificate.
    pub server_name: String,
    /// Region, empty if unknown.
    pub region: String,
    /// Models it serves.
    pub models: Vec<ModelCard>,
    /// Rises with every start of the node (its start time, for example).
    pub boot_epoch: u64,
}

/// How busy a cloud node is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Sessions under way.
    pub sessions: u32,
    /// Sessions it admits at most; 0 if it has no limit.
    pub sessions_max: u32,
    /// Tokens waiting for a place in a batch.
    pub queued_tokens: u64,
    /// Tokens a second of time in the model lately, prefill and verification together; 0 if it was idle.
    pub tokens_per_second: u32,
    /// KV blocks in use.
    pub kv_blocks_used: u32,
    /// KV blocks it has.
    pub kv_blocks_max: u32,
    /// How long its engine has made no progress, if it hangs, ms; else 0.
    #[serde(default)]
    pub stalled_ms: u32,
    /// Hashes of the prefix blocks that it would rather keep, sorted.
    #[serde(with = "hex_digests")]
    pub prefixes: Vec<Digest>,
}

/// A card or a report that breaks a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct InvalidField {
    /// The field.
    pub field: &'static str,
    /// What is wrong and what is allowed.
    pub problem: String,
}

/// Checks that `value` is a name: not empty (unless `may_be_empty`), short, printable.
pub(crate) fn check_name(field: &'static str, value: &str, may_be_empty: bool) -> Result<(), InvalidField> {
    let problem = if value.is_empty() && !may_be_empty {
        "is empty".into()
    } else if value.len() > NAME_BYTES_MAX {
        format!("has {} bytes, at most {NAME_BYTES_MAX} are allowed", value.len())
    } else if value.chars().any(char::is_control) {
        "holds control characters".into()
    } else {
        return Ok(());
    };
    Err(InvalidField { field, problem })
}

impl NodeCard {
    /// Checks every field against its limit.
    pub fn check(&self) -> Result<(), InvalidField> {
        check_name("name", &self.name, false)?;
        check_name("address", &self.address, false)?;
        let port = self.address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none_or(|port| port == 0) {
            let problem = format!("is `{}`, it must be host:port", self.address);
            return Err(InvalidField { field: "address", problem });
        }
        check_name("server_name", &self.server_name, false)?;
        check_name("region", &self.region, true)?;
        if self.models.is_empty() || self.models.len() > MODELS_MAX {
            let problem = format!("has {} entries, 1..={MODELS_MAX} are allowed", self.models.len());
            return Err(InvalidField { field: "models", problem });
        }
        self.models.iter().try_for_each(|model| check_name("models.name", &model.name, false))
    }
}

impl LoadReport {
    /// Checks the number of prefixes and sorts them.
    pub fn checked(mut self) -> Result<Self, InvalidField> {
        if self.prefixes.len() > PREFIXES_PER_NODE_MAX {
            let problem = format!("has {} entries, at most {PREFIXES_PER_NODE_MAX} are allowed", self.prefixes.len());
            return Err(InvalidField { field: "prefixes", problem });
        }
        self.prefixes.sort_unstable();
        self.prefixes.dedup();
        Ok(self)
    }

    /// True if the node admits no further session.
    #[must_use]
    pub fn full(&self) -> bool {
        self.sessions_max > 0 && self.sessions >= self.sessions_max
    }
}

/// Parses 64 hex digits.
pub(crate) fn parse_digest(text: &str) -> Option<Digest> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut digest = Digest::default();
    for (byte, at) in digest.0.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use tandem_proto::ids::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
        let text = String::deserialize(from)?;
        super::parse_digest(&text).ok_or_else(|| D::Error::custom("a digest is 64 hex digits"))
    }
}

mod hex_digests {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use tandem_proto::ids::Digest;

    pub(super) fn serialize<S: Serializer>(digests: &[Digest], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(digests.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Digest>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        let parsed = texts.iter().map(|text| super::parse_digest(text));
        parsed.collect::<Option<_>>().ok_or_else(|| D::Error::custom("a digest is 64 hex digits"))
    }
}

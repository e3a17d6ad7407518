//! The secret by which a node that has restarted ends the connections of its last life.

use ring::hkdf;

/// Domain of the derivation.
const SALT: &[u8] = b"tandem stateless reset v1";

/// Keys of stateless resets and of the connection ids they belong to: the same after every start of a node,
/// unknown to all peers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResetKey {
    /// Of the tokens.
    pub(crate) tokens: [u8; 32],
    /// Of the connection ids.
    pub(crate) ids: u64,
}

impl ResetKey {
    /// From `secret`, which stays with the node, for the node called `name` where several share it.
    pub(crate) fn derive(secret: &[u8], name: &str) -> Self {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, SALT).extract(secret);
        let mut keys = [0; 64];
        for (part, label) in keys.chunks_mut(32).zip([&b"tokens"[..], b"ids"]) {
            // 32 bytes are what HKDF-SHA256 gives in one step, so neither call can fail.
            if let Ok(okm) = prk.expand(&[label, name.as_bytes()], hkdf::HKDF_SHA256) {
                let _ = okm.fill(part);
            }
        }
        let (mut tokens, mut ids) = ([0; 32], [0; 8]);
        tokens.copy_from_slice(&keys[..32]);
        ids.copy_from_slice(&keys[32..40]);
        Self { tokens, ids: u64::from_le_bytes(ids) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_same_for_one_node_and_differ_between_nodes() {
        let key = ResetKey::derive(b"secret", "a");
        assert!(key == ResetKey::derive(b"secret", "a"));
        for other in [ResetKey::derive(b"secret", "b"), ResetKey::derive(b"another", "a")] {
            assert!(key.tokens != other.tokens && key.ids != other.ids);
        }
        assert!(key.tokens != [0; 32] && key.ids != 0);
    }
}

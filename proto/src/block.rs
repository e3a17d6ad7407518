//! Identity of KV blocks: the one definition of a block hash.
//!
//! A block's id is a recipe (model, layers, arithmetic, tokens), not a checksum: two sides that
//! agree on the id mean the same numbers. The payload has a digest of its own.

use crate::ids::Digest;
use crate::limits::KV_BLOCK_TOKENS;
use crate::message::KvShape;

/// Domain separation of the root hash; the number is the version of this recipe.
const DOMAIN: &[u8] = b"tandem-kv-1";

/// Key of a tenant's block ids, from its identity: the public key of the authority that vouches for its
/// certificates, and its name there. Two tenants never share an id, nor do two fleets. The key is no secret:
/// who may see a tenant's blocks is decided by certificates.
#[must_use]
pub fn tenant_key(authority: &[u8], tenant: &str) -> [u8; 32] {
    let mut h = blake3::Hasher::new_derive_key("tandem 2026 tenant key for KV block ids");
    h.update(&(authority.len() as u64).to_le_bytes());
    h.update(authority);
    h.update(tenant.as_bytes());
    *h.finalize().as_bytes()
}

/// Chain of block ids of one token sequence under one recipe.
#[derive(Clone, Debug)]
pub struct BlockChain {
    tenant_key: [u8; 32],
    parent: Digest,
    next_index: u32,
}

impl BlockChain {
    /// Starts a chain. `trunk` is the cumulative digest of the layers (embedding, configuration and
    /// weights up to `shape.layer_to`), `numerics` names the arithmetic.
    #[must_use]
    pub fn new(tenant_key: [u8; 32], trunk: Digest, numerics: &str, shape: &KvShape) -> Self {
        let mut h = blake3::Hasher::new_keyed(&tenant_key);
        h.update(DOMAIN);
        h.update(&trunk.0);
        h.update(&(numerics.len() as u32).to_le_bytes());
        h.update(numerics.as_bytes());
        for n in [shape.layer_from, shape.layer_to, shape.width, shape.hidden, KV_BLOCK_TOKENS as u32] {
            h.update(&n.to_le_bytes());
        }
        Self { tenant_key, parent: Digest(*h.finalize().as_bytes()), next_index: 0 }
    }

    /// Id of the last block; before the first one, of the recipe.
    #[must_use]
    pub fn id(&self) -> Digest {
        self.parent
    }

    /// Id of the next block, which holds `tokens`. A partial block has an id of its own.
    pub fn push(&mut self, tokens: &[u32]) -> Digest {
        let mut h = blake3::Hasher::new_keyed(&self.tenant_key);
        h.update(&self.parent.0);
        h.update(&self.next_index.to_le_bytes());
        for t in tokens {
            h.update(&t.to_le_bytes());
        }
        self.parent = Digest(*h.finalize().as_bytes());
        self.next_index += 1;
        self.parent
    }

    /// Ids of all blocks of `tokens`, the last one possibly partial.
    pub fn ids(mut self, tokens: &[u32]) -> alloc::vec::Vec<Digest> {
        tokens.chunks(KV_BLOCK_TOKENS).map(|c| self.push(c)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> KvShape {
        KvShape { layer_from: 0, layer_to: 2, width: 80, hidden: 256 }
    }

    fn ids(key: u8, numerics: &str, shape: &KvShape, tokens: &[u32]) -> alloc::vec::Vec<Digest> {
        BlockChain::new([key; 32], Digest::of(b"trunk"), numerics, shape).ids(tokens)
    }

    #[test]
    fn equal_recipes_agree_and_a_shared_prefix_shares_ids() {
        let long: alloc::vec::Vec<u32> = (0..100).collect();
        let mut other = long.clone();
        other[70] = 9999;
        let (a, b) = (ids(1, "n", &shape(), &long), ids(1, "n", &shape(), &other));
        assert_eq!(a.len(), 4);
        assert_eq!(a[..2], b[..2]);
        assert_ne!(a[2], b[2]);
        assert_ne!(a[3], b[3], "an id covers everything before its block");
    }

    #[test]
    fn a_tenant_is_its_name_under_its_authority() {
        let keys = [(&b"ca"[..], "a"), (b"ca", "b"), (b"cb", "a"), (b"c", "aa"), (b"caa", "")]
            .map(|(authority, tenant)| tenant_key(authority, tenant));
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key), "{i}");
        }
        assert_eq!(keys[0], tenant_key(b"ca", "a"));
    }

    #[test]
    fn every_part_of_the_recipe_changes_the_id() {
        let base = ids(1, "n", &shape(), &[1, 2, 3]);
        assert_ne!(base, ids(2, "n", &shape(), &[1, 2, 3]), "tenant");
        assert_ne!(base, ids(1, "m", &shape(), &[1, 2, 3]), "arithmetic");
        assert_ne!(base, ids(1, "n", &KvShape { layer_to: 3, ..shape() }, &[1, 2, 3]), "layers");
        assert_ne!(base, ids(1, "n", &KvShape { hidden: 0, ..shape() }, &[1, 2, 3]), "hidden");
        assert_ne!(base, ids(1, "n", &shape(), &[1, 2]), "tokens");
    }
}

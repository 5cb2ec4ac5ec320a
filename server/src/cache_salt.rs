//! Who shares what is cached: requests of one tenant that name the same `cache_salt`.

/// Whose requests share caches: those of one API key, or everybody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant([u8; 32]);

impl Tenant {
    /// Everybody: a server without keys, or with `--cache-shared`.
    pub const SHARED: Self = Self([0; 32]);

    /// The holders of `key`, which cannot be read back from this.
    pub fn of_key(key: &[u8]) -> Self {
        Self(blake3::derive_key("moesaic 2026 tenant of an API key", key))
    }
}

/// Goes into the name of everything that is cached: who has another salt can neither read it nor, by timing, learn that
/// it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salt([u8; 32]);

impl Salt {
    pub fn new(tenant: Tenant, cache_salt: Option<&str>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("moesaic 2026 salt of cached prefixes and outputs");
        // The tenant has a fixed length, so that the two cannot run into each other; none is not blank, which is refused.
        hasher.update(&tenant.0).update(cache_salt.unwrap_or_default().as_bytes());
        Self(hasher.finalize().into())
    }

    pub fn bytes(self) -> [u8; 32] {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_and_their_salts_are_all_apart() {
        let tenants = [Tenant::SHARED, Tenant::of_key(b"one"), Tenant::of_key(b"two")];
        let salts: Vec<Salt> = tenants
            .iter()
            .flat_map(|&tenant| [None, Some("a"), Some("b"), Some("ab")].map(|salt| Salt::new(tenant, salt)))
            .collect();
        for (idx, salt) in salts.iter().enumerate() {
            assert!(!salts[..idx].contains(salt), "{idx}");
        }
        assert_eq!(Salt::new(Tenant::of_key(b"one"), Some("a")), salts[5]);
    }
}

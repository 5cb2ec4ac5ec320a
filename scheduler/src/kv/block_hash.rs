//! The names of full blocks: equal exactly where the blocks hold the same bytes and may be shared.

/// blake3 over a block's tokens and, through its parent, all tokens before them, the salt and the fingerprint. Two
/// blocks of equal names are taken for equal: 256 bits do not collide.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub(crate) struct BlockHash([u8; 32]);

/// What a hash is taken of, as its first byte: no root is a block's name.
const ROOT: u8 = 0;
const BLOCK: u8 = 1;

impl BlockHash {
    /// What is above the first block of every sequence of this `salt`, under numerics of this `fingerprint`.
    pub(crate) fn root(fingerprint: &[u8; 32], salt: &[u8; 32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[ROOT]).update(fingerprint).update(salt);
        Self(hasher.finalize().into())
    }

    pub(crate) fn bytes(self) -> [u8; 32] {
        self.0
    }

    pub(crate) fn child(self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[BLOCK]).update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }
}

/// The names of one sequence's full blocks, in order.
#[derive(Debug)]
pub(crate) struct BlockHashes {
    block_size: usize,
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl BlockHashes {
    pub(crate) fn new(block_size: usize, root: BlockHash) -> Self {
        Self { block_size, root, hashes: Vec::new() }
    }

    /// Names the full blocks of `tokens`, all of a sequence so far; what was named before is not looked at again.
    pub(crate) fn extend(&mut self, tokens: &[u32]) {
        for block in tokens.chunks_exact(self.block_size).skip(self.hashes.len()) {
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(parent.child(block));
        }
    }

    pub(crate) fn as_slice(&self) -> &[BlockHash] {
        &self.hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(fingerprint: u8, salt: u8, tokens: &[u32]) -> Vec<BlockHash> {
        let mut hashes = BlockHashes::new(2, BlockHash::root(&[fingerprint; 32], &[salt; 32]));
        hashes.extend(tokens);
        hashes.as_slice().to_vec()
    }

    #[test]
    fn a_name_tells_everything_before_it() {
        let base = names(1, 2, &[5, 6, 7, 8, 9]);
        assert_eq!(base.len(), 2, "the last block is not full");
        assert_eq!(names(1, 2, &[5, 6, 7, 8]), base);
        let later = names(1, 2, &[5, 6, 7, 9]);
        assert!(later[0] == base[0] && later[1] != base[1]);
        for other in [names(1, 2, &[4, 6, 7, 8]), names(3, 2, &[5, 6, 7, 8]), names(1, 3, &[5, 6, 7, 8])] {
            assert!(other[0] != base[0] && other[1] != base[1]);
        }
    }

    #[test]
    fn names_grow_with_the_sequence() {
        let mut hashes = BlockHashes::new(2, BlockHash::root(&[0; 32], &[0; 32]));
        (0..=5).for_each(|len| hashes.extend(&[1, 2, 3, 4, 5][..len]));
        assert_eq!(hashes.as_slice(), names(0, 0, &[1, 2, 3, 4, 5]));
    }
}

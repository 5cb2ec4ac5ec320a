//! The bytes behind the scheduler's blocks: one paged cache per site of the model, all with the same block numbers.

use kernels::{KvFormat, PagedCache};

use crate::error::EngineError;
use crate::models::CacheSite;

/// Slabs are the unit of growth; a slab's memory is committed by the system when it is first written.
const BLOCKS_PER_SLAB: usize = 1024;

pub struct KvArena {
    sites: Vec<PagedCache>,
}

impl KvArena {
    /// Room for at least `num_blocks` blocks of `block_size` tokens at every site.
    pub fn new(
        sites: &[CacheSite],
        format: KvFormat,
        block_size: usize,
        num_blocks: usize,
    ) -> Result<Self, EngineError> {
        let blocks_per_slab = num_blocks.clamp(1, BLOCKS_PER_SLAB);
        let new_site = |site: &CacheSite| {
            let mut cache = PagedCache::new(format, block_size, site.width(), blocks_per_slab)?;
            while cache.num_blocks() < num_blocks {
                cache.add_slab()?;
            }
            Ok(cache)
        };
        Ok(Self { sites: sites.iter().map(new_site).collect::<Result<_, EngineError>>()? })
    }

    pub fn site_mut(&mut self, site: usize) -> &mut PagedCache {
        &mut self.sites[site]
    }
}

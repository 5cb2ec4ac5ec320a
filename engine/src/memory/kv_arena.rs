//! The bytes behind the scheduler's blocks and state slots: one cache per site of the model. All sites of a kind have the
//! same numbers: those that keep every position, those that keep a window, those that keep a state.

use candle_core::Device;
use kernels::{KvFormat, PagedCache, StateCache};

use scheduler::{BlockId, StateCopy, WindowConfig};

use crate::error::EngineError;
use crate::memory::BlockCoding;
use crate::models::CacheSite;

/// Slabs are the unit of growth; a slab's memory is committed by the system when it is first written. Other devices have one slab.
const BLOCKS_PER_SLAB: usize = 1024;

pub struct KvArena {
    sites: Vec<SiteCache>,
}

enum SiteCache {
    Paged { cache: PagedCache, has_window: bool },
    State(StateCache),
}

/// How much an arena holds.
#[derive(Clone, Copy, Debug)]
pub struct ArenaSize {
    pub format: KvFormat,
    pub block_size: usize,
    pub num_blocks: usize,
    /// Of the sites with a window of at most this length.
    pub window: Option<WindowConfig>,
    /// Those of running sequences and those that are kept for others; 0 for models without recurrent sites.
    pub num_state_slots: usize,
}

impl KvArena {
    /// Room for at least `size.num_blocks` or `size.window.num_blocks` blocks at every site that keeps something per token,
    /// and for `size.num_state_slots` states at the others.
    pub fn new(sites: &[CacheSite], size: ArenaSize, device: &Device) -> Result<Self, EngineError> {
        let new_site = |site: &CacheSite| {
            if let CacheSite::Recurrent { width } = *site {
                return Ok(SiteCache::State(StateCache::on(device, width, size.num_state_slots)?));
            }
            let window = size.window.filter(|window| site.has_window_within(Some(window.len)));
            let num_blocks = window.map_or(size.num_blocks, |window| window.num_blocks);
            let most = if device.is_cpu() { BLOCKS_PER_SLAB } else { num_blocks.max(1) };
            let (blocks_per_slab, width) = (num_blocks.clamp(1, most), site.token_width());
            let mut cache = PagedCache::on(device, size.format, size.block_size, width, blocks_per_slab)?;
            while cache.num_blocks() < num_blocks {
                cache.add_slab()?;
            }
            Ok(SiteCache::Paged { cache, has_window: window.is_some() })
        };
        Ok(Self { sites: sites.iter().map(new_site).collect::<Result<_, EngineError>>()? })
    }

    /// True if some sites keep a window in blocks of their own.
    pub fn has_windows(&self) -> bool {
        self.sites.iter().any(|site| matches!(site, SiteCache::Paged { has_window: true, .. }))
    }

    /// Keys and values, or latents, of a site that keeps them, and whether in the blocks of windows.
    pub fn paged_mut(&mut self, site: usize) -> (&mut PagedCache, bool) {
        match &mut self.sites[site] {
            SiteCache::Paged { cache, has_window } => (cache, *has_window),
            SiteCache::State(_) => panic!("site {site} is recurrent"),
        }
    }

    /// Bytes of one block at all sites that keep something per token.
    pub fn block_len(&self, coding: BlockCoding) -> usize {
        self.paged().map(|cache| coding.len(cache)).sum()
    }

    /// Adds the bytes of a block, site after site, to `bytes`. Fails if a device does.
    pub fn read_block(&self, block: BlockId, coding: BlockCoding, bytes: &mut Vec<u8>) -> Result<(), EngineError> {
        self.paged().try_for_each(|cache| Ok(coding.read(cache, block.0 as usize, bytes)?))
    }

    /// Fills a block with what [`Self::read_block`] gave. Fails if a device does. Panics unless there are
    /// [`Self::block_len`] bytes.
    pub fn write_block(&mut self, block: BlockId, coding: BlockCoding, mut bytes: &[u8]) -> Result<(), EngineError> {
        for site in &mut self.sites {
            if let SiteCache::Paged { cache, .. } = site {
                let (own, rest) = bytes.split_at(coding.len(cache));
                coding.write(cache, block.0 as usize, own)?;
                bytes = rest;
            }
        }
        assert!(bytes.is_empty(), "{} bytes belong to no site", bytes.len());
        Ok(())
    }

    fn paged(&self) -> impl Iterator<Item = &PagedCache> {
        self.sites.iter().filter_map(|site| match site {
            SiteCache::Paged { cache, .. } => Some(cache),
            SiteCache::State(_) => None,
        })
    }

    /// Copies whole states, at every recurrent site.
    pub fn copy_states(&mut self, copies: &[StateCopy]) -> Result<(), EngineError> {
        for site in &mut self.sites {
            if let SiteCache::State(states) = site {
                copies.iter().try_for_each(|copy| states.copy(copy.from.0, copy.to.0))?;
            }
        }
        Ok(())
    }

    /// States of a recurrent site.
    pub fn states_mut(&mut self, site: usize) -> &mut StateCache {
        match &mut self.sites[site] {
            SiteCache::State(cache) => cache,
            SiteCache::Paged { .. } => panic!("site {site} keeps something per token"),
        }
    }
}

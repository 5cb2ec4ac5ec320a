//! A model of numbers in which every mistake shows, and the random numbers of the simulation.

use std::ops::RangeInclusive;

use scheduler::{FinishReason, Request, WindowConfig};

const VOCAB_SIZE: u64 = 40;

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0, 0)
    }

    /// `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    pub fn percent(&mut self, chance: usize) -> bool {
        self.between(1, 100) <= chance
    }
}

fn mix(state: u64, input: u64) -> u64 {
    let mut mixed = state ^ input.wrapping_mul(0xd6e8_feb8_6659_fd93);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The entry of a decoder's position, from the one before it or the salt, all of the source's, and the token.
pub fn entry(before: Option<u64>, (salt, source): (u8, u64), token: u32) -> u64 {
    mix(before.unwrap_or(1 << 40 | u64::from(salt)) ^ source, u64::from(token) + 1)
}

/// The entries of a source: each knows all tokens.
pub fn encode(tokens: &[u32]) -> Vec<u64> {
    let all = tokens.iter().fold(2, |all, &token| mix(all, u64::from(token)));
    (0..tokens.len() as u64).map(|position| mix(all, position)).collect()
}

pub fn all_of(source: impl Iterator<Item = u64>) -> u64 {
    source.fold(0, mix)
}

/// The recurrent state after one more token; 0 before the first.
pub fn next_state(state: u64, token: u32) -> u64 {
    mix(state ^ 3, u64::from(token))
}

/// Positions that a row sees through a window.
pub fn seen_at(position: usize, window: WindowConfig) -> RangeInclusive<usize> {
    (position + 1).saturating_sub(window.len)..=position
}

pub fn sample(entry: u64) -> u32 {
    (entry % VOCAB_SIZE) as u32
}

/// What the request generates when nothing else exists.
pub fn generate_alone(request: &Request, has_states: bool, window: Option<WindowConfig>) -> (Vec<u32>, FinishReason) {
    let Request { prompt, source_len, stop, .. } = request;
    let source = all_of(encode(&prompt[..*source_len]).into_iter());
    let (mut entries, mut state) = (Vec::new(), 0);
    let mut read = |token| {
        let last = entry(entries.last().copied(), (request.cache_salt[0], source), token);
        entries.push(last);
        state = next_state(state, token);
        let in_window =
            window.map_or(0, |window| all_of(seen_at(entries.len() - 1, window).map(|position| entries[position])));
        last ^ in_window ^ if has_states { state } else { 0 }
    };
    let mut row = prompt[*source_len..].iter().map(|&token| read(token)).last().expect("the decoder reads something");
    let mut generated = Vec::new();
    loop {
        let token = sample(row);
        let may_stop = generated.len() >= stop.min_tokens;
        generated.push(token);
        if may_stop && stop.stop_token_ids.contains(&token) {
            return (generated, FinishReason::Stop(token));
        }
        if generated.len() == stop.max_tokens {
            return (generated, FinishReason::Length);
        }
        row = read(token);
    }
}

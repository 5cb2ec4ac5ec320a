//! Which experts the tokens of one block took, and which of them most: one bit per expert and layer.
//!
//! ```text
//! profile  a map for each layer
//! map      E bits, E the layer's experts, in ceil(E / 8) bytes, expert 0 the lowest bit of the first byte
//! ```
//! A map with fewer than four fifths of its bits set says which experts were used, and is exact. Where more were used, naming
//! them would waste the map, for "all" is right in four of five cases then: every expert counts as used, and the bits that are
//! *not* set are the ones used most, at most a fifth of all. No map can be read both ways. So no expert that was used is ever
//! missed, and at least four fifths of those that are named were used; whichever bits a map is made of.
//!
//! A list of ids with counts would say more, but is shorter than the map only where fewer than one of 16 experts was used, which
//! is so of hardly any block.

use bytes::Bytes;

use crate::codec::BadValue;

/// In place of an expert that did not run.
pub const NO_EXPERT: u16 = u16::MAX;

/// One router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedLayer {
    /// Experts that it chooses among.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
}

impl RoutedLayer {
    fn map_bytes(self) -> usize {
        self.num_experts.div_ceil(8)
    }

    /// Fewest bits of a map that stands for all experts.
    fn num_dense(self) -> usize {
        (self.num_experts * 4).div_ceil(5)
    }
}

/// How the expert that was used most weighs beside one that was used, where a map tells the two apart.
const HEAVY: f32 = 2.0;

/// The experts of one block's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    maps: Bytes,
}

impl Profile {
    /// Bytes of a profile over these layers.
    pub fn num_bytes(layers: &[RoutedLayer]) -> usize {
        layers.iter().map(|layer| layer.map_bytes()).sum()
    }

    /// Of the tokens of a block, each with its experts `[layer][top_k]` as `layers` say, or [`NO_EXPERT`].
    ///
    /// # Panics
    /// Any other expert that its layer has not.
    pub fn of_tokens(layers: &[RoutedLayer], experts: &[u16]) -> Self {
        let width: usize = layers.iter().map(|layer| layer.top_k).sum();
        let mut maps = vec![0; Self::num_bytes(layers)];
        let (mut rest, mut offset) = (maps.as_mut_slice(), 0);
        for layer in layers {
            let (map, behind) = rest.split_at_mut(layer.map_bytes());
            rest = behind;
            let mut counts = vec![0u32; layer.num_experts];
            for token in experts.chunks_exact(width) {
                for &expert in token[offset..offset + layer.top_k].iter().filter(|&&expert| expert != NO_EXPERT) {
                    counts[usize::from(expert)] += 1;
                }
            }
            offset += layer.top_k;
            fill(map, *layer, &counts);
        }
        Self { maps: maps.into() }
    }

    /// # Errors
    /// The bytes are no profile over these layers.
    pub fn from_bytes(layers: &[RoutedLayer], bytes: Bytes) -> Result<Self, BadValue> {
        if bytes.len() != Self::num_bytes(layers) {
            return Err(BadValue::Payload("not one map for each layer"));
        }
        let mut rest = &bytes[..];
        for layer in layers {
            let (map, behind) = rest.split_at(layer.map_bytes());
            rest = behind;
            if (layer.num_experts..map.len() * 8).any(|bit| is_set(map, bit)) {
                return Err(BadValue::Payload("an expert that the layer has not"));
            }
        }
        Ok(Self { maps: bytes })
    }

    pub fn to_bytes(&self) -> Bytes {
        self.maps.clone()
    }

    /// The experts of each layer with their share of its load, as far as a map tells: they add up to 1.
    pub fn shares(&self, layers: &[RoutedLayer]) -> Vec<Vec<(usize, f32)>> {
        self.maps_of(layers).map(|(layer, map)| shares(layer, map)).collect()
    }

    /// One map for each layer, in which the bits of all experts that count as used are set; in ceil(E / 8) bytes each.
    pub fn used(&self, layers: &[RoutedLayer]) -> Vec<u8> {
        let mut used = Vec::with_capacity(self.maps.len());
        for (layer, map) in self.maps_of(layers) {
            match is_dense(layer, map) {
                false => used.extend_from_slice(map),
                true => {
                    let start = used.len();
                    used.resize(start + map.len(), 0);
                    (0..layer.num_experts).for_each(|expert| set(&mut used[start..], expert));
                }
            }
        }
        used
    }

    fn maps_of<'a>(&'a self, layers: &'a [RoutedLayer]) -> impl Iterator<Item = (RoutedLayer, &'a [u8])> {
        layers.iter().scan(&self.maps[..], |rest, &layer| {
            let (map, behind) = rest.split_at(layer.map_bytes());
            *rest = behind;
            Some((layer, map))
        })
    }
}

fn fill(map: &mut [u8], layer: RoutedLayer, counts: &[u32]) {
    let num_used = counts.iter().filter(|&&count| count > 0).count();
    if num_used < layer.num_dense() {
        counts.iter().enumerate().filter(|&(_, &count)| count > 0).for_each(|(expert, _)| set(map, expert));
        return;
    }
    let mut heaviest: Vec<usize> = (0..layer.num_experts).collect();
    heaviest.sort_by_key(|&expert| std::cmp::Reverse(counts[expert]));
    heaviest.truncate(layer.num_experts - layer.num_dense());
    // Of equals none stands out.
    let mean = counts.iter().sum::<u32>() as f32 / layer.num_experts as f32;
    heaviest.retain(|&expert| counts[expert] as f32 > mean);
    (0..layer.num_experts).filter(|expert| !heaviest.contains(expert)).for_each(|expert| set(map, expert));
}

fn shares(layer: RoutedLayer, map: &[u8]) -> Vec<(usize, f32)> {
    let is_dense = is_dense(layer, map);
    let weight = |expert| match (is_dense, is_set(map, expert)) {
        (false, false) => 0.0,
        (true, false) => HEAVY,
        (_, true) => 1.0,
    };
    let mut shares: Vec<(usize, f32)> = (0..layer.num_experts).map(|expert| (expert, weight(expert))).collect();
    shares.retain(|&(_, weight)| weight > 0.0);
    let sum: f32 = shares.iter().map(|&(_, weight)| weight).sum();
    shares.iter_mut().for_each(|(_, weight)| *weight /= sum);
    shares
}

fn is_dense(layer: RoutedLayer, map: &[u8]) -> bool {
    map.iter().map(|byte| byte.count_ones() as usize).sum::<usize>() >= layer.num_dense()
}

fn is_set(map: &[u8], bit: usize) -> bool {
    map[bit / 8] >> (bit % 8) & 1 == 1
}

fn set(map: &mut [u8], bit: usize) {
    map[bit / 8] |= 1 << (bit % 8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layer(num_experts: usize, top_k: usize) -> RoutedLayer {
        RoutedLayer { num_experts, top_k }
    }

    fn experts_of(profile: &Profile, layers: &[RoutedLayer], idx: usize) -> Vec<usize> {
        profile.shares(layers)[idx].iter().map(|&(expert, _)| expert).collect()
    }

    #[test]
    fn few_experts_are_named_exactly() {
        let layers = [layer(12, 2), layer(300, 1)];
        // Two tokens of experts 3 and 11, then 299; 3 and 0, then 7.
        let profile = Profile::of_tokens(&layers, &[3, 11, 299, 3, 0, 7]);
        assert_eq!(profile.to_bytes().len(), 2 + 38);
        assert_eq!(&profile.to_bytes()[..2], &[0b1001, 0b1000]);
        assert_eq!(experts_of(&profile, &layers, 0), [0, 3, 11]);
        assert_eq!(profile.shares(&layers)[1], [(7, 0.5), (299, 0.5)]);
        assert_eq!(profile.used(&layers), profile.to_bytes());
    }

    #[test]
    fn of_many_experts_the_heaviest_are_named() {
        let layers = [layer(10, 1)];
        // All but 9, most of them once, 4 often and 2 twice: eight of ten would do.
        let tokens: Vec<u16> = [vec![4; 8], vec![2; 3], (0..9).collect()].concat();
        let profile = Profile::of_tokens(&layers, &tokens);
        assert_eq!(&profile.to_bytes()[..], &[0b1110_1011, 0b11]);
        assert_eq!(profile.used(&layers), [0xff, 0b11]);
        let shares = &profile.shares(&layers)[0];
        assert_eq!((shares.len(), shares[4].1, shares[0].1), (10, 2.0 / 12.0, 1.0 / 12.0));
        let even = Profile::of_tokens(&layers, &(0..10).collect::<Vec<u16>>());
        assert_eq!(&even.to_bytes()[..], &[0xff, 0b11], "none stands out");
    }

    #[test]
    fn other_bytes_are_refused() {
        let layers = [layer(12, 2), layer(8, 1)];
        let check = |bytes: &'static [u8]| Profile::from_bytes(&layers, Bytes::from_static(bytes));
        assert!(check(&[1, 2, 3]).is_ok());
        for bytes in [&[1u8, 2][..], &[1, 2, 3, 4], &[], &[1, 0x10, 3]] {
            assert!(check(bytes).is_err(), "{bytes:?}");
        }
        assert_eq!(check(&[0, 0, 0]).unwrap().shares(&layers), [vec![], vec![]], "an empty map names nobody");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_used_expert_is_named_and_four_of_five_named_ones_were_used(
            (num_experts, top_k, ids) in (1usize..300).prop_flat_map(|num_experts| {
                let top_k = 1usize..=num_experts.min(8);
                (Just(num_experts), top_k, prop::collection::vec(0..num_experts as u16, 8 * 32))
            }),
            num_tokens in 1usize..32,
        ) {
            let layers = [layer(1, 1), layer(num_experts, top_k)];
            let tokens: Vec<u16> =
                ids.chunks(8).take(num_tokens).flat_map(|ids| [&[0], &ids[..top_k]].concat()).collect();
            let profile = Profile::of_tokens(&layers, &tokens);
            prop_assert!(profile.to_bytes().len() <= 1 + num_experts.div_ceil(8));
            let again = Profile::from_bytes(&layers, profile.to_bytes()).unwrap();
            prop_assert_eq!(&again, &profile);
            let used: std::collections::BTreeSet<u16> =
                tokens.chunks(1 + top_k).flat_map(|token| token[1..].to_vec()).collect();
            let named = experts_of(&profile, &layers, 1);
            prop_assert!(used.iter().all(|&expert| named.contains(&usize::from(expert))), "recall is 1");
            prop_assert!(used.len() * 5 >= named.len() * 4, "{} of {} named were used", used.len(), named.len());
            let maps = profile.used(&layers);
            prop_assert_eq!((0..num_experts).filter(|&expert| is_set(&maps[1..], expert)).collect::<Vec<_>>(), named);
            let sum: f32 = profile.shares(&layers)[1].iter().map(|&(_, share)| share).sum();
            prop_assert!((sum - 1.0).abs() < 1e-3);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..8)) {
            let layers = [layer(9, 2), layer(20, 1)];
            if let Ok(profile) = Profile::from_bytes(&layers, bytes.into()) {
                prop_assert_eq!(profile.shares(&layers).len(), 2);
                prop_assert_eq!(profile.used(&layers).len(), 5);
            }
        }
    }
}

//! Writing into the paged cache.

use candle_core::Tensor;
use half::bf16;

use super::super::address::Address;
use super::{Number, bits, launch, outputs, stored, widened};
use crate::ops::paged_attention::cache_write::{Part, Parts};
use crate::paged_cache::{KvFormat, PagedCache};
use crate::testing::{Numbers, tensor, values};

const BLOCK_SIZE: usize = 5;
const NUM_BLOCKS: usize = 4;

/// Writes columns of one wide matrix: parts by their first column and their number of columns.
fn device_write<T: Number, Cache: Number>(
    wide: &[T],
    stride: usize,
    parts: &[(usize, usize)],
    slots: &[u32],
) -> Vec<Cache> {
    let width: usize = parts.iter().map(|part| part.1).sum();
    let [cache] = outputs(NUM_BLOCKS * BLOCK_SIZE * width, |seed, [cache]: [*mut Cache; 1]| {
        let part = |&(first, width): &(usize, usize)| Part {
            rows: Address::of_host(wide[first..].as_ptr()),
            stride,
            width: width as u32,
        };
        let all = Parts::new(&parts.iter().map(part).collect::<Vec<_>>());
        let (kernel, width) = (format!("cache_write_{}_{}", T::NAME, Cache::NAME), width as i32);
        // SAFETY: the arguments of the kernel; every part has a row for each slot, and every slot is in the cache.
        unsafe { launch(&kernel, slots.len(), seed, &[&all, &slots.as_ptr(), &cache, &width]) };
    });
    cache
}

fn check<T: Number, Cache: Number>(format: KvFormat) {
    let mut numbers = Numbers::new(20);
    for (parts, slots) in [
        (&[(0, 1)][..], &[7u32][..]),
        (&[(3, 64), (70, 300)], &[19, 0, 3, 12]),
        (&[(5, 33), (40, 7), (1, 2)], &[6, 5, 4]),
        (&[(0, 512), (512, 64)], &[1, 2]),
    ] {
        let stride = 577;
        let mut wide = stored::<T>(&numbers.with_outliers(slots.len() * stride));
        wide[parts[0].0] = T::from_f32(f32::NAN);
        let found = device_write::<T, Cache>(&wide, stride, parts, slots);
        let width = parts.iter().map(|part| part.1).sum();
        let mut cache = PagedCache::new(format, BLOCK_SIZE, width, NUM_BLOCKS).unwrap();
        cache.add_slab().unwrap();
        let matrix = tensor(&widened(&wide), &[slots.len(), stride]);
        let columns: Vec<Tensor> = parts.iter().map(|&(first, len)| matrix.narrow(1, first, len).unwrap()).collect();
        cache.write_parts(&columns.iter().collect::<Vec<_>>(), slots).unwrap();
        let expected = values(&cache.read(slots).unwrap());
        for (slot, row) in found.chunks(width).enumerate() {
            let expected = match slots.iter().position(|&written| written as usize == slot) {
                Some(row_idx) => stored::<Cache>(&expected[row_idx * width..(row_idx + 1) * width]),
                None => vec![Cache::POISON; width],
            };
            assert_eq!(bits(row), bits(&expected), "slot {slot} of {} in {}", T::NAME, Cache::NAME);
        }
    }
}

#[test]
fn the_cache_holds_the_rows_as_on_the_cpu() {
    check::<f32, f32>(KvFormat::F32);
    check::<f32, bf16>(KvFormat::Bf16);
    check::<bf16, f32>(KvFormat::F32);
    check::<bf16, bf16>(KvFormat::Bf16);
}

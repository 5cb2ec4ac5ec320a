//! Caches: rows into blocks, blocks as bytes, copies of states.

use candle_core::{DType, Device, Tensor};

use super::{DEVICE, moved, on_both};
use crate::paged_cache::{KvFormat, PagedCache};
use crate::state_cache::StateCache;
use crate::testing::{Numbers, bits, tensor, values};

const FORMATS: [KvFormat; 2] = [KvFormat::F32, KvFormat::Bf16];
const BLOCK_SIZE: usize = 5;
const NUM_BLOCKS: usize = 9;

/// Of the CPU and of the device.
fn caches(format: KvFormat, width: usize) -> [PagedCache; 2] {
    [&Device::Cpu, &*DEVICE].map(|device| {
        let mut cache = PagedCache::on(device, format, BLOCK_SIZE, width, NUM_BLOCKS).unwrap();
        cache.add_slab().unwrap();
        cache
    })
}

#[track_caller]
fn assert_alike(caches: &[PagedCache; 2]) {
    let slots: Vec<u32> = (0..(BLOCK_SIZE * NUM_BLOCKS) as u32).collect();
    let [expected, found] = caches.each_ref().map(|cache| bits(&cache.read(&slots).unwrap()));
    assert_eq!(found, expected);
}

#[test]
fn rows_are_stored_as_on_the_cpu() {
    let mut numbers = Numbers::new(50);
    for (parts, slots) in [
        (&[(0, 1)][..], &[7u32][..]),
        (&[(0, 577)], &[44, 0]),
        (&[(3, 64), (70, 300)], &[19, 0, 3, 12, 44]),
        (&[(5, 33), (40, 7), (1, 2)], &[6, 5, 4]),
        // More than a launch takes.
        (&[(5, 33), (40, 7), (1, 2), (0, 1), (200, 9)], &[6, 5, 4, 43]),
    ] {
        let mut wide = numbers.with_outliers(slots.len() * 577);
        wide[parts[0].0] = f32::NAN;
        let width = parts.iter().map(|part| part.1).sum();
        for (matrix, device_matrix, _) in on_both(&tensor(&wide, &[slots.len(), 577])) {
            for format in FORMATS {
                let mut caches = caches(format, width);
                for (cache, matrix) in caches.iter_mut().zip([&matrix, &device_matrix]) {
                    let columns = parts.iter().map(|&(first, len)| matrix.narrow(1, first, len).unwrap());
                    let columns: Vec<Tensor> = columns.collect();
                    cache.write_parts(&columns.iter().collect::<Vec<_>>(), slots).unwrap();
                }
                assert_alike(&caches);
            }
        }
    }
}

/// Of two types, of columns that are rows of another matrix, and of rows that begin anywhere.
#[test]
fn parts_lie_as_they_are() {
    let mut numbers = Numbers::new(51);
    let (one, other) = (numbers.tensor(&[7, 6]), numbers.tensor(&[1, 5]));
    for format in FORMATS {
        let mut caches = caches(format, 12);
        let other = other.to_dtype(DType::BF16).unwrap();
        let device_parts = [moved(&one), moved(&other)];
        let parts = [one.clone(), other.to_dtype(DType::F32).unwrap()];
        for (cache, [one, other]) in caches.iter_mut().zip([parts, device_parts]) {
            // A column is as wide as its stride says nothing about, and a row may be all rows.
            let column = one.t().unwrap().narrow(0, 2, 1).unwrap().t().unwrap().narrow(0, 2, 3).unwrap();
            let rows = one.narrow(0, 3, 3).unwrap();
            let same = other.broadcast_as((3, 5)).unwrap();
            cache.write_parts(&[&column, &same, &rows], &[9, 33, 2]).unwrap();
        }
        assert_alike(&caches);
    }
}

#[test]
fn blocks_leave_and_come_back_as_bytes() {
    for format in FORMATS {
        let mut caches = caches(format, 6);
        let rows = Numbers::new(52).tensor(&[15, 6]);
        let slots: Vec<u32> = (20..35).collect();
        for (cache, rows) in caches.iter_mut().zip([&rows, &moved(&rows)]) {
            cache.write(rows, &slots).unwrap();
        }
        for block in 0..NUM_BLOCKS {
            let [expected, found] = caches.each_ref().map(|cache| cache.block_bytes(block).unwrap());
            assert_eq!(found, expected);
        }
        let taken = caches[0].block_bytes(5).unwrap().into_owned();
        for cache in &mut caches {
            cache.fill_block(8, |bytes| bytes.copy_from_slice(&taken)).unwrap();
            cache.fill_block(0, |bytes| bytes.copy_from_slice(&taken)).unwrap();
        }
        assert_alike(&caches);
        assert_eq!(bits(&caches[1].read(&[41]).unwrap()), bits(&caches[0].read(&[26]).unwrap()));
    }
}

#[test]
fn a_device_has_one_slab_at_a_time() {
    let mut cache = PagedCache::on(&DEVICE, KvFormat::F32, 4, 6, 2).unwrap();
    let row = moved(&Numbers::new(53).tensor(&[1, 6]));
    assert!(!cache.remove_last_slab());
    assert!(cache.write(&row, &[0]).is_err());
    cache.add_slab().unwrap();
    assert!(cache.add_slab().is_err());
    assert_eq!(cache.num_blocks(), 2);
    cache.write(&row, &[7]).unwrap();
    assert!(cache.write(&row, &[8]).is_err());
    assert!(cache.remove_last_slab());
    assert_eq!(cache.num_blocks(), 0);
    cache.add_slab().unwrap();
    assert_eq!(values(&cache.read(&[7]).unwrap()), [0.0; 6]);
}

#[test]
fn rows_of_another_device_or_type_are_refused() {
    let rows = Numbers::new(54).tensor(&[1, 6]);
    let [mut on_cpu, mut on_device] = caches(KvFormat::Bf16, 6);
    assert!(on_cpu.write(&moved(&rows), &[0]).is_err());
    assert!(on_device.write(&rows, &[0]).is_err());
    assert!(on_device.write(&moved(&rows.to_dtype(DType::F16).unwrap()), &[0]).is_err());
    assert!(on_cpu.write(&rows.to_dtype(DType::BF16).unwrap(), &[0]).is_err());
    assert!(on_device.write(&moved(&rows), &[0]).is_ok());
    assert!(on_device.write(&moved(&rows).narrow(0, 0, 0).unwrap(), &[]).is_ok());
}

#[test]
fn states_are_copied_whole() {
    let mut states = StateCache::on(&DEVICE, 3, 4).unwrap();
    assert_eq!(states.read(), [0.0; 12]);
    let numbered: Vec<f32> = (0..12).map(|i| i as f32).collect();
    states.fill(&numbered);
    states.copy(3, 1).unwrap();
    states.copy(0, 2).unwrap();
    states.copy(2, 2).unwrap();
    assert_eq!(states.read(), [0.0, 1.0, 2.0, 9.0, 10.0, 11.0, 0.0, 1.0, 2.0, 9.0, 10.0, 11.0]);
    assert!(states.copy(0, 4).is_err() && states.copy(4, 0).is_err());
    assert!(StateCache::on(&DEVICE, 0, 2).is_err());
}

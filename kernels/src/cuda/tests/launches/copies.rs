//! Copies between host and device, through memory that is used again and again.

use std::thread;

use super::DEVICE;
use crate::cuda::kept::{upload_kept, upload_recent};
use crate::cuda::memory::{download, read_all, scratch, upload, write};

/// Of a copy, `PIECE_BYTES` of `staging.rs`, in words.
const PIECE: usize = 1 << 20;

fn numbers(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|idx| idx.wrapping_mul(2_654_435_761) ^ seed).collect()
}

#[test]
fn copies_of_all_lengths_come_back() {
    let device = DEVICE.as_cuda_device().unwrap();
    for len in [0, 1, 15, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, 6 * PIECE - 7] {
        let values = numbers(len, len as u32);
        let found = download(device, &upload(device, &values).unwrap()).unwrap();
        assert_eq!(found[..len], values, "{len}");
    }
}

#[test]
fn parts_are_written_and_read_where_they_are() {
    let device = DEVICE.as_cuda_device().unwrap();
    let mut target = scratch::<u32>(device, 5 * PIECE).unwrap();
    write(device, &mut target, 0, &vec![7; 5 * PIECE]).unwrap();
    let parts = [(3, 10), (PIECE + 1, 2 * PIECE), (4 * PIECE - 3, 0), (4 * PIECE, PIECE)];
    for (idx, (start, len)) in parts.into_iter().enumerate() {
        write(device, &mut target, start, &numbers(len, idx as u32)).unwrap();
    }
    // More places than there is room for at once, some longer than a copy.
    let mut found: Vec<Vec<u32>> = (0..40).map(|idx| vec![0; parts[idx % 4].1]).collect();
    let places = found.iter_mut().enumerate().map(|(idx, part)| (&target, parts[idx % 4].0, part.as_mut_slice()));
    read_all(device, places).unwrap();
    for (idx, part) in found.iter().enumerate() {
        assert_eq!(*part, numbers(parts[idx % 4].1, idx as u32 % 4), "{idx}");
    }
    let all = download(device, &target).unwrap();
    assert_eq!((all[2], all[13], all[PIECE], all[3 * PIECE + 1]), (7, 7, 7, 7));
}

#[test]
#[should_panic(expected = "2 from 9 on of 10 numbers")]
fn nothing_is_written_behind_the_end() {
    let device = DEVICE.as_cuda_device().unwrap();
    let mut target = scratch::<u32>(device, 10).unwrap();
    write(device, &mut target, 9, &[1, 2]).unwrap();
}

/// What is uploaded may change at once: the ring has it, in which others overtake each other.
#[test]
fn many_threads_copy_at_once() {
    let device = DEVICE.as_cuda_device().unwrap();
    thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                for round in 0..50 {
                    let len = 1 + (round * 7919 + seed * 104_729) % (PIECE / 2);
                    let mut values = numbers(len, (seed * 1000 + round) as u32);
                    let copy = upload(device, &values).unwrap();
                    values.fill(0);
                    let expected = numbers(len, (seed * 1000 + round) as u32);
                    assert!(download(device, &copy).unwrap() == expected, "{seed} {round}");
                }
            });
        }
    });
}

#[test]
fn equal_lists_are_copied_once() {
    let device = DEVICE.as_cuda_device().unwrap();
    let start_of = |values: &[f32]| upload_kept(device, values).unwrap().start().raw();
    // Equal bits, not equal numbers.
    let lists = [&[1.0, f32::NAN][..], &[0.0, 11.0], &[-0.0, 11.0]];
    let starts = lists.map(start_of);
    assert_eq!(lists.map(start_of), starts);
    assert!(starts[1] != starts[2]);
    let first = upload_recent(device, &[1, 2, 3]).unwrap();
    assert_eq!(upload_recent(device, &[1, 2, 3]).unwrap().start().raw(), first.start().raw());
    assert!(upload_recent(device, &[1, 2, 4]).unwrap().start().raw() != first.start().raw());
}

//! The formats against hand-made blocks, and against what ggml's Python package makes of random ones.

use super::*;

fn check(format: BlockFormat, header: &[f32], payload: &[u8], expected: impl Fn(usize) -> f32) {
    let mut block: Vec<u8> = header.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    block.extend_from_slice(payload);
    assert_eq!(block.len(), format.block_bytes());
    // Two blocks: the second must not read the first.
    let bytes = [block.clone(), block].concat();
    let mut out = vec![0.0; 2 * format.block_len()];
    format.dequantize(&bytes, &mut out);
    for (i, value) in out.iter().enumerate() {
        assert_eq!(*value, expected(i % format.block_len()), "{format:?} element {i}");
    }
}

#[test]
fn blocks_widen_as_the_layout_says() {
    // Byte j holds element j (value j) and element j + 16 (value 15 - j).
    let nibbles: Vec<u8> = (0..16).map(|j| j | ((15 - j) << 4)).collect();
    let nibble = |i: usize| if i < 16 { i as f32 } else { (31 - i) as f32 };
    check(BlockFormat::Q4_0, &[0.5], &nibbles, |i| 0.5 * (nibble(i) - 8.0));
    check(BlockFormat::Q4_1, &[0.25, -3.0], &nibbles, |i| 0.25 * nibble(i) - 3.0);
    let signed: Vec<u8> = (0..32).map(|i: i32| (i * 8 - 128) as i8 as u8).collect();
    check(BlockFormat::Q8_0, &[2.0], &signed, |i| 2.0 * (i as f32 * 8.0 - 128.0));
}

/// A random block and what `gguf.quants.dequantize` (0.19.0) gives for it.
struct Vector {
    format: BlockFormat,
    hex: &'static str,
    /// Some elements.
    picks: [(usize, f32); 3],
    /// FNV-1a over the bits of all elements, a whole f32 at a time.
    hash: u64,
}

const VECTORS: [Vector; 6] = [
    Vector {
        format: BlockFormat::Q5_0,
        hex: "c028e5f1a94106a0956a26afbccdafe562f90a945f56",
        picks: [(1, -0.59375), (16, 0.0), (31, -0.40820312)],
        hash: 0x3a3a8a6157575a5,
    },
    Vector {
        format: BlockFormat::Q5_1,
        hex: "4c220d20ab2da7394551370e99b2d74c3427fa48d732a1df",
        picks: [(1, 0.21698761), (16, 0.25388336), (31, 0.16779327)],
        hash: 0xc2a37676533a7ba5,
    },
    Vector {
        format: BlockFormat::Q4K,
        hex: "4c220d2026115901dd06f27f8f063cd25e19a621f9bd0ccc21397c1ec795ca7748dc03d17a88934d85527357a2e64647\
         f03e2fb81f223f4192c58efd5185f0711ef7677a1f132a818d882195a100b28d6b236b82481bd9fe630dc3ce3be4ebca\
         b72f45b35223479f6e794d57037e2cfde9e15a7789781e3721a557d8e5a703296dcb81db3f65cf9c1bdc5d1d8fc83f0b",
        picks: [(1, 3.976677), (16, 3.5093307), (255, -0.22943878)],
        hash: 0x6859df8601ae97a5,
    },
    Vector {
        format: BlockFormat::Q5K,
        hex: "4c220d20be572209851d3d24f4c0cf83fe4363f82f4759778955f6ced681cbea7179ced2c8f814a13472ff70ce369d83\
         85452a44f318337f08cd1e614f235d3f83bc45fee9ee0403a79be118544441317c9311f85e0429b19f7ec0e156f65a33\
         22e791b880ee995e3f0d307d2fbaf400693a179e0d027ed4e58be7a9ebc28a271d43a78855638144eb6603f7b2725de1\
         1fe6ac2f88a68182869793f0aad6ded8116e3ab51681c4a374fec70a68b3e4bd",
        picks: [(1, 15.973198), (16, 14.4481735), (255, 0.93289185)],
        hash: 0x5c3f842270a324c9,
    },
    Vector {
        format: BlockFormat::Q6K,
        hex: "c92b387987416c17ec90963ec766888ab4b80eba7c5cfd81121bea9cee1810dfd5169faf26cd7b5c30c8aba44d972299\
         e8c7b41b9a1d2b0f180600a974d63b6332202c998e82b2522c49c4394c7d73265b6aaf61b288fbd0aecfa76661622361\
         1e764c93aa388ffabd0a6a6412b209971e2d827076f7e49ab8fa197271be53a3442b128cdad72bad0f8aeef42a0b9a26\
         d74fc78f2562b8701097a55b5510543d27ed600de3200a6749307fd37899c118819af6674394c3f7aa5f93f32c810a37\
         ca7bf1013ccdf8ab8ab4a6039954e84c5d98",
        picks: [(1, 3.1062813), (16, -5.2410507), (255, 3.56221)],
        hash: 0x3a5adb6d68ff693f,
    },
    Vector {
        format: BlockFormat::Mxfp4,
        hex: "7983c3df8375c517b4e786a9aadf7488f8",
        picks: [(1, 0.0234375), (16, 0.0), (31, -0.09375)],
        hash: 0x2d42ae59cecaf5a5,
    },
];

#[test]
fn random_blocks_widen_as_in_ggml() {
    for Vector { format, hex, picks, hash } in VECTORS {
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let mut out = vec![0.0; format.block_len()];
        format.dequantize(&bytes, &mut out);
        for (idx, expected) in picks {
            assert_eq!(out[idx], expected, "{format:?} element {idx}");
        }
        let fnv = |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0000_01b3);
        assert_eq!(out.iter().fold(0xcbf2_9ce4_8422_2325, fnv), hash, "{format:?}");
    }
}

#[test]
fn codes_scales_and_mins_are_the_elements() {
    for format in BlockFormat::ALL {
        // Every other bit pattern is as good; no f16 among them is infinite.
        let bytes: Vec<u8> = (0..format.block_bytes()).map(|idx| (idx * 37 % 113) as u8).collect();
        let mut block = Block::default();
        format.read(&bytes, &mut block);
        let mut out = vec![0.0; format.block_len()];
        format.dequantize(&bytes, &mut out);
        for (idx, value) in out.into_iter().enumerate() {
            let (code, group) = (block.codes[idx], idx / format.group_len());
            let expected = match format.levels() {
                Levels::Centered { center } => block.scales[group] * (f32::from(code) - f32::from(center)),
                Levels::Shifted => block.scales[group] * f32::from(code) + block.mins[group],
                Levels::Fp4 => block.scales[group] * E2M1[usize::from(code)],
            };
            assert_eq!(value, expected, "{format:?} element {idx}");
        }
    }
}

#[test]
fn exponents_are_powers_of_two() {
    for biased in 0..255u8 {
        assert_eq!(exponent(biased), (f64::from(biased) - 127.0).exp2() as f32);
    }
    assert!(exponent(255).is_nan());
}

#[test]
#[should_panic(expected = "ends inside a block")]
fn a_partial_block_is_refused() {
    BlockFormat::Q8_0.dequantize(&[0; 33], &mut [0.0; 32]);
}

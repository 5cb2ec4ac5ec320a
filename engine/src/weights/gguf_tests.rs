//! The GGUF reader against files written here, whole and broken.

use half::{bf16, f16};

use super::super::gguf_fixture::{GgufBuilder, TempDir, string_bytes};
use super::*;

fn array_bytes(element_type: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    let head = [&element_type.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes()].concat();
    [head, elements.concat()].concat()
}

fn open(bytes: &[u8], name: &str) -> Result<GgufFile, String> {
    let dir = TempDir::new(name);
    let path = dir.write("model.gguf", bytes);
    GgufFile::open(&path).map_err(|e| e.to_string())
}

#[test]
fn every_metadata_type_is_read() {
    let strings = array_bytes(8, &[string_bytes("a"), string_bytes("é")]);
    let nested = array_bytes(9, &[array_bytes(1, &[vec![0xff], vec![2]]), array_bytes(1, &[])]);
    let bytes = GgufBuilder::default()
        .raw("u8", 0, &[200])
        .raw("i8", 1, &[0xfe])
        .raw("u16", 2, &60_000u16.to_le_bytes())
        .raw("i16", 3, &(-5i16).to_le_bytes())
        .u32("u32", 4_000_000_000)
        .raw("i32", 5, &(-7i32).to_le_bytes())
        .f32("f32", 0.5)
        .raw("bool", 7, &[1])
        .string("string", "hello")
        .raw("strings", 9, &strings)
        .raw("nested", 9, &nested)
        .raw("u64", 10, &u64::MAX.to_le_bytes())
        .raw("i64", 11, &i64::MIN.to_le_bytes())
        .raw("f64", 12, &0.1f64.to_le_bytes())
        .build();
    let gguf = open(&bytes, "metadata").unwrap();
    let expected = [
        ("u8", GgufValue::Unsigned(200)),
        ("i8", GgufValue::Signed(-2)),
        ("u16", GgufValue::Unsigned(60_000)),
        ("i16", GgufValue::Signed(-5)),
        ("u32", GgufValue::Unsigned(4_000_000_000)),
        ("i32", GgufValue::Signed(-7)),
        ("f32", GgufValue::Float(0.5)),
        ("bool", GgufValue::Bool(true)),
        ("string", GgufValue::String("hello".into())),
        ("u64", GgufValue::Unsigned(u64::MAX)),
        ("i64", GgufValue::Signed(i64::MIN)),
        ("f64", GgufValue::Float(0.1)),
    ];
    for (key, value) in expected {
        assert_eq!(gguf.get(key), Some(&value), "{key}");
    }
    assert_eq!(gguf.opt_strings("strings").unwrap(), Some(vec!["a", "é"]));
    let inner = vec![GgufValue::Signed(-1), GgufValue::Signed(2)];
    assert_eq!(
        gguf.get("nested"),
        Some(&GgufValue::Array(vec![GgufValue::Array(inner), GgufValue::Array(Vec::new())]))
    );
    assert_eq!(gguf.opt_u64("absent").unwrap(), None);
    assert!(gguf.opt_u64("string").unwrap_err().to_string().contains("`string` is not a non-negative integer"));
}

#[test]
fn plain_and_block_types_are_widened() {
    let plain: Vec<f32> = (0..64).map(|i| i as f32 / 4.0 - 8.0).collect();
    let half16 = |v: &f32| f16::from_f32(*v).to_le_bytes();
    let half = |v: f32| f16::from_f32(v).to_le_bytes();
    let nibbles = [0x21u8; 16];
    let q4_0 = [&half(2.0)[..], &nibbles].concat();
    let q4_1 = [&half(2.0)[..], &half(-1.0), &nibbles].concat();
    let q8_0 = [&half(0.5)[..], &[0xfcu8; 32]].concat();
    let bytes = GgufBuilder::default()
        .f32_tensor("f32", &[2, 32], &plain)
        .tensor("f16", &[2, 32], 1, plain.iter().flat_map(half16).collect())
        .tensor("bf16", &[2, 32], 30, plain.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect())
        .tensor("q4_0", &[1, 32], 2, q4_0)
        .tensor("q4_1", &[1, 32], 3, q4_1)
        .tensor("q8_0", &[1, 32], 8, q8_0)
        .tensor("q4_k", &[1, 256], 12, vec![0; 144])
        .tensor("q2_k", &[1, 256], 10, vec![0; 84])
        .build();
    let gguf = open(&bytes, "tensors").unwrap();
    assert_eq!(gguf.tensor("f32").unwrap().shape, [2, 32]);
    for name in ["f32", "f16", "bf16"] {
        assert_eq!(gguf.read_f32(name).unwrap(), plain, "{name}");
    }
    let halves = |low: f32, high: f32| [[low; 16], [high; 16]].concat();
    assert_eq!(gguf.read_f32("q4_0").unwrap(), halves(-14.0, -12.0));
    assert_eq!(gguf.read_f32("q4_1").unwrap(), halves(1.0, 3.0));
    assert_eq!(gguf.read_f32("q8_0").unwrap(), vec![-2.0; 32]);
    assert_eq!(gguf.read_f32("q4_k").unwrap(), vec![0.0; 256]);
    let error = gguf.read_f32("q2_k").unwrap_err().to_string();
    assert!(error.starts_with("tensor `q2_k` is stored as Q2_K, which is not supported, in "), "{error}");
    assert!(matches!(gguf.read_f32("none"), Err(EngineError::MissingTensor { .. })));
}

fn check_refused(name: &str, bytes: &[u8], expected: &str) {
    let error = open(bytes, name).expect_err(name);
    assert!(error.contains(expected), "{name}: `{error}` does not contain `{expected}`");
}

#[test]
fn broken_files_are_refused_by_field() {
    let good = GgufBuilder::default().string("key", "value").f32_tensor("t", &[4], &[1.0; 4]).build();
    check_refused("magic", b"GGML\x03\0\0\0", "does not start with `GGUF`");
    check_refused("version", b"GGUF\x01\0\0\0", "version is 1");
    check_refused("empty", b"", "the magic number");
    let mut many = good.clone();
    many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    check_refused("count", &many, "the number of tensors is 18446744073709551615");
    let long_string = GgufBuilder::default().raw("key", 8, &u64::MAX.to_le_bytes()).build();
    check_refused("string", &long_string, "metadata `key` at byte");
    let long_array = [&4u32.to_le_bytes()[..], &(1u64 << 60).to_le_bytes()].concat();
    check_refused("array", &GgufBuilder::default().raw("key", 9, &long_array).build(), "metadata `key` claims");
    let deep = (0..9).fold(array_bytes(0, &[vec![1]]), |inner, _| array_bytes(9, &[inner]));
    check_refused("deep", &GgufBuilder::default().raw("key", 9, &deep).build(), "nests arrays");
    check_refused("type", &GgufBuilder::default().raw("key", 77, &[0]).build(), "unknown value type 77");
    check_refused("bool", &GgufBuilder::default().raw("key", 7, &[9]).build(), "a bool of value 9");
    let twice = GgufBuilder::default().u32("key", 1).u32("key", 2).build();
    check_refused("twice", &twice, "`key` occurs twice");
    check_refused("rows", &GgufBuilder::default().tensor("t", &[1, 31], 8, vec![0; 34]).build(), "multiple of 32");
    check_refused("shape", &GgufBuilder::default().tensor("t", &[1 << 40, 1 << 40], 0, vec![]).build(), "impossible");
    check_refused("outside", &GgufBuilder::default().tensor("t", &[1024], 0, vec![0; 8]).build(), "past the end");
    let align = GgufBuilder::default().u32("general.alignment", 33).f32_tensor("t", &[1], &[0.0]).build();
    check_refused("align", &align, "general.alignment");
}

/// No prefix of a file and no flipped byte of its header may panic; a prefix never parses.
#[test]
fn truncated_and_flipped_files_never_panic() {
    let good = GgufBuilder::default()
        .raw("strings", 9, &array_bytes(8, &[string_bytes("one"), string_bytes("two")]))
        .f32_tensor("t", &[2, 2], &[1.0; 4])
        .build();
    let dir = TempDir::new("fuzz");
    for length in 0..good.len() {
        let path = dir.write("cut.gguf", &good[..length]);
        assert!(GgufFile::open(&path).is_err(), "{length} bytes");
    }
    for (idx, flip) in (0..good.len()).flat_map(|idx| [0x01, 0x80, 0xff].map(|flip| (idx, flip))) {
        let mut bad = good.clone();
        bad[idx] ^= flip;
        let path = dir.write("flip.gguf", &bad);
        if let Ok(gguf) = GgufFile::open(&path) {
            for name in gguf.tensors().keys() {
                let _ = gguf.read_f32(name);
            }
        }
    }
}

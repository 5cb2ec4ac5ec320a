//! FP8 values: OCP E4M3FN, as DeepSeek-V3 and compressed-tensors publish it.

/// Every value of a byte.
pub fn table() -> [f32; 256] {
    std::array::from_fn(|byte| e4m3(byte as u8))
}

/// 4 exponent bits (bias 7), 3 mantissa bits, no infinities, 0x7f is NaN.
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let exponent = i32::from(byte >> 3 & 0xf);
    let mantissa = f32::from(byte & 7);
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_the_format() {
        for (byte, value) in
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (0x08, 2f32.powi(-6))]
        {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(table()[0x7f].is_nan());
    }
}

//! `moesaic bench kernels` through its command line: it ends, its rows are complete, and its figures fit each other.

use std::process::{Command, Output};

use serde_json::Value;

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

fn run(line: &str) -> Output {
    Command::new(SERVER).args(["bench", "kernels"]).args(line.split_whitespace()).output().expect("it runs")
}

fn stdout(line: &str) -> String {
    let output = run(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Enough that the ops below do not run from a cache.
const MEMORY: &str = "--memory 256MiB";

#[test]
fn json_has_limits_and_a_row_for_every_format_and_number_of_tokens() {
    let text = stdout(&format!("--json --threads 2 {MEMORY} --op linear,rms_norm,mla_attention"));
    let report: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["threads"], 2);
    let limits = &report["limits"];
    assert!(number(&limits["read_gb_per_s"]) > 0.1 && number(&limits["read_1_thread_gb_per_s"]) > 0.1, "{limits}");
    let peaks = limits["peaks"].as_array().expect("a list");
    assert!(
        peaks.iter().any(|peak| peak["unit"] == "f32 FMA")
            && peaks.iter().all(|peak| number(&peak["tflop_per_s"]) > 0.0)
    );
    let rows = report["rows"].as_array().expect("a list");
    for (op, formats, tokens) in [
        ("linear", &["f32", "bf16", "int8", "int4"][..], &[1, 32, 512][..]),
        ("rms_norm", &["f32"], &[1, 32, 512]),
        ("mla_attention", &["f32", "bf16"], &[1, 32, 512]),
    ] {
        for format in formats {
            for num_tokens in tokens {
                let is_it =
                    |row: &&Value| row["op"] == op && row["format"] == *format && row["num_tokens"] == *num_tokens;
                assert!(rows.iter().any(|row| is_it(&row)), "{op} {format} {num_tokens}: {text}");
            }
        }
    }
    for row in rows {
        let share = number(&row["share"]);
        assert!(share > 0.0 && share <= 3.0, "{row}");
        assert!((number(&row["floor_us"]) / number(&row["us"]) / share - 1.0).abs() < 1e-6, "{row}");
        assert!(["memory", "compute"].iter().any(|bound| row["limited_by"] == *bound), "{row}");
    }
    assert_eq!(report["left_out"], Value::Array(Vec::new()));
}

#[test]
fn the_table_is_aligned() {
    let text = stdout(&format!("--threads 1 {MEMORY} --op route"));
    let table: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("op ")).collect();
    assert_eq!(table.len(), 1 + 6, "{text}");
    // The last column of numbers ends at the same place in each line.
    let end = table[0].find("of limit").expect("the column is there") + "of limit".len();
    assert!(table[1..].iter().all(|line| line[..end].ends_with(" %") && line[end..].starts_with("  ")), "{text}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (line, message) in [
        ("--op linaer", "possible values: linear"),
        ("--threads 0", "--threads"),
        ("--memory 1MiB", "too few"),
        ("--memory many", "--memory"),
    ] {
        let output = run(line);
        assert!(!output.status.success(), "{line}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(message), "{line}: {text}");
    }
    let output = Command::new(SERVER).args(["bench", "--concurrency", "2", "kernels"]).output().expect("it runs");
    assert!(!output.status.success(), "arguments of the load client do not go with it");
}

//! What is measured is complete, and figures follow from times.

use super::*;

fn options(ops: &[&str], memory_bytes: usize) -> BenchOptions {
    BenchOptions {
        ops: ops.iter().map(|&op| op.to_owned()).collect(),
        threads: Some(4),
        device: DeviceChoice::Cpu,
        memory_bytes,
    }
}

#[test]
fn rows_are_complete_and_shares_are_of_the_limit() {
    let mut said = Vec::new();
    let options = options(&["route", "head_linear", "gated_delta"], 128 << 20);
    let report = run(&options, &mut |what| said.push(what.to_owned())).unwrap();
    let of = |op: &str| report.rows.iter().filter(|row| row.op == op).collect::<Vec<_>>();
    assert_eq!((of("route").len(), of("gated_delta").len()), (6, 3));
    let heads = of("head_linear");
    for tokens in [1, 32, 512] {
        assert!(
            ["f32", "bf16", "int8", "int4"]
                .iter()
                .all(|format| heads.iter().any(|row| (row.num_tokens, row.format) == (tokens, format)))
        );
    }
    for row in &report.rows {
        assert!(row.seconds > 0.0 && row.bytes > 0.0 && row.share() > 0.0, "{row:?}");
        let memory = row.bytes / report.limits.read_bandwidth;
        let is_memory = (row.floor_seconds / memory - 1.0).abs() < 1e-9;
        assert!(if row.bound == Bound::Memory { is_memory } else { row.floor_seconds >= memory }, "{row:?}");
    }
    assert!(said.len() > 3 && report.left_out.is_empty(), "{said:?}");
}

#[test]
fn what_needs_more_memory_is_left_out_and_named() {
    let report = run(&options(&["embedding"], 128 << 20), &mut |_| {}).unwrap();
    assert_eq!(report.rows.len(), 9);
    assert_eq!(report.left_out, ["embedding granite-1b 49155x1024 f32"]);
}

#[test]
fn wrong_options_are_refused() {
    let error = |options| run(&options, &mut |_| {}).unwrap_err().to_string();
    assert!(error(options(&["linear", "linaer"], 1 << 30)).contains("no op `linaer`; there are linear, "));
    assert!(error(options(&[], 1)).contains("too few"));
}

//! The benchmark on a device: that it measures there, not what.

use crate::bench::{BenchOptions, Bound, MIN_MEMORY_BYTES, run};
use crate::device::DeviceChoice;

#[test]
fn ops_are_measured_beside_the_limits_of_the_device() {
    let options = BenchOptions {
        ops: ["route", "rms_norm", "gated_delta"].map(str::to_owned).to_vec(),
        threads: None,
        device: DeviceChoice::Cuda(0),
        memory_bytes: MIN_MEMORY_BYTES,
    };
    let report = run(&options, &mut |_| {}).unwrap();
    assert!(report.device.starts_with("cuda:0 ("), "{}", report.device);
    assert!(report.limits.read_bandwidth > 0.0 && report.limits.read_bandwidth_1.is_none());
    let units: Vec<_> = report.limits.peaks.iter().map(|peak| peak.unit.name()).collect();
    assert_eq!(units, ["f32 FMA", "mma bf16", "mma int8"]);
    assert!(report.limits.peaks.iter().all(|peak| peak.operations_per_second > 0.0));
    let of = |op: &str| report.rows.iter().filter(|row| row.op == op).collect::<Vec<_>>();
    assert_eq!((of("route").len(), of("rms_norm").len()), (6, 6));
    assert!(of("rms_norm").iter().all(|row| row.format == "bf16"));
    assert!(report.rows.iter().all(|row| row.seconds > 0.0 && row.floor_seconds > 0.0), "{:?}", report.rows);
    assert!(of("route").iter().all(|row| row.bound == Bound::Memory));
}

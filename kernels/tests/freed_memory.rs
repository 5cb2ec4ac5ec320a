//! The allocator's setting is the process's, so its test has a process of its own.

#![cfg(all(target_os = "linux", target_env = "gnu"))]

/// Page faults of this thread so far.
fn num_faults() -> i64 {
    // SAFETY: an `rusage` is an array of integers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a struct of the type that the call fills.
    let status = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(status, 0);
    usage.ru_minflt
}

/// Faults of a step that allocates six activations of 8 MiB, writes them and frees them.
fn faults_of_a_step() -> i64 {
    let before = num_faults();
    let activations: Vec<Vec<f32>> = (0..6).map(|value| vec![value as f32 + 1.0; 2 << 20]).collect();
    std::hint::black_box(&activations);
    drop(activations);
    num_faults() - before
}

#[test]
fn a_step_finds_the_memory_of_the_one_before() {
    // Huge pages would hide what is counted: some faults remain where the system gives them by itself.
    let given_back: i64 = (0..4).map(|_| faults_of_a_step()).min().expect("four steps");
    kernels::keep_freed_memory();
    faults_of_a_step();
    let kept: i64 = (0..4).map(|_| faults_of_a_step()).max().expect("four steps");
    assert!(given_back >= 6 && kept * 4 < given_back, "{given_back} faults, then {kept}");
}

//! `moesaic bench kernels`: speed of each op beside the limits of this machine.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Context as _;
use clap::Args;
use clap::builder::PossibleValuesParser;
use engine::kernel_bench::{self, BenchOptions, BenchReport, Bound, OpRow};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::command_line;
use super::report::Machine;
use crate::config::{ByteSize, DeviceName};

#[derive(Args, Debug)]
pub struct KernelsArgs {
    /// Ops to measure; several with commas between [default: all]
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(kernel_bench::OPS))]
    pub op: Vec<String>,
    /// Compute threads [default: one for each CPU that the process may use]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Where ops compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t)]
    pub device: DeviceName,
    /// Memory for the weights and caches that are rotated over; as much again, 1 GiB at most, for the read test
    #[arg(long, default_value = "2GiB")]
    pub memory: ByteSize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Measures, and prints the report on stdout.
///
/// # Errors
/// Too little memory, or a report that cannot be written.
pub fn run(args: KernelsArgs) -> anyhow::Result<()> {
    let options = BenchOptions {
        ops: args.op,
        threads: args.threads.map(|threads| threads as usize),
        device: args.device.0,
        memory_bytes: usize::try_from(args.memory.0).context("--memory is larger than the address space")?,
    };
    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
    let report = kernel_bench::run(&options, &mut |what| {
        bar.set_message(what.to_owned());
        bar.tick();
    })?;
    bar.finish_and_clear();
    let machine = Machine::this()?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&JsonReport::new(machine, &report))? + "\n",
        false => text(&machine, &report),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")
}

const COLUMNS: [&str; 10] =
    ["op", "shape", "format", "tokens", "us", "GB/s", "TFLOP/s", "floor us", "of limit", "limited by"];

/// Columns of words, which start at the left.
const NUM_WORD_COLUMNS: usize = 3;

/// Limits, then an aligned table.
fn text(machine: &Machine, report: &BenchReport) -> String {
    let threads = report.threads;
    let of_machine = format!("{}, {} cores, {threads} threads, {}", machine.cpu, machine.cores, report.isa);
    let (machine, all) = match report.device.as_str() {
        "cpu" => (of_machine, format!(", {threads} threads")),
        device => (device.to_owned(), String::new()),
    };
    let mut out = format!("{machine}\n\n");
    let rate = |bandwidth: f64| format!("{:.2} GB/s", bandwidth / 1e9);
    let mut limits = Vec::new();
    limits.extend(report.limits.read_bandwidth_1.map(|found| ("memory read, 1 thread".to_owned(), rate(found))));
    limits.push((format!("memory read{all}"), rate(report.limits.read_bandwidth)));
    limits.extend(report.limits.peaks.iter().map(|peak| {
        (format!("{}{all}", peak.unit.name()), format!("{:.3} TFLOP/s", peak.operations_per_second / 1e12))
    }));
    let width = limits.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in limits {
        writeln!(out, "{name:<width$}  {value}").expect("a string can be written to");
    }
    out.push('\n');
    let rows: Vec<_> = std::iter::once(COLUMNS.map(str::to_owned)).chain(report.rows.iter().map(cells)).collect();
    let widths: [usize; COLUMNS.len()] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            match column < NUM_WORD_COLUMNS {
                true => write!(line, "{cell:<width$}  "),
                false => write!(line, "{cell:>width$}  "),
            }
            .expect("a string can be written to");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    for what in &report.left_out {
        writeln!(out, "left out, needs more --memory: {what}").expect("a string can be written to");
    }
    out
}

fn cells(row: &OpRow) -> [String; COLUMNS.len()] {
    [
        row.op.to_owned(),
        row.shape.clone(),
        row.format.to_owned(),
        row.num_tokens.to_string(),
        format!("{:.1}", row.seconds * 1e6),
        format!("{:.2}", row.bytes / row.seconds / 1e9),
        format!("{:.3}", row.operations / row.seconds / 1e12),
        format!("{:.1}", row.floor_seconds * 1e6),
        format!("{:.1} %", row.share() * 100.0),
        bound_name(row.bound).to_owned(),
    ]
}

fn bound_name(bound: Bound) -> &'static str {
    match bound {
        Bound::Memory => "memory",
        Bound::Compute => "compute",
    }
}

#[derive(Serialize)]
struct JsonReport<'a> {
    version: &'static str,
    /// What was typed.
    command: String,
    machine: Machine,
    isa: &'static str,
    device: &'a str,
    threads: usize,
    limits: JsonLimits,
    rows: Vec<JsonRow<'a>>,
    left_out: &'a [String],
}

#[derive(Serialize)]
struct JsonLimits {
    /// Not of a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    read_1_thread_gb_per_s: Option<f64>,
    read_gb_per_s: f64,
    peaks: Vec<JsonPeak>,
}

#[derive(Serialize)]
struct JsonPeak {
    unit: &'static str,
    tflop_per_s: f64,
}

#[derive(Serialize)]
struct JsonRow<'a> {
    op: &'static str,
    shape: &'a str,
    format: &'static str,
    num_tokens: usize,
    us: f64,
    gb_per_s: f64,
    tflop_per_s: f64,
    floor_us: f64,
    share: f64,
    limited_by: &'static str,
}

impl<'a> JsonReport<'a> {
    fn new(machine: Machine, report: &'a BenchReport) -> Self {
        let peaks = report.limits.peaks.iter();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            command: command_line(std::env::args_os()),
            machine,
            isa: report.isa,
            device: &report.device,
            threads: report.threads,
            limits: JsonLimits {
                read_1_thread_gb_per_s: report.limits.read_bandwidth_1.map(|found| found / 1e9),
                read_gb_per_s: report.limits.read_bandwidth / 1e9,
                peaks: peaks
                    .map(|peak| JsonPeak { unit: peak.unit.name(), tflop_per_s: peak.operations_per_second / 1e12 })
                    .collect(),
            },
            rows: report.rows.iter().map(JsonRow::new).collect(),
            left_out: &report.left_out,
        }
    }
}

impl<'a> JsonRow<'a> {
    fn new(row: &'a OpRow) -> Self {
        Self {
            op: row.op,
            shape: &row.shape,
            format: row.format,
            num_tokens: row.num_tokens,
            us: row.seconds * 1e6,
            gb_per_s: row.bytes / row.seconds / 1e9,
            tflop_per_s: row.operations / row.seconds / 1e12,
            floor_us: row.floor_seconds * 1e6,
            share: row.share(),
            limited_by: bound_name(row.bound),
        }
    }
}

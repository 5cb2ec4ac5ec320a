//! `moesaic inspect`: architecture and sizes of a model, from its configuration and tensor headers.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Context as _;
use engine::{Inspection, TensorClass};
use indicatif::{HumanBytes, HumanCount, MultiProgress};

use crate::hub::{self, HubOptions};

/// Print architecture, parameters, experts and memory of a model
#[derive(clap::Args, Debug)]
pub struct InspectArgs {
    /// Hugging Face folder, GGUF file or hub id
    pub model: String,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Prints the inspection on stdout.
///
/// # Errors
/// A model that cannot be found, read or served.
pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let model_dir = hub::resolve(&args.model, &HubOptions::from_env(args.revision), &MultiProgress::new())?;
    let inspection = engine::inspect(&model_dir)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&inspection)? + "\n",
        false => table(&inspection),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")
}

/// The inspection as aligned lines.
fn table(inspection: &Inspection) -> String {
    let max_model_len = inspection.max_model_len.map_or("unknown".to_owned(), |len| HumanCount(len as u64).to_string());
    let mut rows = vec![
        ("architecture", inspection.architecture.clone()),
        ("layers", format!("{}, {} of them with experts", inspection.num_layers, inspection.num_moe_layers)),
        ("experts per layer", experts(inspection)),
        ("hidden size", inspection.hidden_size.to_string()),
        ("vocabulary", HumanCount(inspection.vocab_size as u64).to_string()),
        ("context", format!("{max_model_len} tokens")),
        ("parameters", count(inspection.num_parameters)),
        ("active parameters", active(inspection)),
        ("weights on disk", format!("{} ({})", HumanBytes(inspection.weight_bytes), inspection.dtypes.join(", "))),
        ("weights in memory", memory(inspection)),
        ("KV per token", format!("{} ({})", HumanBytes(inspection.kv_bytes_per_token), inspection.kv_dtype)),
    ];
    if inspection.state_bytes_per_sequence > 0 {
        rows.push(("state per sequence", format!("{} (f32)", HumanBytes(inspection.state_bytes_per_sequence))));
    }
    if inspection.num_mtp_layers > 0 {
        let bytes =
            [inspection.mtp_memory_bytes, inspection.mtp_memory_bytes_f32].map(|bytes| HumanBytes(bytes).to_string());
        let [stored, f32] = bytes;
        let value = format!("{}, loaded with --load-mtp: {stored}, {f32} with --dtype f32", inspection.num_mtp_layers);
        rows.push(("MTP layers", value));
    }
    let mut text = String::new();
    for (name, value) in rows {
        writeln!(text, "{name:<18} {value}").expect("writing to a string cannot fail");
    }
    writeln!(text, "\n{:<18} {:>8} {:>17} {:>12} {:>12}", "tensors", "number", "parameters", "on disk", "in memory")
        .expect("writing to a string cannot fail");
    for size in &inspection.classes {
        let (name, parameters) = (class_name(size.class), HumanCount(size.num_parameters).to_string());
        let [disk, memory] = [size.num_bytes, size.memory_bytes].map(|bytes| HumanBytes(bytes).to_string());
        writeln!(text, "{name:<18} {:>8} {parameters:>17} {disk:>12} {memory:>12}", size.num_tensors)
            .expect("writing to a string cannot fail");
    }
    text
}

/// `512 and 256 that compute nothing, 12 per token`.
fn experts(inspection: &Inspection) -> String {
    let zero = match inspection.num_zero_experts {
        0 => String::new(),
        num => format!(" and {num} that compute nothing"),
    };
    format!("{}{zero}, {} per token", inspection.num_experts, inspection.num_experts_per_tok)
}

/// One count, or the range where it depends on the token.
fn active(inspection: &Inspection) -> String {
    let (least, most) = (inspection.min_active_parameters, inspection.num_active_parameters);
    if least == most {
        return count(most);
    }
    format!("{} to {}", count(least), count(most))
}

/// What the weights take once they are loaded.
fn memory(inspection: &Inspection) -> String {
    let [stored, f32] =
        [inspection.memory_bytes, inspection.memory_bytes_f32].map(|bytes| HumanBytes(bytes).to_string());
    format!("{stored} with --dtype auto, {f32} with --dtype f32")
}

/// `1.62 B (1,617,309,696)`.
fn count(num_parameters: u64) -> String {
    let (scaled, unit) = match num_parameters {
        0..1_000_000 => return HumanCount(num_parameters).to_string(),
        1_000_000..1_000_000_000 => (num_parameters as f64 / 1e6, "M"),
        _ => (num_parameters as f64 / 1e9, "B"),
    };
    format!("{scaled:.2} {unit} ({})", HumanCount(num_parameters))
}

fn class_name(class: TensorClass) -> &'static str {
    match class {
        TensorClass::Embedding => "embedding",
        TensorClass::Attention => "attention",
        TensorClass::Router => "router",
        TensorClass::Experts => "experts",
        TensorClass::SharedExperts => "shared experts",
        TensorClass::DenseFfn => "dense ffn",
        TensorClass::Norms => "norms",
        TensorClass::LmHead => "lm_head",
        TensorClass::Other => "other",
        TensorClass::Ignored => "not served",
    }
}

#[cfg(test)]
mod tests {
    use engine::ClassSize;

    use super::*;

    #[test]
    fn the_table_is_aligned() {
        let class = |class, num_tensors, num_parameters| ClassSize {
            class,
            num_tensors,
            num_parameters,
            num_bytes: 2 * num_parameters,
            memory_bytes: 4 * num_parameters,
        };
        let mut inspection = Inspection {
            architecture: "mixtral".into(),
            num_layers: 30,
            num_mtp_layers: 1,
            mtp_memory_bytes: 12 << 20,
            mtp_memory_bytes_f32: 24 << 20,
            num_moe_layers: 30,
            num_experts: 8,
            num_zero_experts: 0,
            num_experts_per_tok: 2,
            hidden_size: 576,
            vocab_size: 49_152,
            max_model_len: Some(8192),
            num_parameters: 1_234_567_890,
            num_active_parameters: 2_500_000,
            min_active_parameters: 2_500_000,
            weight_bytes: 1 << 30,
            memory_bytes: 3 << 30,
            memory_bytes_f32: 6 << 30,
            kv_dtype: "bf16".into(),
            kv_bytes_per_token: 2048,
            least_kv_bytes_per_token: 2048,
            state_bytes_per_sequence: 1 << 20,
            dtypes: vec!["bf16".into()],
            classes: vec![class(TensorClass::Router, 1, 5), class(TensorClass::Experts, 720, 999_999)],
        };
        let text = table(&inspection);
        assert!(text.contains("parameters         1.23 B (1,234,567,890)\n"), "{text}");
        assert!(text.contains("active parameters  2.50 M (2,500,000)\n"), "{text}");
        assert!(text.contains("experts per layer  8, 2 per token\n"), "{text}");
        let mtp = "MTP layers         1, loaded with --load-mtp: 12.00 MiB, 24.00 MiB with --dtype f32\n";
        assert!(text.contains(mtp), "{text}");
        assert!(text.contains("state per sequence 1.00 MiB (f32)\n"), "{text}");
        let ends: Vec<usize> = text.lines().skip_while(|line| !line.starts_with("tensors")).map(str::len).collect();
        assert_eq!(ends.len(), 3);
        assert!(ends.iter().all(|end| *end == ends[0]), "{text}");
        assert!(text.contains("weights in memory  3.00 GiB with --dtype auto, 6.00 GiB with --dtype f32\n"), "{text}");

        inspection.num_zero_experts = 4;
        inspection.min_active_parameters = 1_250_000;
        let text = table(&inspection);
        assert!(text.contains("active parameters  1.25 M (1,250,000) to 2.50 M (2,500,000)\n"), "{text}");
        assert!(text.contains("experts per layer  8 and 4 that compute nothing, 2 per token\n"), "{text}");
    }
}

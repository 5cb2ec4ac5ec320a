//! `moesaic eval` through its command line, against numbers computed here from the models' logits.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engine::{EngineConfig, KvDtype, WeightDtype, load_model};
use moesaic::text::{EncodeOptions, Tokenizer};
use serde_json::Value;

const TEXT: &str = "A mixture of experts is a model whose tokens are sent to a few of its many parts. \
    The router chooses them, and what they say is weighed and summed. So it knows much and computes little.";
/// Small, so that there are several chunks and the last one is shorter.
const CONTEXT: usize = 24;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// A text file that is removed when dropped.
struct TextFile(PathBuf);

impl TextFile {
    fn new(name: &str, text: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("moesaic-eval-{name}-{}", std::process::id()));
        std::fs::write(&path, text).expect("the folder of temporary files is writable");
        Self(path)
    }
}

impl Drop for TextFile {
    fn drop(&mut self) {
        // What is left in the folder of temporary files harms nobody.
        drop(std::fs::remove_file(&self.0));
    }
}

fn run(model: &Path, text: &TextFile, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
    command.arg("eval").arg(model).arg("--file").arg(&text.0);
    command.args(["--context", &CONTEXT.to_string(), "--threads", "2"]).args(args);
    command.output().expect("it runs")
}

fn eval(model: &Path, text: &TextFile, args: &[&str]) -> Value {
    let output = run(model, text, &[&["--json"], args].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn refusal(model: &Path, text: &TextFile, args: &[&str]) -> String {
    let output = run(model, text, args);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).expect("UTF-8")
}

/// Log-probabilities of every token after every position of every chunk, with the token that follows there. Texts of the
/// model begin with `bos`.
fn log_probs(model: &Path, dtype: WeightDtype, bos: &[u32]) -> Vec<(Vec<f64>, usize)> {
    let tokenizer = Tokenizer::load(model).expect("a tokenizer");
    let tokens = tokenizer.encode(TEXT, EncodeOptions::default()).expect("tokens");
    let max_model_len = Some(CONTEXT);
    let config =
        EngineConfig { dtype, kv_dtype: KvDtype::F32, max_model_len, max_num_seqs: 1, ..EngineConfig::new(model) };
    let mut model = load_model(&config, &mut |_| {}).expect("a model");
    let mut rows = Vec::new();
    for chunk in tokens.chunks(CONTEXT - bos.len()) {
        let chunk = [bos, chunk].concat();
        let logits = model.runner.logits_of(&chunk).expect("logits");
        for (row, &next) in logits.iter().zip(&chunk[1..]) {
            let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            rows.push((row.iter().map(|&logit| f64::from(logit) - total.ln()).collect(), next as usize));
        }
    }
    rows
}

fn perplexity(rows: &[(Vec<f64>, usize)]) -> f64 {
    (-rows.iter().map(|(row, next)| row[*next]).sum::<f64>() / rows.len() as f64).exp()
}

fn argmax(row: &[f64]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a vocabulary")
}

fn assert_near(found: &Value, expected: f64) {
    let found = found.as_f64().expect("a number");
    assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{found}, expected {expected}");
}

/// Checks a report against the rows of the model and of its reference.
fn check(found: &Value, measured: &[(Vec<f64>, usize)], reference: &[(Vec<f64>, usize)]) {
    assert_eq!(found["num_tokens"], measured.len());
    assert_near(&found["perplexity"], perplexity(measured));
    let compared = &found["reference"];
    assert_near(&compared["perplexity"], perplexity(reference));
    let kls: Vec<f64> = measured
        .iter()
        .zip(reference)
        .map(|((q, _), (p, _))| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum())
        .collect();
    assert_near(&compared["mean_kl"], kls.iter().sum::<f64>() / kls.len() as f64);
    assert_near(&compared["max_kl"], kls.iter().copied().fold(0.0, f64::max));
    let agreed = measured.iter().zip(reference).filter(|((q, _), (p, _))| argmax(q) == argmax(p)).count();
    assert_near(&compared["greedy_agreement_percent"], 100.0 * agreed as f64 / kls.len() as f64);
}

#[test]
fn a_model_is_no_different_from_itself() {
    let text = TextFile::new("same", TEXT.as_bytes());
    let model = golden("mixtral-base");
    let found = eval(&model, &text, &["--against", model.to_str().expect("UTF-8")]);
    let compared = &found["reference"];
    assert_eq!((&compared["mean_kl"], &compared["max_kl"]), (&0.0.into(), &0.0.into()));
    assert_eq!(compared["greedy_agreement_percent"], 100.0);
    assert_eq!(compared["perplexity"], found["perplexity"]);
    let alone = eval(&model, &text, &[]);
    assert_eq!((&alone["perplexity"], alone.get("reference")), (&found["perplexity"], None));
}

/// All rows of a chunk have blocks, also of layers whose windows are long past.
#[test]
fn a_context_may_be_much_longer_than_a_window() {
    let text = TextFile::new("long", TEXT.repeat(30).as_bytes());
    let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
    command.arg("eval").arg(golden("mixtral-window")).arg("--file").arg(&text.0);
    let output = command.args(["--context", "3000", "--max-tokens", "4000", "--json"]).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(found["num_tokens"].as_u64().expect("a count") > 3000, "{found}");
}

#[test]
fn what_two_models_differ_by_is_what_their_logits_say() {
    let text = TextFile::new("other", TEXT.as_bytes());
    let [model, other] = ["olmoe-base", "qwen3_moe-base"].map(golden);
    let found = eval(&model, &text, &["--against", other.to_str().expect("UTF-8")]);
    assert!(found["reference"]["mean_kl"].as_f64().expect("a number") > 0.0);
    check(&found, &log_probs(&model, WeightDtype::Auto, &[]), &log_probs(&other, WeightDtype::Auto, &[]));
    let short = eval(&model, &text, &["--max-tokens", "30"]);
    assert_eq!((&short["num_tokens"], &short["num_chunks"]), (&28.into(), &2.into()), "of 24 and of 6 tokens");
}

#[test]
fn every_chunk_begins_as_the_models_texts_do() {
    let text = TextFile::new("begin", TEXT.as_bytes());
    let ([model, other], bos) = (["mixtral-base", "mixtral-window"].map(golden), [1]);
    let found = eval(&model, &text, &["--dtype", "f32", "--against", other.to_str().expect("UTF-8")]);
    check(&found, &log_probs(&model, WeightDtype::F32, &bos), &log_probs(&other, WeightDtype::Auto, &bos));
    let found = eval(&model, &text, &["--dtype", "f32"]);
    assert!(
        found["reference"]["mean_kl"].as_f64().expect("a number") < 1e-3,
        "the model itself, with a KV cache in f32"
    );
    let lines = String::from_utf8(run(&model, &text, &["--dtype", "f16"]).stdout).expect("UTF-8");
    for line in ["perplexity         ", "mean KL            ", "greedy agreement   "] {
        assert!(lines.contains(line), "{lines}");
    }
}

/// A packed folder holds what quantizing while loading gives, and everything that serving needs beside it.
#[test]
fn a_packed_folder_is_the_model_quantized_while_loading() {
    let text = TextFile::new("quantized", TEXT.as_bytes());
    let model = golden("olmoe-base");
    let found = eval(&model, &text, &["--quant", "int8"]);
    let number = |report: &Value, key: &str| report["reference"][key].as_f64().expect("a number");
    // A tiny random model, whose routers choose otherwise at near ties.
    assert!((1e-9..0.3).contains(&number(&found, "mean_kl")), "{found}");
    assert!(number(&found, "greedy_agreement_percent") > 80.0, "{found}");
    let four_bits = eval(&model, &text, &["--quant", "int4"]);
    assert!(number(&four_bits, "mean_kl") > number(&found, "mean_kl"), "{four_bits}");

    let out = std::env::temp_dir().join(format!("moesaic-quantize-{}", std::process::id()));
    let quantize = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
        command.arg("quantize").arg(&model).args(["--to", "int8", "--out"]).arg(&out).output().expect("it runs")
    };
    let output = quantize();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(" in 1 shard, ") && said.contains("serve it with: moesaic serve"), "{said}");
    let packed = eval(&out, &text, &["--against", model.to_str().expect("UTF-8")]);
    let again = quantize();
    let file_names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
    let missing: Vec<&str> = file_names.into_iter().filter(|name| !out.join(name).is_file()).collect();
    std::fs::remove_dir_all(&out).expect("the folder was written");
    assert_eq!(missing, [""; 0]);
    for key in ["mean_kl", "max_kl", "greedy_agreement_percent", "perplexity"] {
        assert_eq!(packed["reference"][key], found["reference"][key], "{key}");
    }
    assert_eq!(packed["perplexity"], found["perplexity"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("it exists already"));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let model = golden("olmoe-base");
    let text = TextFile::new("refused", TEXT.as_bytes());
    for (bytes, args, expect) in [
        (&b""[..], &[][..], "is too short: it has 0 tokens"),
        (b"a", &[], "is too short: it has 1 tokens"),
        (b"\xff\xfe", &[], "is not UTF-8"),
    ] {
        let error = refusal(&model, &TextFile::new("broken", bytes), args);
        assert!(error.contains(expect), "{error}");
    }
    let tiktoken = golden("kimi_k2-tiktoken");
    let error = refusal(&model, &text, &["--against", tiktoken.to_str().expect("UTF-8")]);
    assert!(error.contains("split the text into different tokens"), "{error}");
    let error = refusal(&golden("switch_transformers-base"), &text, &[]);
    assert!(error.contains("reads its text with an encoder"), "{error}");
    let output = run(&model, &text, &["--context", "1"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let error = refusal(&model, &TextFile(PathBuf::from("/no/such/file")), &[]);
    assert!(error.contains("cannot read /no/such/file"), "{error}");
}

//! `moesaic profile`: how much a text, or a list of prompts, uses each expert of a model.

use std::fs::Metadata;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail, ensure};
use engine::{ExpertProfile, KvDtype, LoadedModel};
use indicatif::MultiProgress;
use serde::Deserialize as _;
use serde_json::{Value, json};

use super::line_file::{BYTE_ORDER_MARK, lines, open};
use super::reading::{Reading, bar, start_token};
use super::serve::{load_text, model_name};
use crate::config::{DeviceName, ExpertShare, QuantType, WeightType};
use crate::conversation::Conversation;
use crate::hub::{self, HubOptions};
use crate::openai::chat::ChatOptions;
use crate::openai::completions::Prompt;
use crate::text::{ChatTemplate, EncodeOptions, Tokenizer};

/// A text is tokenized in pieces of whole lines that are at least so long.
const PIECE_BYTES: usize = 64 << 10;

/// Write down how much a text uses each expert of a model
///
/// A server starts from such a profile with what is used most. Prompts longer than `--context` are read in pieces, each by itself.
#[derive(clap::Args, Debug)]
pub struct ProfileArgs {
    /// Hugging Face folder, GGUF file or hub id
    pub model: String,
    /// Text in UTF-8; or, where its name ends in .jsonl, JSON lines: a text in quotes, or an object with `messages` or `prompt`
    pub file: PathBuf,
    /// Where to write the profile; standard output where not given
    #[arg(long, value_name = "PROFILE")]
    pub out: Option<PathBuf>,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// Storage type of the weights in memory
    #[arg(long, value_enum, default_value_t = WeightType::Auto)]
    pub dtype: WeightType,
    /// What the weights are quantized to while loading
    #[arg(long, value_enum, default_value_t = QuantType::None)]
    pub quant: QuantType,
    /// Memory of the experts of a packed folder (8GiB, or 50% of their bytes); the others are read when they are needed. All where not given
    #[arg(long)]
    pub expert_memory: Option<ExpertShare>,
    /// Tokens to read, at most; all where not given
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_tokens: Option<u64>,
    /// Tokens that are read at once, 2 to 65536
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=65_536))]
    pub context: u32,
    /// Where the model computes: auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t)]
    pub device: DeviceName,
    /// Compute threads; all cores the process may run on where not given
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// Writes the profile, with a progress bar on stderr.
///
/// # Errors
/// A file or a model that cannot be read, a line that is no prompt, a text without tokens, a place that cannot be written to.
pub fn run(args: &ProfileArgs) -> anyhow::Result<()> {
    // A file that is not there is known before a model is loaded.
    let file = open(&args.file)?;
    if let Some(path) = &args.out {
        check_place(path)?;
    }
    let model_dir = hub::resolve(&args.model, &HubOptions::from_env(args.revision.clone()), &MultiProgress::new())?;
    let (tokenizer, template) = load_text(&model_dir, None)?;
    let &ProfileArgs { dtype, quant, context, threads, device, expert_memory, .. } = args;
    let mut model =
        Reading { dtype, quant, kv_dtype: KvDtype::Auto, device, context, threads, expert_memory }.load(&model_dir)?;
    let has_experts = !model.runner.expert_loads().layers().is_empty();
    ensure!(has_experts, "{} has no experts, of which there could be a profile", model_dir.display());
    let mut reader = Reader {
        text: TextSide { start: start_token(&tokenizer)?, tokenizer, template },
        // The first token of a decoder behind an encoder needs a place too.
        piece_len: (args.context as usize).min(model.summary.max_model_len).saturating_sub(1).max(1),
        room: args.max_tokens.unwrap_or(u64::MAX),
        model: &mut model,
    };
    let num_bytes = std::fs::metadata(&args.file).ok().filter(Metadata::is_file).map(|metadata| metadata.len());
    let bar = bar("reading", "{bytes}/{total_bytes} {eta}", num_bytes.unwrap_or(0));
    let is_list = args.file.extension().is_some_and(|extension| extension == "jsonl" || extension == "ndjson");
    let mut piece = String::new();
    for (line, number) in lines(file).zip(1u64..) {
        let at = || format!("{}:{number}", args.file.display());
        if reader.room == 0 {
            break;
        }
        let line = line.with_context(at)?;
        bar.inc(line.len() as u64);
        let text = if number == 1 { line.trim_start_matches(BYTE_ORDER_MARK) } else { &line };
        if is_list {
            reader.read_line(text).with_context(at)?;
            continue;
        }
        piece.push_str(text);
        if piece.len() >= PIECE_BYTES {
            reader.read_text(&piece).with_context(at)?;
            piece.clear();
        }
    }
    reader.read_text(&piece)?;
    bar.finish_and_clear();
    let sums = model.runner.expert_loads().since_start();
    let weights = model.fingerprint.sampled_weights();
    let profile = ExpertProfile::new((&model_name(&args.model), weights), &sums);
    ensure!(profile.num_tokens > 0, "{} has no token to read: there is nothing in it", args.file.display());
    match &args.out {
        Some(path) => profile.write(path)?,
        None => std::io::stdout().write_all(profile.to_json().as_bytes()).context("cannot write to stdout")?,
    }
    eprintln!("{} tokens passed {} routers", profile.num_tokens, profile.layers.len());
    Ok(())
}

/// Whether a file can be there, before a long text is read for it.
fn check_place(path: &Path) -> anyhow::Result<()> {
    ensure!(!path.is_dir(), "--out {} is a folder; hint: name a file in it", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "--out {}: there is no folder {}", path.display(), folder.display());
    Ok(())
}

/// Text to tokens.
struct TextSide {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    start: Option<u32>,
}

impl TextSide {
    /// The tokens of one line of a list.
    fn prompt(&self, line: &str) -> anyhow::Result<Vec<u32>> {
        let not_json =
            |error: serde_json::Error| anyhow!("not JSON at column {}; hint: a text stands in quotes", error.column());
        let body = match serde_json::from_str(line).map_err(not_json)? {
            Value::String(text) => json!({"messages": [{"role": "user", "content": text}]}),
            Value::Object(fields) => Value::Object(fields),
            _ => bail!("expected a text or an object"),
        };
        match (body.get("messages"), body.get("prompt")) {
            (Some(_), None) => {
                let Some(template) = &self.template else {
                    bail!("the model has no chat template; hint: give `prompt`")
                };
                let options: ChatOptions = serde_json::from_value(body)?;
                Ok(Conversation::new(&options)?.to_ids(template, &self.tokenizer)?)
            }
            (None, Some(prompt)) => match Prompt::deserialize(prompt)? {
                Prompt::Text(text) => Ok(self.tokenizer.encode(&text, EncodeOptions { add_special_tokens: true })?),
                Prompt::Tokens(tokens) => Ok(tokens),
                Prompt::Texts(_) | Prompt::TokenLists(_) => bail!("`prompt`: expected one prompt"),
            },
            _ => bail!("expected either `messages` or `prompt`"),
        }
    }
}

/// Has tokens counted.
struct Reader<'a> {
    text: TextSide,
    piece_len: usize,
    /// Tokens that may still be read.
    room: u64,
    model: &'a mut LoadedModel,
}

impl Reader<'_> {
    fn read_line(&mut self, line: &str) -> anyhow::Result<()> {
        if line.trim().is_empty() || self.room == 0 {
            return Ok(());
        }
        let tokens = self.text.prompt(line.trim_end())?;
        tokens.chunks(self.piece_len).try_for_each(|piece| self.read(piece))
    }

    fn read_text(&mut self, text: &str) -> anyhow::Result<()> {
        let tokens = self.text.tokenizer.encode(text, EncodeOptions::default())?;
        let start = self.text.start;
        let len = self.piece_len - usize::from(start.is_some() && self.piece_len > 1);
        tokens.chunks(len).try_for_each(|piece| {
            let piece: Vec<u32> = start.into_iter().chain(piece.iter().copied()).collect();
            self.read(&piece)
        })
    }

    fn read(&mut self, piece: &[u32]) -> anyhow::Result<()> {
        let vocab_size = self.model.summary.vocab_size;
        if let Some(token) = piece.iter().find(|token| **token as usize >= vocab_size) {
            bail!("token id {token} is out of range, the vocabulary has {vocab_size} entries");
        }
        let num_read = usize::try_from(self.room).unwrap_or(usize::MAX).min(piece.len());
        self.room -= num_read as u64;
        if num_read > 0 {
            self.model.runner.read_prompt(&Arc::from(&piece[..num_read]))?;
        }
        Ok(())
    }
}

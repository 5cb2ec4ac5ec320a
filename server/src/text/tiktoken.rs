//! A tokenizer from `tiktoken.model`, as Kimi-K2 ships it: byte strings with ranks, and special tokens after them.

use std::{collections::HashMap, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokenizers::{
    AddedToken, SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{
    TextError,
    token_bytes::BYTE_CHARS,
    tokenizer_config::{MAX_VOCABULARY_BYTES, TokenizerConfig, read_json, read_optional},
};

/// How Kimi-K2 splits a text before merging, from its `tokenization_kimi.py`.
pub(super) const KIMI_PATTERN: &str = concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// Ids after the ranks that Kimi-K2 names `<|reserved_token_N|>` where `added_tokens_decoder` does not name them.
const NUM_RESERVED_TOKENS: usize = 256;

/// Most ids after the ranks, whatever the model's vocabulary claims to be: each becomes a token.
const MAX_SPECIAL_TOKENS: usize = 1 << 16;

/// Of one token; published ones have at most some hundred. The ways to split a token grow with the square of it.
const MAX_TOKEN_BYTES: usize = 1024;

/// Bytes of every token, indexed by rank, which is its id.
type Ranks = Vec<Vec<u8>>;

/// `None` where the folder has no `tiktoken.model`.
pub(super) fn load(model_dir: &Path, config: &TokenizerConfig) -> Result<Option<tokenizers::Tokenizer>, TextError> {
    let path = model_dir.join("tiktoken.model");
    let Some(text) = read_optional(&path, MAX_VOCABULARY_BYTES)? else { return Ok(None) };
    let ranks = parse_ranks(&text).map_err(|reason| TextError::invalid(&path, reason))?;
    let specials = special_tokens(ranks.len(), config, model_vocab_size(model_dir)?)?;
    build(&ranks, specials).map(Some).map_err(|error| TextError::invalid(&path, error))
}

/// Lines of `base64(bytes) rank`, in any order.
fn parse_ranks(text: &str) -> Result<Ranks, String> {
    let mut entries = Vec::new();
    for (line_idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let expected = || format!("line {}: expected `base64 rank`", line_idx + 1);
        let (token, rank) = line.trim().split_once(' ').ok_or_else(expected)?;
        let bytes = STANDARD.decode(token).map_err(|_| expected())?;
        if bytes.len() > MAX_TOKEN_BYTES {
            return Err(format!(
                "line {}: a token of {} bytes, the limit is {MAX_TOKEN_BYTES}",
                line_idx + 1,
                bytes.len()
            ));
        }
        let rank: usize = rank.trim().parse().map_err(|_| expected())?;
        entries.push((rank, bytes));
    }
    entries.sort();
    if let Some((expected, (rank, _))) = entries.iter().enumerate().find(|(expected, (rank, _))| expected != rank) {
        return Err(format!("ranks must be 0, 1, 2, …: expected rank {expected}, got {rank}"));
    }
    let ranks: Ranks = entries.into_iter().map(|(_, bytes)| bytes).collect();
    let mut has_byte = [false; 256];
    for token in ranks.iter().filter(|token| token.len() == 1) {
        has_byte[usize::from(token[0])] = true;
    }
    // Without it a text could hold bytes that no token stands for, and they would vanish.
    match has_byte.iter().position(|has| !has) {
        Some(byte) => Err(format!("no token for the single byte 0x{byte:02X}")),
        None => Ok(ranks),
    }
}

/// The rows of the model's embedding, so that no reserved token lies beyond them.
fn model_vocab_size(model_dir: &Path) -> Result<Option<usize>, TextError> {
    let config = read_json(&model_dir.join("config.json"))?.unwrap_or_default();
    let size = config["vocab_size"].as_u64().or_else(|| config["text_config"]["vocab_size"].as_u64());
    Ok(size.and_then(|size| usize::try_from(size).ok()))
}

/// Tokens for the ids from `num_ranks` on, without gaps: those of the configuration, and reserved ones between.
fn special_tokens(
    num_ranks: usize,
    config: &TokenizerConfig,
    vocab_size: Option<usize>,
) -> Result<Vec<AddedToken>, TextError> {
    let mut named: HashMap<usize, AddedToken> = HashMap::new();
    let vocab_size = vocab_size.map(|size| size.min(num_ranks + MAX_SPECIAL_TOKENS));
    let mut end = (num_ranks + NUM_RESERVED_TOKENS).min(vocab_size.unwrap_or(usize::MAX));
    let limit = (num_ranks + NUM_RESERVED_TOKENS).max(vocab_size.unwrap_or(0));
    for (id, token) in &config.added_tokens {
        let id = *id as usize;
        if !(num_ranks..limit).contains(&id) {
            let reason = format!("added token {:?} has id {id}, outside {num_ranks}..{limit}", token.content);
            return Err(TextError::invalid(&config.path, reason));
        }
        end = end.max(id + 1);
        named.insert(id, token.clone());
    }
    let reserved = |id| AddedToken::from(format!("<|reserved_token_{id}|>"), true).normalized(false);
    Ok((num_ranks..end).map(|id| named.remove(&id).unwrap_or_else(|| reserved(id))).collect())
}

fn build(ranks: &Ranks, specials: Vec<AddedToken>) -> Result<tokenizers::Tokenizer, tokenizers::Error> {
    let spell = |bytes: &[u8]| bytes.iter().map(|&byte| BYTE_CHARS[usize::from(byte)]).collect::<String>();
    let vocab: Vec<(String, u32)> = ranks.iter().map(|bytes| spell(bytes)).zip(0..).collect();
    let merges = merges(ranks).into_iter().map(|(left, right)| (spell(left), spell(right))).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        // tiktoken takes a piece that is a token as it is, whether or not merges would build it.
        .ignore_merges(true)
        .build()?;
    let split = Split::new(SplitPattern::Regex(KIMI_PATTERN.to_owned()), SplitDelimiterBehavior::Isolated, false)?;
    let byte_level = ByteLevel::new(false, false, false);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), byte_level.into()])));
    tokenizer.with_decoder(Some(byte_level));
    let expected: Vec<(u32, String)> = (ranks.len() as u32..).zip(specials.iter().map(|t| t.content.clone())).collect();
    tokenizer.add_tokens(specials)?;
    match expected.iter().find(|(id, content)| tokenizer.token_to_id(content) != Some(*id)) {
        Some((id, content)) => {
            Err(format!("the added token {content:?} cannot have id {id}: its text is a token already").into())
        }
        None => Ok(tokenizer),
    }
}

/// Every way to build a token from two, ordered by the rank of the token: merging the first applicable pair of this list
/// is merging the adjacent pair whose concatenation has the lowest rank.
fn merges(ranks: &Ranks) -> Vec<(&[u8], &[u8])> {
    let ids: HashMap<&[u8], usize> = ranks.iter().enumerate().map(|(id, bytes)| (bytes.as_slice(), id)).collect();
    let mut merges = Vec::new();
    for token in ranks {
        let mut pairs: Vec<(usize, usize, usize)> =
            (1..token.len()).filter_map(|at| Some((*ids.get(&token[..at])?, *ids.get(&token[at..])?, at))).collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|(_, _, at)| token.split_at(at)));
    }
    merges
}

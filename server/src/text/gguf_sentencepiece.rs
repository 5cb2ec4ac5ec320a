//! SentencePiece vocabularies of GGUF files (`tokenizer.ggml.model` is `llama`) as Hugging Face converts them: BPE whose
//! merges follow from the pieces' scores, with bytes where no piece fits.

use std::collections::HashMap;

use serde_json::{Value, json};

/// Of a piece that is made of others; published ones have at most some dozen. The ways to split a piece grow with it.
const MAX_MERGED_BYTES: usize = 256;

/// Texts begin with a space unless `begins_with_space` is false; spaces are written `▁`.
pub(super) fn normalizer(begins_with_space: bool) -> Value {
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    match begins_with_space {
        true => json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, spaces] }),
        false => json!({ "type": "Sequence", "normalizers": [spaces] }),
    }
}

/// The way back.
pub(super) fn decoder(begins_with_space: bool) -> Value {
    let mut steps = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if begins_with_space {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": steps })
}

/// Every way to make a piece of two others, that of the highest score first. `pieces` are the ordinary ones with their ids
/// and scores.
pub(super) fn merges<'a>(pieces: &[(usize, &'a str, f64)]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> = pieces.iter().map(|(id, piece, _)| (*piece, *id)).collect();
    let mut merges = Vec::new();
    for (_, piece, score) in pieces.iter().filter(|(_, piece, _)| piece.len() <= MAX_MERGED_BYTES) {
        let splits = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let mut known: Vec<_> =
            splits.filter_map(|(left, right)| Some((ids.get(left)?, ids.get(right)?, left, right))).collect();
        known.sort_unstable();
        merges.extend(known.into_iter().map(|(_, _, left, right)| (*score, left, right)));
    }
    let len = |part: &str| part.chars().count();
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(len(b.1).cmp(&len(a.1))).then(len(b.2).cmp(&len(a.2))));
    merges.into_iter().map(|(_, left, right)| [left, right]).collect()
}

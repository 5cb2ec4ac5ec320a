//! Every golden checkpoint: tokenizer samples, the rendered chat, and incremental detokenization.

use std::{fs, path::Path, sync::Arc};

use engine::GgufFile;
use serde_json::{Map, Value};

use super::golden_dir;
use crate::text::{ChatInput, ChatTemplate, DetokenizeOptions, Detokenizer, EncodeOptions, Tokenizer, TokenizerFiles};

const PLAIN: EncodeOptions = EncodeOptions { add_special_tokens: false };
const WITH_SPECIAL: EncodeOptions = EncodeOptions { add_special_tokens: true };

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of token ids")
}

fn check(dir: &Path, reference: &Value) {
    let tokenizer = Tokenizer::load(dir).expect("a golden tokenizer");
    let template = ChatTemplate::load(dir, None).expect("a golden template").expect("every folder has one");
    check_text(&dir.display().to_string(), (tokenizer, template), reference);
}

fn check_text(name: &str, (tokenizer, template): (Tokenizer, ChatTemplate), reference: &Value) {
    let tokenizer = Arc::new(tokenizer);
    for sample in reference["tokenizer"]["samples"].as_array().expect("samples") {
        let text = sample["text"].as_str().expect("text");
        let expected = ids(&sample["ids"]);
        assert_eq!(tokenizer.encode(text, PLAIN).expect(text), expected, "{name}: {text:?}");
        let with_special = tokenizer.encode(text, WITH_SPECIAL).expect(text);
        assert_eq!(with_special, ids(&sample["ids_with_special"]), "{name}: {text:?} with special tokens");
        assert_eq!(tokenizer.decode(&expected, false).expect(text), text, "{name}");
        assert_eq!(tokenizer.decode(&with_special, true).expect(text), text, "{name}");
        check_stream(&tokenizer, &expected);
    }

    let chat = &reference["tokenizer"]["chat"];
    let input = ChatInput {
        messages: &chat["messages"],
        tools: None,
        add_generation_prompt: true,
        continue_final_message: false,
        extra: &Map::new(),
    };
    let rendered = template.render(&input).expect("a rendered chat");
    assert_eq!(rendered, chat["rendered"], "{name}");
    assert_eq!(tokenizer.encode(&rendered, PLAIN).expect("ids"), ids(&chat["ids"]), "{name}");
    check_stream(&tokenizer, &ids(&chat["ids"]));

    for prompt in reference["prompts"].as_array().expect("prompts") {
        let greedy = ids(&prompt["greedy_ids"]);
        assert_eq!(tokenizer.decode(&greedy, false).expect("text"), prompt["greedy_text"], "{name}");
        check_stream(&tokenizer, &greedy);
    }
}

/// What a stream delivers, joined, is the text of all ids.
fn check_stream(tokenizer: &Arc<Tokenizer>, ids: &[u32]) {
    for skip_special_tokens in [false, true] {
        let options = DetokenizeOptions { skip_special_tokens, ..DetokenizeOptions::default() };
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), options);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id).expect("text")).collect();
        text.push_str(&detokenizer.finish());
        assert_eq!(text, tokenizer.decode(ids, skip_special_tokens).expect("text"), "{ids:?}");
    }
}

/// llama.cpp's converter keeps of a tokenizer what it needs, which must be enough for the same ids.
#[test]
fn converted_checkpoints_have_the_same_text_side() {
    for name in ["granitemoeshared-base", "gpt_oss-mxfp4"] {
        let gguf = GgufFile::open(&golden_dir().join(format!("{name}.gguf"))).expect("a golden file");
        let files = TokenizerFiles::from_gguf(&gguf).expect("a tokenizer");
        let tokenizer = Tokenizer::from_gguf(&files).expect("a tokenizer");
        let template = ChatTemplate::from_gguf(&files, None).expect("a template").expect("every file has one");
        let reference = fs::read_to_string(golden_dir().join(name).join("reference.json")).expect("a reference");
        let reference = serde_json::from_str(&reference).expect("reference.json is JSON");
        check_text(&format!("{name}.gguf"), (tokenizer, template), &reference);
    }
}

#[test]
fn every_golden_checkpoint() {
    let mut num_checked = 0;
    for entry in fs::read_dir(golden_dir()).expect("tests/golden") {
        let dir = entry.expect("a folder entry").path();
        let Ok(reference) = fs::read_to_string(dir.join("reference.json")) else { continue };
        check(&dir, &serde_json::from_str(&reference).expect("reference.json is JSON"));
        num_checked += 1;
    }
    assert!(num_checked >= 19, "only {num_checked} golden checkpoints found");
}

//! Tokenizers from GGUF metadata written here: every byte a token, and a few merges.

use super::*;

/// A GGUF file with metadata only.
struct MetadataFile {
    bytes: Vec<u8>,
    num_keys: u64,
}

fn string_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl MetadataFile {
    fn new() -> Self {
        Self { bytes: Vec::new(), num_keys: 0 }
    }

    fn raw(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        self.bytes.extend(string_bytes(key));
        self.bytes.extend(value_type.to_le_bytes());
        self.bytes.extend(value);
        self.num_keys += 1;
        self
    }

    fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string_bytes(value))
    }

    fn array(self, key: &str, element_type: u32, elements: &[Vec<u8>]) -> Self {
        let head = [&element_type.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes()].concat();
        self.raw(key, 9, &[head, elements.concat()].concat())
    }

    fn open(self, name: &str) -> GgufFile {
        let path = std::env::temp_dir().join(format!("moesaic-{name}-{}.gguf", std::process::id()));
        let header = [&b"GGUF\x03\0\0\0"[..], &0u64.to_le_bytes(), &self.num_keys.to_le_bytes()].concat();
        std::fs::write(&path, [header, self.bytes].concat()).unwrap();
        let gguf = GgufFile::open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        gguf
    }
}

const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<tool>"];
const MERGES: [&str; 7] = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3"];

/// Three added tokens, the 256 byte characters, the merges, and one unused entry.
fn vocabulary(pre: &str) -> MetadataFile {
    let mut tokens: Vec<String> = SPECIALS.map(str::to_owned).to_vec();
    let mut bytes: Vec<String> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().map(String::from).collect();
    bytes.sort();
    tokens.extend(bytes);
    tokens.extend(MERGES.map(|merge| merge.replace(' ', "")));
    tokens.push("[PAD0]".into());
    let mut token_types = vec![1u32; tokens.len()];
    (token_types[0], token_types[1], token_types[2]) = (3, 3, 4);
    *token_types.last_mut().unwrap() = 5;
    let texts = |texts: Vec<String>| -> Vec<Vec<u8>> { texts.iter().map(|text| string_bytes(text)).collect() };
    let types: Vec<Vec<u8>> = token_types.iter().map(|kind| kind.to_le_bytes().to_vec()).collect();
    MetadataFile::new()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", pre)
        .array("tokenizer.ggml.tokens", 8, &texts(tokens))
        .array("tokenizer.ggml.token_type", 5, &types)
        .array("tokenizer.ggml.merges", 8, &texts(MERGES.map(str::to_owned).to_vec()))
        .raw("tokenizer.ggml.bos_token_id", 4, &1u32.to_le_bytes())
        .raw("tokenizer.ggml.eos_token_id", 4, &0u32.to_le_bytes())
        .text("tokenizer.chat_template", "{{ messages }}")
}

fn tokenizer(gguf: &GgufFile) -> tokenizers::Tokenizer {
    let files = TokenizerFiles::from_gguf(gguf).unwrap();
    tokenizers::Tokenizer::from_bytes(files.tokenizer_json).unwrap()
}

fn check_pieces(pre: &str, text: &str, expected: &[&str]) {
    let tokenizer = tokenizer(&vocabulary(pre).open(&format!("pieces-{pre}")));
    let encoding = tokenizer.encode(text, false).unwrap();
    assert_eq!(encoding.get_tokens(), expected, "{pre} {text:?}");
    assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), text, "{pre}");
}

#[test]
fn each_way_of_splitting_is_its_own() {
    check_pieces("smollm", "hello 123", &["hello", "Ġ", "1", "2", "3"]);
    check_pieces("smollm", "a hello", &["a", "Ġhello"]);
    check_pieces("gpt-2", "123hello", &["123", "hello"]);
    check_pieces("llama-bpe", "1231", &["123", "1"]);
    check_pieces("qwen2", "123", &["1", "2", "3"]);
    check_pieces("default", "1231", &["123", "1"]);
    check_pieces("gpt-2", "é", &["Ã", "©"]);
    check_pieces("olmo", "123hello", &["123", "hello"]);
    check_pieces("refact", "hello 123", &["hello", "Ġ", "1", "2", "3"]);
    check_pieces("starcoder", "a hello1", &["a", "Ġhello", "1"]);
    check_pieces("dbrx", "1231", &["123", "1"]);
    check_pieces("gpt-4o", "1231 hello", &["123", "1", "Ġhello"]);
    check_pieces("kimi-k2", "1231 hello", &["123", "1", "Ġhello"]);
    check_pieces("deepseek-llm", "a hello 12\n", &["a", "Ġhello", "Ġ", "1", "2", "Ċ"]);
    check_pieces("deepseek-coder", "a hello 12\n", &["a", "Ġhello", "Ġ", "1", "2", "Ċ"]);
    check_pieces("deepseek-v3", "a hello 1231\n", &["a", "Ġhello", "Ġ", "123", "1", "Ċ"]);
}

/// What SentencePiece (0.2.3, BPE with bytes) made of a few lines, best first, after three special pieces and all bytes.
const PIECES: &str = "▁t er ▁a ▁th en ▁to ▁the ot ▁e ▁r ken ▁token ts xp oth ▁an erts ▁exp ▁experts ch ds es of or os ou \
    ▁n ▁w out ▁of ▁and ▁oth ▁wor outer ▁other ▁router ▁tokens ad at ce do et ew ie in is re rn sw ▁c ▁ e \
    t o r s h n a d c k p w f i u x , g m";

/// That vocabulary, with its scores or without.
fn sentence_pieces(has_scores: bool) -> MetadataFile {
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).collect();
    let tokens: Vec<String> = tokens.into_iter().chain(PIECES.split(' ').map(str::to_owned)).collect();
    let first = 259;
    let types = (0..tokens.len()).map(|id| match id {
        0 => 2u32,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    });
    let scores = (0..tokens.len()).map(|id| first as f32 - id.max(first) as f32);
    let file = MetadataFile::new()
        .text("tokenizer.ggml.model", "llama")
        .array("tokenizer.ggml.tokens", 8, &tokens.iter().map(|token| string_bytes(token)).collect::<Vec<_>>())
        .array("tokenizer.ggml.token_type", 5, &types.map(|kind| kind.to_le_bytes().to_vec()).collect::<Vec<_>>())
        .raw("tokenizer.ggml.unknown_token_id", 4, &0u32.to_le_bytes())
        .raw("tokenizer.ggml.bos_token_id", 4, &1u32.to_le_bytes());
    match has_scores {
        true => file.array(
            "tokenizer.ggml.scores",
            6,
            &scores.map(|score| score.to_le_bytes().to_vec()).collect::<Vec<_>>(),
        ),
        false => file,
    }
}

/// A token that is no piece is spelled in bytes, and a text begins with a space.
#[test]
fn pieces_are_those_of_sentencepiece() {
    let tokenizer = tokenizer(&sentence_pieces(true).open("sentencepiece"));
    for (text, ids) in [
        ("the experts return to the router", &[265, 277, 268, 300, 325, 306, 264, 265, 294]),
        ("  others, then tokens", &[309, 309, 293, 314, 327, 262, 263, 295]),
        ("naïve\ttokens\n", &[285, 317, 198, 178, 121, 310, 12, 311, 312, 269, 314, 13]),
        ("answer", &[274, 307, 260]),
        ("x 1 Zz", &[309, 326, 309, 52, 309, 93, 125]),
        ("", &[]),
    ] as [(&str, &[u32]); 6]
    {
        let encoding = tokenizer.encode(text, false).unwrap();
        assert_eq!(encoding.get_ids(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("answer", true).unwrap().get_ids(), [1, 274, 307, 260]);
    let unspaced = sentence_pieces(true).raw("tokenizer.ggml.add_space_prefix", 7, &[0]).open("unspaced");
    let unspaced = super::super::Tokenizer::from_gguf(&TokenizerFiles::from_gguf(&unspaced).unwrap()).unwrap();
    let ids = unspaced.encode("x the", super::super::EncodeOptions::default()).unwrap();
    assert_eq!(ids, [326, 265]);
    assert_eq!(unspaced.decode(&ids, false).unwrap(), "x the");
}

#[test]
fn named_templates_are_found() {
    let files = vocabulary("smollm")
        .array("tokenizer.chat_templates", 8, &[string_bytes("tool_use")])
        .text("tokenizer.chat_template.tool_use", "tools");
    let files = TokenizerFiles::from_gguf(&files.open("templates")).unwrap();
    let config: Value = serde_json::from_str(&files.tokenizer_config_json).unwrap();
    assert_eq!(config["chat_template"][1], json!({ "name": "tool_use", "template": "tools" }));
    assert!(super::super::ChatTemplate::from_gguf(&files, None).unwrap().is_some());
}

#[test]
fn added_tokens_are_matched_whole_and_special_ones_can_be_skipped() {
    let tokenizer = tokenizer(&vocabulary("smollm").open("added"));
    let encoding = tokenizer.encode("<|im_start|>hello<tool>", true).unwrap();
    assert_eq!(encoding.get_tokens(), ["<|im_start|>", "hello", "<tool>"]);
    assert_eq!(encoding.get_ids()[0], 1);
    assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), "hello<tool>");
    assert_eq!(tokenizer.token_to_id("[PAD0]"), None);
}

#[test]
fn the_beginning_is_added_where_the_model_wants_it() {
    let llama = tokenizer(&vocabulary("llama-bpe").open("bos-default"));
    assert_eq!(llama.encode("hello", true).unwrap().get_tokens(), ["<|im_start|>", "hello"]);
    assert_eq!(llama.encode("hello", false).unwrap().get_tokens(), ["hello"]);
    let both = vocabulary("smollm").raw("tokenizer.ggml.add_bos_token", 7, &[1]);
    let both = tokenizer(&both.raw("tokenizer.ggml.add_eos_token", 7, &[1]).open("bos-eos"));
    assert_eq!(both.encode("hello", true).unwrap().get_tokens(), ["<|im_start|>", "hello", "<|endoftext|>"]);
}

#[test]
fn the_config_names_roles_and_template() {
    let files = TokenizerFiles::from_gguf(&vocabulary("smollm").open("config")).unwrap();
    let config: Value = serde_json::from_str(&files.tokenizer_config_json).unwrap();
    assert_eq!(config["bos_token"], "<|im_start|>");
    assert_eq!(config["eos_token"], "<|endoftext|>");
    assert_eq!(config["pad_token"], Value::Null);
    assert_eq!(config["chat_template"], "{{ messages }}");
    assert_eq!(config["added_tokens_decoder"]["2"]["special"], false);
    assert_eq!(config["add_bos_token"], false);
}

#[test]
fn what_is_unknown_or_broken_is_refused() {
    let check = |file: MetadataFile, name: &str, expected: &str| {
        let error = TokenizerFiles::from_gguf(&file.open(name)).unwrap_err().to_string();
        assert!(error.contains(expected), "`{error}` does not contain `{expected}`");
    };
    check(vocabulary("tekken"), "pre", "the `tekken` way");
    check(MetadataFile::new().text("tokenizer.ggml.model", "bert"), "kind", "kind `bert`");
    check(MetadataFile::new().text("tokenizer.ggml.model", "llama"), "pieces", "`tokenizer.ggml.tokens` is missing");
    let unscored = sentence_pieces(false);
    check(unscored, "scores", "metadata `tokenizer.ggml.scores` is missing");
    check(MetadataFile::new().text("tokenizer.ggml.model", "gpt2"), "tokens", "`tokenizer.ggml.tokens` is missing");
    let out_of_range = vocabulary("gpt-2").raw("tokenizer.ggml.padding_token_id", 4, &9999u32.to_le_bytes());
    check(out_of_range, "range", "9999, outside the vocabulary");
    let unknown_merge = MetadataFile::new()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .array("tokenizer.ggml.tokens", 8, &[string_bytes("a"), string_bytes("b")])
        .array("tokenizer.ggml.merges", 8, &[string_bytes("a b")]);
    check(unknown_merge, "merge", "merge \"a b\" is not two tokens");
}

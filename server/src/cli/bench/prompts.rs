//! Random prompts that no cache has seen: token ids where the server takes them, else words.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Endpoint;
use crate::cli::client::{Client, ClientError};

/// Words sent to `/tokenize` to learn ids from.
const NUM_PROBE_WORDS: usize = 2000;
/// Fewer ids than this make prompts too much alike.
const MIN_IDS: usize = 16;

/// Where prompts come from.
pub enum PromptSource {
    /// Ids of ordinary text, each once: never those of special tokens.
    TokenIds(Vec<u32>),
    Words {
        tokens_per_word: f64,
    },
}

/// How the prompts of a report were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptKind {
    TokenIds,
    Words,
}

pub enum Prompt {
    Ids(Vec<u32>),
    Text(String),
}

#[derive(Deserialize)]
struct Tokenized {
    tokens: Vec<u32>,
}

impl PromptSource {
    /// Asks the server's `/tokenize` (vLLM's shape) for the ids of random text. Chats take no ids, but words can be
    /// counted. A server without it gets words, at a token each.
    ///
    /// # Errors
    /// A server that cannot be reached, refuses the key, or fails.
    pub fn probe(client: &Client, model: &str, endpoint: Endpoint, rng: &mut StdRng) -> Result<Self, ClientError> {
        let text = match endpoint {
            Endpoint::Completions => varied_text(NUM_PROBE_WORDS, rng),
            Endpoint::Chat => words(NUM_PROBE_WORDS, rng),
        };
        let body = json!({"model": model, "prompt": text, "add_special_tokens": false});
        let ids = match client.post::<Tokenized>("/tokenize", &body) {
            Ok(answer) => answer.tokens,
            Err(error) if is_missing(&error) => Vec::new(),
            Err(error) => return Err(error),
        };
        if ids.is_empty() {
            return Ok(Self::Words { tokens_per_word: 1.0 });
        }
        let tokens_per_word = ids.len() as f64 / NUM_PROBE_WORDS as f64;
        let mut distinct = ids;
        distinct.sort_unstable();
        distinct.dedup();
        match endpoint {
            Endpoint::Completions if distinct.len() >= MIN_IDS => Ok(Self::TokenIds(distinct)),
            _ => Ok(Self::Words { tokens_per_word }),
        }
    }

    pub fn kind(&self) -> PromptKind {
        match self {
            Self::TokenIds(_) => PromptKind::TokenIds,
            Self::Words { .. } => PromptKind::Words,
        }
    }

    /// A prompt of `num_tokens` tokens, or of words that come close to it.
    pub fn draw(&self, num_tokens: usize, rng: &mut StdRng) -> Prompt {
        match self {
            Self::TokenIds(ids) => Prompt::Ids((0..num_tokens).map(|_| ids[rng.random_range(0..ids.len())]).collect()),
            Self::Words { tokens_per_word } => {
                let num_words = (num_tokens as f64 / tokens_per_word).round() as usize;
                Prompt::Text(words(num_words.max(1), rng))
            }
        }
    }
}

impl Prompt {
    /// Tokens, where they are known before the server counts them.
    pub fn num_tokens(&self) -> Option<usize> {
        match self {
            Self::Ids(ids) => Some(ids.len()),
            Self::Text(_) => None,
        }
    }

    pub fn into_field(self, endpoint: Endpoint) -> (&'static str, Value) {
        match (endpoint, self) {
            (Endpoint::Completions, Self::Ids(ids)) => ("prompt", ids.into()),
            (Endpoint::Completions, Self::Text(text)) => ("prompt", text.into()),
            (Endpoint::Chat, Self::Text(text)) => ("messages", json!([{"role": "user", "content": text}])),
            (Endpoint::Chat, Self::Ids(_)) => unreachable!("`probe` gives chats words"),
        }
    }
}

/// Random numbers of one request: the same for the same seed and place, whatever the other requests do.
pub fn rng_of(seed: u64, run_idx: usize, request_idx: usize) -> StdRng {
    let mut key = [0; 32];
    for (part, number) in key.chunks_exact_mut(8).zip([seed, run_idx as u64, request_idx as u64]) {
        part.copy_from_slice(&number.to_le_bytes());
    }
    StdRng::from_seed(key)
}

/// Whether the endpoint is not there, or takes another shape of request.
fn is_missing(error: &ClientError) -> bool {
    match error {
        ClientError::Status { status, .. } => matches!(status, 400 | 404 | 405 | 422 | 501),
        ClientError::BadAnswer { .. } => true,
        _ => false,
    }
}

fn words(num_words: usize, rng: &mut StdRng) -> String {
    let words: Vec<&str> = (0..num_words).map(|_| word(rng)).collect();
    words.join(" ")
}

/// Words, capitals, compounds and numbers: more different tokens than words alone.
fn varied_text(num_words: usize, rng: &mut StdRng) -> String {
    let forms: Vec<String> = (0..num_words)
        .map(|_| match rng.random_range(0..4) {
            0 => word(rng).to_owned(),
            1 => word(rng)[..1].to_uppercase() + &word(rng)[1..],
            2 => format!("{}{}", word(rng), word(rng)),
            _ => rng.random_range(0..10_000).to_string(),
        })
        .collect();
    forms.join(" ")
}

fn word(rng: &mut StdRng) -> &'static str {
    WORDS[rng.random_range(0..WORDS.len())]
}

/// Common English words, all in ASCII.
const WORDS: [&str; 161] = [
    "able", "about", "above", "across", "after", "again", "against", "air", "almost", "along", "always", "among",
    "animal", "answer", "any", "around", "back", "ball", "bank", "base", "bear", "beauty", "bed", "before", "begin",
    "behind", "best", "bird", "black", "blue", "boat", "body", "book", "box", "bring", "brother", "build", "busy",
    "call", "car", "carry", "center", "change", "check", "child", "city", "class", "clear", "cold", "color", "common",
    "cook", "cool", "country", "course", "cover", "cross", "dance", "dark", "day", "deep", "door", "draw", "dream",
    "drive", "dry", "early", "earth", "east", "easy", "end", "enough", "even", "every", "eye", "face", "family", "far",
    "farm", "fast", "father", "field", "figure", "fill", "final", "fire", "fish", "floor", "flower", "fly", "follow",
    "food", "foot", "force", "forest", "form", "free", "friend", "front", "full", "game", "garden", "girl", "glass",
    "gold", "good", "grand", "great", "green", "ground", "group", "grow", "half", "hand", "happy", "hard", "head",
    "hear", "heart", "heat", "heavy", "high", "hill", "home", "horse", "hot", "hour", "house", "idea", "inch",
    "island", "kind", "king", "know", "land", "language", "large", "last", "late", "laugh", "lead", "learn", "leave",
    "letter", "life", "light", "line", "list", "live", "long", "low", "machine", "main", "map", "mark", "measure",
    "money", "moon", "morning", "mountain", "music",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(source: &PromptSource, mut rng: StdRng) -> Vec<u32> {
        match source.draw(64, &mut rng) {
            Prompt::Ids(ids) => ids,
            Prompt::Text(_) => panic!("words"),
        }
    }

    #[test]
    fn prompts_have_their_length_and_repeat_only_with_seed_and_place() {
        let source = PromptSource::TokenIds((100..400).collect());
        let first = ids(&source, rng_of(1, 0, 0));
        assert!(first.len() == 64 && first.iter().all(|id| (100..400).contains(id)));
        assert_eq!(first, ids(&source, rng_of(1, 0, 0)));
        for other in [rng_of(2, 0, 0), rng_of(1, 1, 0), rng_of(1, 0, 1)] {
            assert_ne!(first, ids(&source, other));
        }
    }

    #[test]
    fn words_are_as_many_as_their_tokens_say() {
        for (num_tokens, tokens_per_word, num_words) in [(100, 1.0, 100), (100, 2.5, 40), (1, 3.0, 1)] {
            let source = PromptSource::Words { tokens_per_word };
            let Prompt::Text(text) = source.draw(num_tokens, &mut rng_of(0, 0, 0)) else { panic!("ids") };
            assert_eq!(text.split(' ').count(), num_words);
        }
    }
}

//! Token ids to text, one at a time, in pieces that never hold half a character.

use std::sync::Arc;

use super::{TextError, Tokenizer, token_bytes::TextAssembler};

/// How a [`Detokenizer`] treats special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetokenizeOptions {
    /// Leaves special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Keeps the space that some decoders put between neighbouring added tokens.
    pub spaces_between_special_tokens: bool,
}

impl Default for DetokenizeOptions {
    fn default() -> Self {
        Self { skip_special_tokens: true, spaces_between_special_tokens: true }
    }
}

/// Ids of the prompt that decide how the first generated token reads; more than a character's bytes.
const MAX_PRIMING_IDS: usize = 8;

/// Ids a window may hold back; four byte tokens make a character, so a longer tail of U+FFFD will not become one.
const MAX_HELD_IDS: usize = 8;

/// Decodes a stream. What it returns, concatenated, is [`Tokenizer::decode`] of all ids; each id costs a time that does
/// not depend on how many came before.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    options: DetokenizeOptions,
    state: State,
    last_was_added: bool,
}

#[derive(Debug)]
enum State {
    Bytes(TextAssembler),
    Window(Window),
}

/// The last ids, for decoders that only know the text of ids in their context.
#[derive(Debug, Default)]
struct Window {
    ids: Vec<u32>,
    /// How many of `ids` are context whose text is out already.
    num_context: usize,
    /// The text of those.
    context: String,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, options: DetokenizeOptions) -> Self {
        let state = match tokenizer.assembler() {
            Some(assembler) => State::Bytes(assembler),
            None => State::Window(Window::default()),
        };
        Self { tokenizer, options, state, last_was_added: false }
    }

    /// A detokenizer for what follows `prompt`: the leading space of the first word survives, and a character whose
    /// first bytes end the prompt is completed.
    pub fn with_prompt(
        tokenizer: Arc<Tokenizer>,
        options: DetokenizeOptions,
        prompt: &[u32],
    ) -> Result<Self, TextError> {
        let mut detokenizer = Self::new(tokenizer, options);
        let mut tail: Vec<u32> =
            prompt.iter().rev().copied().filter(|&id| detokenizer.has_text(id)).take(MAX_PRIMING_IDS).collect();
        tail.reverse();
        for id in tail {
            detokenizer.push(id)?;
        }
        Ok(detokenizer)
    }

    /// The text that `id` decides; empty while a character is unfinished, for skipped tokens and for unknown ids.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        if !self.has_text(id) {
            return Ok(String::new());
        }
        let follows_added = std::mem::replace(&mut self.last_was_added, self.tokenizer.is_added(id));
        match &mut self.state {
            State::Bytes(assembler) => Ok(self.tokenizer.assemble(assembler, id)),
            State::Window(window) => {
                let text = window.push(&self.tokenizer, id)?;
                let joins = follows_added && self.last_was_added && !self.options.spaces_between_special_tokens;
                Ok(if joins { text.trim_start_matches(' ').to_owned() } else { text })
            }
        }
    }

    /// The text of what is still held back, with U+FFFD for bytes that never became a character.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(assembler) => assembler.finish(),
            State::Window(window) => window.finish(&self.tokenizer),
        }
    }

    fn has_text(&self, id: u32) -> bool {
        let skipped = self.options.skip_special_tokens && self.tokenizer.is_special(id);
        !skipped && self.tokenizer.id_to_token(id).is_some()
    }
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, false)?;
        let undecided = text.len() <= self.context.len() || text.ends_with(char::REPLACEMENT_CHARACTER);
        if undecided && self.ids.len() - self.num_context < MAX_HELD_IDS {
            return Ok(String::new());
        }
        let fresh = self.after_context(&text);
        self.ids.drain(..self.num_context);
        self.num_context = self.ids.len();
        self.context = tokenizer.decode(&self.ids, false)?;
        Ok(fresh)
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        // The same ids, but for the last, decoded before.
        let text = tokenizer.decode(&self.ids, false).unwrap_or_default();
        let fresh = self.after_context(&text);
        *self = Self::default();
        fresh
    }

    fn after_context(&self, text: &str) -> String {
        // Decoders that rewrite earlier text do not exist among those that language models use; the length still holds.
        text.get(self.context.len()..).unwrap_or_default().to_owned()
    }
}

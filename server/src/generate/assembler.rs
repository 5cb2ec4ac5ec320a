//! One choice's tokens to deltas: text that is safe to show, with the tokens it came from, and the end.

use engine::{ExpertUse, SampledToken};

use crate::error::ApiError;
use crate::openai::{FinishReason, StopReason};
use crate::text::{Detokenizer, StopMatcher, StopOptions};
use crate::validate::StopRules;

/// Text of tokens, one at a time.
pub trait TokenText: Send {
    /// The text that `token` decides; empty while a character is unfinished.
    ///
    /// # Errors
    /// The tokenizer refuses the id.
    fn push(&mut self, token: u32) -> Result<String, ApiError>;

    /// The text of what is left when no more tokens come.
    fn finish(&mut self) -> String;
}

impl TokenText for Detokenizer {
    fn push(&mut self, token: u32) -> Result<String, ApiError> {
        Detokenizer::push(self, token).map_err(|error| {
            tracing::error!(%error, token, "a sampled token cannot be detokenized");
            ApiError::Internal
        })
    }

    fn finish(&mut self) -> String {
        Detokenizer::finish(self)
    }
}

/// A shown token with its log-probs.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRecord {
    pub token: u32,
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
    /// Where the token's text starts in the generated text, in characters.
    pub text_offset: usize,
}

/// What one step adds to a choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    pub text: String,
    /// Every sampled token, stop tokens included: what is billed.
    pub token_ids: Vec<u32>,
    /// The tokens behind `text`, where log-probs were asked for.
    pub logprobs: Vec<TokenRecord>,
    /// Where asked for, the experts of the whole prompt, with the first token.
    pub prompt_experts: Vec<u16>,
    /// And of the token before, with each of the others.
    pub experts: Vec<u16>,
    /// Where asked for, what the same experts cost.
    pub expert_use: Option<Box<ExpertUse>>,
    pub finish: Option<Finish>,
}

impl Delta {
    pub fn has_experts(&self) -> bool {
        !self.prompt_experts.is_empty() || !self.experts.is_empty()
    }

    /// An end without text.
    pub fn ended(finish: Finish) -> Self {
        Self { finish: Some(finish), ..Self::default() }
    }
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    pub reason: FinishReason,
    pub stop_reason: Option<StopReason>,
}

/// A token whose text may still turn out to be part of a stop string.
#[derive(Debug)]
struct Held {
    record: Option<TokenRecord>,
    start_byte: usize,
    end_byte: usize,
}

/// Holds text back until it cannot be the beginning of a stop string, and its log-probs with it.
#[derive(Debug)]
pub struct Assembler<D> {
    decoder: D,
    matcher: StopMatcher,
    rules: StopRules,
    num_tokens: usize,
    decoded_bytes: usize,
    decoded_chars: usize,
    released_bytes: usize,
    held: Vec<Held>,
}

impl<D: TokenText> Assembler<D> {
    pub fn new(decoder: D, rules: StopRules) -> Self {
        let options = StopOptions { include_in_output: rules.include_in_output };
        Self {
            decoder,
            matcher: StopMatcher::new(&rules.strings, options),
            rules,
            num_tokens: 0,
            decoded_bytes: 0,
            decoded_chars: 0,
            released_bytes: 0,
            held: Vec::new(),
        }
    }

    /// Adds a sampled token. A delta with `finish` ends the choice: a stop string was found, and what the engine sends
    /// after it is not wanted.
    ///
    /// # Errors
    /// The tokenizer refuses the id.
    pub fn push(&mut self, sampled: SampledToken) -> Result<Delta, ApiError> {
        self.num_tokens += 1;
        let token_ids = vec![sampled.token];
        let (prompt_experts, experts) = match self.num_tokens {
            1 => (sampled.routed_experts, Vec::new()),
            _ => (Vec::new(), sampled.routed_experts),
        };
        let expert_use = sampled.expert_use;
        if sampled.is_stop && !self.rules.include_in_output {
            return Ok(Delta { token_ids, prompt_experts, experts, expert_use, ..Delta::default() });
        }
        let text = self.decoder.push(sampled.token)?;
        let record = sampled.logprob.map(|logprob| TokenRecord {
            token: sampled.token,
            logprob,
            top: sampled.top,
            text_offset: self.decoded_chars,
        });
        let start_byte = self.decoded_bytes;
        self.decoded_bytes += text.len();
        self.decoded_chars += text.chars().count();
        self.held.push(Held { record, start_byte, end_byte: self.decoded_bytes });
        let delta = match self.num_tokens <= self.rules.min_tokens {
            // Before `min_tokens` no stop string counts, not even the beginning of one.
            true => self.release(text, None),
            false => {
                let outcome = self.matcher.push(&text);
                self.release(outcome.text, outcome.matched)
            }
        };
        Ok(Delta { token_ids, prompt_experts, experts, expert_use, ..delta })
    }

    /// The engine ended the sequence: what was held back comes out.
    pub fn finish(&mut self, reason: engine::FinishReason) -> Delta {
        let tail = self.decoder.finish();
        self.decoded_bytes += tail.len();
        if let Some(last) = self.held.last_mut() {
            last.end_byte = self.decoded_bytes;
        }
        let outcome = self.matcher.push(&tail);
        if outcome.matched.is_some() {
            return self.release(outcome.text, outcome.matched);
        }
        let text = outcome.text + &self.matcher.finish();
        let finish = match reason {
            engine::FinishReason::Length => Finish { reason: FinishReason::Length, stop_reason: None },
            engine::FinishReason::Stop(token) => Finish {
                reason: FinishReason::Stop,
                stop_reason: self.rules.token_ids.contains(&token).then_some(StopReason::Token(token)),
            },
        };
        Delta { finish: Some(finish), ..self.release(text, None) }
    }

    /// Lets `text` out, and the log-probs of the tokens it completes; after a match also those of the token it cuts.
    fn release(&mut self, text: String, matched: Option<usize>) -> Delta {
        self.released_bytes += text.len();
        let released = self.released_bytes;
        let num_out = match matched {
            Some(_) => self.held.iter().take_while(|held| held.start_byte < released).count(),
            None => self.held.iter().take_while(|held| held.end_byte <= released).count(),
        };
        let logprobs = self.held.drain(..num_out).filter_map(|held| held.record).collect();
        let finish = matched.map(|stop_idx| Finish {
            reason: FinishReason::Stop,
            stop_reason: Some(StopReason::Text(self.rules.strings[stop_idx].clone())),
        });
        Delta { text, logprobs, finish, ..Delta::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token `i` decodes to the `i`-th piece.
    struct Script(Vec<&'static str>);

    impl TokenText for Script {
        fn push(&mut self, token: u32) -> Result<String, ApiError> {
            Ok(self.0[token as usize].to_owned())
        }

        fn finish(&mut self) -> String {
            String::new()
        }
    }

    fn token(token: u32) -> SampledToken {
        let experts = vec![token as u16; 2];
        SampledToken {
            token,
            logprob: Some(-1.0),
            top: Vec::new(),
            routed_experts: experts,
            expert_use: None,
            is_stop: false,
        }
    }

    fn run(pieces: &[&'static str], rules: StopRules) -> Vec<Delta> {
        let mut assembler = Assembler::new(Script(pieces.to_vec()), rules);
        let mut deltas = Vec::new();
        for id in 0..u32::try_from(pieces.len()).unwrap() {
            deltas.push(assembler.push(token(id)).unwrap());
            if deltas.last().unwrap().finish.is_some() {
                return deltas;
            }
        }
        deltas.push(assembler.finish(engine::FinishReason::Length));
        deltas
    }

    fn stops(strings: &[&str]) -> StopRules {
        StopRules { strings: strings.iter().map(|&string| string.to_owned()).collect(), ..StopRules::default() }
    }

    fn text(deltas: &[Delta]) -> String {
        deltas.iter().map(|delta| delta.text.as_str()).collect()
    }

    fn shown(deltas: &[Delta]) -> Vec<u32> {
        deltas.iter().flat_map(|delta| &delta.logprobs).map(|record| record.token).collect()
    }

    #[test]
    fn a_stop_string_across_tokens_is_never_shown_and_ends_the_choice() {
        let deltas = run(&["one ", "ST", "OP", " more"], stops(&["STOP"]));
        assert_eq!(text(&deltas), "one ");
        let last = deltas.last().unwrap().finish.clone().unwrap();
        assert_eq!((last.reason, last.stop_reason), (FinishReason::Stop, Some(StopReason::Text("STOP".into()))));
        assert_eq!(deltas.iter().map(|delta| delta.token_ids.len()).sum::<usize>(), 3, "the fourth is not billed");
        assert_eq!(shown(&deltas), [0]);
    }

    #[test]
    fn text_held_back_for_nothing_comes_out_with_its_logprobs() {
        let deltas = run(&["a", "ST", "x", "ST"], stops(&["STOP"]));
        assert_eq!(text(&deltas), "aSTxST");
        assert_eq!(deltas[1].text, "");
        assert!(deltas[1].logprobs.is_empty());
        assert_eq!(shown(&deltas), [0, 1, 2, 3]);
        assert_eq!(deltas.last().unwrap().finish.as_ref().unwrap().reason, FinishReason::Length);
    }

    #[test]
    fn a_token_that_a_stop_string_cuts_is_shown() {
        let deltas = run(&["ab", "c."], stops(&["."]));
        assert_eq!((text(&deltas).as_str(), shown(&deltas)), ("abc", vec![0, 1]));
        let kept = run(&["ab", "c.d"], StopRules { include_in_output: true, ..stops(&["."]) });
        assert_eq!(text(&kept), "abc.");
    }

    #[test]
    fn stop_strings_before_min_tokens_do_not_count() {
        let deltas = run(&[".", ".", "x", "."], StopRules { min_tokens: 2, ..stops(&["."]) });
        assert_eq!(text(&deltas), "..x");
    }

    #[test]
    fn stop_tokens_are_billed_but_not_shown() {
        let rules = StopRules { token_ids: vec![1], model_token_ids: vec![2], ..StopRules::default() };
        for (stop_token, reason) in [(1, Some(StopReason::Token(1))), (2, None)] {
            let mut assembler = Assembler::new(Script(vec!["a", "<1>", "<2>"]), rules.clone());
            let first = assembler.push(token(0)).unwrap();
            let stop = assembler.push(SampledToken { is_stop: true, ..token(stop_token) }).unwrap();
            let last = assembler.finish(engine::FinishReason::Stop(stop_token));
            let deltas = [first, stop, last];
            assert_eq!((text(&deltas).as_str(), shown(&deltas)), ("a", vec![0]));
            assert_eq!(deltas[1].token_ids, [stop_token]);
            assert_eq!(deltas[2].finish.clone().unwrap().stop_reason, reason);
        }
    }

    #[test]
    fn experts_come_with_the_token_that_follows_and_are_of_the_prompt_first() {
        let deltas = run(&["one ", "ST", "OP", " more"], stops(&["STOP"]));
        let of = |experts: fn(&Delta) -> &[u16]| deltas.iter().flat_map(experts).copied().collect::<Vec<u16>>();
        assert_eq!(of(|delta| &delta.prompt_experts), [0, 0]);
        assert_eq!(of(|delta| &delta.experts), [1, 1, 2, 2]);
        let mut assembler = Assembler::new(Script(vec!["<0>"]), StopRules::default());
        let stop = assembler.push(SampledToken { is_stop: true, ..token(0) }).unwrap();
        assert_eq!(
            (stop.text.as_str(), stop.prompt_experts),
            ("", vec![0, 0]),
            "a stop token tells of those before it"
        );
    }

    #[test]
    fn offsets_count_characters() {
        let deltas = run(&["é", "日本", "x"], StopRules::default());
        let offsets: Vec<_> =
            deltas.iter().flat_map(|delta| &delta.logprobs).map(|record| record.text_offset).collect();
        assert_eq!(offsets, [0, 1, 3]);
    }
}

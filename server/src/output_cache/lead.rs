//! The computation behind an answer that many read: it lives while any of them does, and ends for all of them at once.

use std::time::Duration;

use cache::{End, PromptLogprob, Token};
use engine::{Event, FinishReason, Generation, SampledToken};
use tokio::sync::oneshot;

use super::Leader;
use crate::generate::{Assembler, TokenText};

/// That the first rows of a computation came, for the request that leads it.
#[derive(Clone, Copy, Debug)]
pub struct Scheduled {
    /// Time since it was submitted.
    pub queue: Duration,
    /// Of the prompt, what was computed before.
    pub num_cached_tokens: usize,
}

/// A generation whose events go to all readers. Its leader has begun.
pub struct Computation<D> {
    pub leader: Leader,
    pub generation: Generation,
    /// Finds stop strings, where there are any.
    pub assembler: Option<Assembler<D>>,
    /// Nothing is wanted but the prompt's log-probs.
    pub prompt_only: bool,
    pub scheduled: oneshot::Sender<Scheduled>,
}

impl<D: TokenText + 'static> Computation<D> {
    /// Runs it until it ends or nobody reads it any more. What is not finished is not stored.
    pub fn spawn(self) {
        tokio::spawn(self.run());
    }

    async fn run(mut self) {
        let mut scheduled = Some(self.scheduled);
        loop {
            let event = tokio::select! {
                biased;
                event = self.generation.next() => event,
                // The generation goes with it, which frees its blocks.
                () = self.leader.abandoned() => return,
            };
            let end = match event {
                Some(Event::Scheduled { queue, num_cached_tokens }) => {
                    let now = Scheduled { queue, num_cached_tokens };
                    // The leading request may have left before the others.
                    scheduled.take().and_then(|scheduled| scheduled.send(now).err());
                    continue;
                }
                Some(Event::PromptLogprobs(logprobs)) => {
                    let logprobs: Vec<_> = logprobs.into_iter().map(from_engine_prompt).collect();
                    self.leader.push_prompt(logprobs);
                    continue;
                }
                Some(Event::Token(_)) if self.prompt_only => End::Length,
                Some(Event::Token(sampled)) => {
                    let found_stop = stop_found(self.assembler.as_mut(), &sampled);
                    self.leader.push_token(from_engine(sampled));
                    match found_stop {
                        Ok(true) => {}
                        Ok(false) => continue,
                        // The readers meet the same error at this token.
                        Err(_) => return,
                    }
                    End::Text
                }
                Some(Event::Finished(FinishReason::Stop(token))) => End::Stop(token),
                Some(Event::Finished(FinishReason::Length)) => End::Length,
                Some(Event::Failed(error)) => return self.leader.fail(error),
                // The engine is gone: they are told as whoever asks it now.
                None => return,
            };
            drop(self.generation);
            return self.leader.finish(end).await;
        }
    }
}

/// Whether the token completes a stop string.
fn stop_found<D: TokenText>(
    assembler: Option<&mut Assembler<D>>,
    sampled: &SampledToken,
) -> Result<bool, crate::error::ApiError> {
    match assembler {
        None => Ok(false),
        Some(assembler) => Ok(assembler.push(sampled.clone())?.finish.is_some()),
    }
}

fn from_engine(sampled: SampledToken) -> Token {
    // Who wants to know the experts, or what they cost, does not ask the cache.
    let SampledToken { token, logprob, top, routed_experts: _, expert_use: _, is_stop } = sampled;
    Token { token, logprob, top, is_stop }
}

fn from_engine_prompt(logprob: engine::PromptLogprob) -> PromptLogprob {
    let engine::PromptLogprob { token, logprob, top } = logprob;
    PromptLogprob { token, logprob, top }
}

//! One computation, read by many: what it has given so far, and what comes, in order, for whoever asks at whatever time.

use std::sync::Arc;

use tokio::sync::watch;

use crate::recording::{End, PromptLogprob, Recording, Token};

/// How a flight failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure<E> {
    /// What whoever computed it said.
    Error(E),
    /// Whoever computed it is gone without a word.
    Gone,
}

/// What a follower reads: prompt log-probs at most once, tokens, then exactly one of `End` and `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum FlightEvent<E> {
    Prompt(Arc<[PromptLogprob]>),
    Token(Token),
    End(End),
    Failed(Failure<E>),
}

/// What a flight has given so far.
#[derive(Debug)]
pub(crate) struct Progress<E> {
    /// Whoever leads was granted what it takes to compute.
    pub is_under_way: bool,
    pub prompt: Option<Arc<[PromptLogprob]>>,
    pub tokens: Vec<Token>,
    pub outcome: Option<Outcome<E>>,
}

#[derive(Debug)]
pub(crate) enum Outcome<E> {
    Ended(Arc<Recording>),
    Failed(Failure<E>),
}

impl<E> Default for Progress<E> {
    fn default() -> Self {
        Self { is_under_way: false, prompt: None, tokens: Vec::new(), outcome: None }
    }
}

/// Reads one flight, or a recording as if it were one. A follower that is dropped has left: a flight without followers is
/// abandoned.
#[derive(Debug)]
pub struct Follower<E> {
    source: Source<E>,
    prompt_was_read: bool,
    num_read: usize,
    is_over: bool,
}

#[derive(Debug)]
enum Source<E> {
    Live(watch::Receiver<Progress<E>>),
    Recorded(Arc<Recording>),
}

impl<E: Clone> Follower<E> {
    pub(crate) fn live(progress: watch::Receiver<Progress<E>>) -> Self {
        Self::new(Source::Live(progress))
    }

    /// Reads a recording, so that a hit takes the way of a computed answer.
    pub fn replay(recording: Arc<Recording>) -> Self {
        Self::new(Source::Recorded(recording))
    }

    fn new(source: Source<E>) -> Self {
        Self { source, prompt_was_read: false, num_read: 0, is_over: false }
    }

    /// Whether the answer comes; waits until that is known. It does not where whoever led is gone before the computation was under
    /// way.
    pub(crate) async fn is_led(&mut self) -> bool {
        let Source::Live(progress) = &mut self.source else { return true };
        let known = progress.wait_for(|progress| progress.is_under_way || progress.outcome.is_some()).await;
        known.is_ok_and(|progress| {
            progress.is_under_way || !matches!(progress.outcome, Some(Outcome::Failed(Failure::Gone)))
        })
    }

    /// The next event; `None` only after `End` or `Failed`. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<FlightEvent<E>> {
        while !self.is_over {
            if let Some(event) = self.take() {
                return Some(event);
            }
            let Source::Live(progress) = &mut self.source else { unreachable!("a recording has an end") };
            if progress.changed().await.is_err() && progress.borrow().outcome.is_none() {
                self.is_over = true;
                return Some(FlightEvent::Failed(Failure::Gone));
            }
        }
        None
    }

    /// The next event if it is there already.
    fn take(&mut self) -> Option<FlightEvent<E>> {
        if self.is_over {
            return None;
        }
        let event = match &mut self.source {
            Source::Recorded(recording) => {
                let place = Place { prompt_was_read: self.prompt_was_read, num_read: self.num_read };
                Some(place.of(recording))
            }
            Source::Live(progress) => {
                let progress = progress.borrow_and_update();
                let place = Place { prompt_was_read: self.prompt_was_read, num_read: self.num_read };
                match &progress.outcome {
                    Some(Outcome::Ended(recording)) => Some(place.of(recording)),
                    outcome => place.among(progress.prompt.as_ref(), &progress.tokens).or(match outcome {
                        Some(Outcome::Failed(failure)) => Some(FlightEvent::Failed(failure.clone())),
                        _ => None,
                    }),
                }
            }
        };
        match &event {
            Some(FlightEvent::Prompt(_)) => self.prompt_was_read = true,
            Some(FlightEvent::Token(_)) => self.num_read += 1,
            Some(FlightEvent::End(_) | FlightEvent::Failed(_)) => self.is_over = true,
            None => {}
        }
        event
    }
}

/// How far a follower has read.
struct Place {
    prompt_was_read: bool,
    num_read: usize,
}

impl Place {
    fn among<E>(&self, prompt: Option<&Arc<[PromptLogprob]>>, tokens: &[Token]) -> Option<FlightEvent<E>> {
        match prompt {
            Some(prompt) if !self.prompt_was_read => Some(FlightEvent::Prompt(Arc::clone(prompt))),
            _ => tokens.get(self.num_read).cloned().map(FlightEvent::Token),
        }
    }

    fn of<E>(&self, recording: &Recording) -> FlightEvent<E> {
        self.among(recording.prompt_logprobs.as_ref(), &recording.tokens).unwrap_or(FlightEvent::End(recording.end))
    }
}

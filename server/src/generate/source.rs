//! Where a choice's events come from: the engine, or an answer that others read too.

use cache::{FlightEvent, Key};
use engine::{EngineHandle, Event, GenerateRequest, Generation, GenerationError, SubmitError};
use tokio::sync::oneshot;

use super::{Job, new_assembler};
use crate::app::Model;
use crate::error::ApiError;
use crate::output_cache::{Computation, Follower, Found, Origin, OutputKey, Scheduled, to_engine};
use crate::telemetry::metrics::rejected;

/// One choice to be answered.
pub(super) struct Asked<'a> {
    pub request: GenerateRequest,
    pub job: &'a Job<'a>,
    pub prompt_only: bool,
}

/// What a choice reads.
pub(super) enum Source {
    Engine(Generation),
    Answer(Box<Answer>),
}

/// An answer of the output cache.
pub(super) struct Answer {
    follower: Follower,
    has_begun: bool,
    /// When the computation was scheduled, where this request leads it.
    scheduled: Option<oneshot::Receiver<Scheduled>>,
    /// Read together with the news that it was scheduled, which goes first.
    held: Option<Event>,
    again: Again,
}

/// What it takes to compute an answer alone, should whoever computed it leave before it began.
struct Again {
    engine: EngineHandle,
    request: GenerateRequest,
    param: &'static str,
}

impl Source {
    /// Finds the answer where the request may be answered from the cache, else submits it.
    ///
    /// # Errors
    /// The engine refuses the request.
    pub(super) async fn open(model: &Model, asked: Asked<'_>) -> Result<(Self, Option<(Origin, Key)>), ApiError> {
        let Asked { request, job, prompt_only } = asked;
        let access = job.valid.cache;
        let cache = model.outputs().filter(|_| access.read || access.write);
        let Some(cache) = cache else {
            return Ok((Self::Engine(submit(&model.engine, request, job.param)?), None));
        };
        let (stop, output) = (&job.valid.stop, job.valid.output);
        let key = OutputKey { request: &request, stop, output, prompt_only };
        let Found { follower, origin, key, leader } = cache.open(&key, access, job.cache_deadline).await;
        let mut scheduled = None;
        if let Some(leader) = leader {
            let (sender, receiver) = oneshot::channel();
            scheduled = Some(receiver);
            let assembler = match stop.strings.is_empty() {
                true => None,
                false => Some(new_assembler(model, job.valid, &request.prompt)?),
            };
            let num_prompt_tokens = u32::try_from(request.prompt.len()).expect("prompts are bounded");
            let generation = submit(&model.engine, request.clone(), job.param)?;
            Computation { leader, generation, assembler, num_prompt_tokens, prompt_only, scheduled: sender }.spawn();
        }
        let again = Again { engine: model.engine.clone(), request, param: job.param };
        let answer = Answer { follower, has_begun: false, scheduled, held: None, again };
        Ok((Self::Answer(Box::new(answer)), Some((origin, key))))
    }

    /// The next event. After the one that ends the choice it must not be called again.
    ///
    /// # Errors
    /// The computation is gone without a word.
    pub(super) async fn next(&mut self) -> Result<Event, ApiError> {
        if let Self::Answer(answer) = self {
            match answer.next().await {
                Some(event) => return Ok(event),
                None if answer.has_begun => return Err(gone()),
                None => {
                    let Again { engine, request, param } = &answer.again;
                    *self = Self::Engine(submit(engine, request.clone(), param)?);
                }
            }
        }
        match self {
            Self::Engine(generation) => generation.next().await.ok_or_else(gone),
            Self::Answer(_) => unreachable!("an answer was read above"),
        }
    }
}

impl Answer {
    /// `None` where whoever computed it is gone.
    async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.held.take() {
            return Some(event);
        }
        let Some(scheduled) = &mut self.scheduled else {
            let event = self.follower.next().await;
            return self.begin(event);
        };
        let (now, event) = tokio::select! {
            biased;
            now = &mut *scheduled => (now.ok(), None),
            // It was sent before any other event, but this one may have come between the two looks.
            event = self.follower.next() => (scheduled.try_recv().ok(), Some(event)),
        };
        self.scheduled = None;
        let event = event.and_then(|event| self.begin(event));
        match now {
            Some(Scheduled { queue, num_cached_tokens }) => {
                self.held = event;
                Some(Event::Scheduled { queue, num_cached_tokens })
            }
            None => match event {
                Some(event) => Some(event),
                None => {
                    let event = self.follower.next().await;
                    self.begin(event)
                }
            },
        }
    }

    fn begin(&mut self, event: Option<FlightEvent<GenerationError>>) -> Option<Event> {
        let event = event.and_then(to_engine)?;
        self.has_begun = true;
        Some(event)
    }
}

fn gone() -> ApiError {
    tracing::error!("the engine dropped a request without ending it");
    ApiError::EngineDead
}

fn submit(engine: &EngineHandle, request: GenerateRequest, param: &'static str) -> Result<Generation, ApiError> {
    engine.submit(request).map_err(|error: SubmitError| {
        let error = ApiError::from_submit(error, param);
        rejected(error.code());
        error
    })
}

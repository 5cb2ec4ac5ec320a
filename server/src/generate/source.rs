//! Where a choice's events come from: the engine, or an answer that others read too.

use cache::Key;
use engine::{Event, GenerateRequest, Generation, SubmitError};
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
    /// When the computation was scheduled, where this request leads it.
    scheduled: Option<oneshot::Receiver<Scheduled>>,
    /// Read together with the news that it was scheduled, which goes first.
    held: Option<Event>,
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
            return Ok((Self::Engine(submit(model, request, job).await?), None));
        };
        let (stop, output) = (&job.valid.stop, job.valid.output);
        let key = OutputKey { request: &request, stop, output, prompt_only };
        let Found { follower, origin, key, leader } = cache.open(&key, access, job.cache_deadline).await;
        let mut scheduled = None;
        if let Some(mut leader) = leader {
            let (sender, receiver) = oneshot::channel();
            scheduled = Some(receiver);
            let assembler = match stop.strings.is_empty() {
                true => None,
                false => Some(new_assembler(model, job.valid, &request.prompt)?),
            };
            let generation = submit(model, request, job).await?;
            leader.begin();
            Computation { leader, generation, assembler, prompt_only, scheduled: sender }.spawn();
        }
        let answer = Answer { follower, scheduled, held: None };
        Ok((Self::Answer(Box::new(answer)), Some((origin, key))))
    }

    /// The next event. After the one that ends the choice it must not be called again.
    ///
    /// # Errors
    /// The computation is gone without a word.
    pub(super) async fn next(&mut self) -> Result<Event, ApiError> {
        let event = match self {
            Self::Engine(generation) => generation.next().await,
            Self::Answer(answer) => answer.next().await,
        };
        event.ok_or_else(|| {
            tracing::error!("the engine dropped a request without ending it");
            ApiError::EngineDead
        })
    }
}

impl Answer {
    /// `None` where whoever computed it is gone.
    async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.held.take() {
            return Some(event);
        }
        let Some(scheduled) = &mut self.scheduled else {
            return self.follower.next().await.and_then(to_engine);
        };
        let (now, event) = tokio::select! {
            biased;
            now = &mut *scheduled => (now.ok(), None),
            // It was sent before any other event, but this one may have come between the two looks.
            event = self.follower.next() => (scheduled.try_recv().ok(), Some(event)),
        };
        self.scheduled = None;
        let event = event.flatten().and_then(to_engine);
        match now {
            Some(Scheduled { queue, num_cached_tokens }) => {
                self.held = event;
                Some(Event::Scheduled { queue, num_cached_tokens })
            }
            None => match event {
                Some(event) => Some(event),
                None => self.follower.next().await.and_then(to_engine),
            },
        }
    }
}

/// Hands a request over, with what is known of its prompt: the experts that it takes, and blocks that can be loaded.
async fn submit(model: &Model, mut request: GenerateRequest, job: &Job<'_>) -> Result<Generation, ApiError> {
    // Other choices share what the first one computes.
    if let Some(routing) = model.routing().filter(|_| request.sampling.choice == 0) {
        request.expected_experts = routing.announce(&model.engine, &request.prompt, &request.block_salt()).await;
    }
    let takes_blocks = request.sampling.choice == 0 && request.sampling.prompt_logprobs.is_none();
    if let Some(tier) = model.kv_tier().filter(|_| takes_blocks) {
        request.prefix = tier.hint(&model.engine, &request, job.cache_deadline).await;
    }
    model.engine.submit(request).map_err(|error: SubmitError| {
        let error = ApiError::from_submit(error, job.param);
        rejected(error.code());
        error
    })
}

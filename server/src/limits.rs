//! What one server takes on at once: requests in flight, text jobs, body bytes, origins.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{HeaderValue, Method, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::config::Config;
use crate::error::ApiError;
use crate::generate::TOKENS_PER_TURN;
use crate::output_cache::ORIGIN_HEADER;
use crate::telemetry::http::REQUEST_ID;

/// Time a client has for sending a body.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// The bounded resources of the edge.
#[derive(Debug)]
pub struct Limits {
    in_flight: Arc<Semaphore>,
    text_jobs: Arc<Semaphore>,
    /// Requests that may run or wait at once.
    pub max_in_flight: usize,
    pub max_body_bytes: u64,
    request_timeout: Duration,
}

/// A place among the requests in flight, held as long as the response lives, and the instant the request must be done by.
#[derive(Debug)]
pub struct Permit {
    _place: OwnedSemaphorePermit,
    pub arrival: Instant,
    pub deadline: Instant,
    pub timeout: Duration,
}

impl Limits {
    pub fn new(config: &Config) -> Self {
        let max_in_flight = config.max_num_seqs + config.max_queue;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            in_flight: Arc::new(Semaphore::new(max_in_flight)),
            text_jobs: Arc::new(Semaphore::new(cores)),
            max_in_flight,
            max_body_bytes: config.max_body_bytes.0,
            request_timeout: config.request_timeout.duration(),
        }
    }

    /// Takes a place without waiting.
    ///
    /// # Errors
    /// [`ApiError::Busy`] where all places are taken.
    pub fn admit(&self) -> Result<Permit, ApiError> {
        let arrival = Instant::now();
        let place = Arc::clone(&self.in_flight).try_acquire_owned();
        let place = place.map_err(|_| ApiError::Busy { limit: self.max_in_flight })?;
        Ok(Permit { _place: place, arrival, deadline: arrival + self.request_timeout, timeout: self.request_timeout })
    }

    /// Runs tokenizer or template work on the blocking pool, at most one job per core at a time.
    ///
    /// # Errors
    /// What the job says, [`ApiError::Internal`] where it panicked, [`ApiError::Timeout`] where it is not done within the
    /// request timeout, its wait for a core included.
    pub async fn run_text<T, F>(&self, job: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        let text_jobs = Arc::clone(&self.text_jobs);
        let done = async {
            let place = text_jobs.acquire_owned().await.expect("the semaphore is never closed");
            let job = move || {
                // The place goes with the job: a client that leaves does not make room for work that still runs.
                let _place = place;
                job()
            };
            tokio::task::spawn_blocking(job).await.map_err(|error| {
                tracing::error!(%error, "a text job panicked");
                ApiError::Internal
            })?
        };
        let late = |_| ApiError::Timeout { seconds: self.request_timeout.as_secs_f64() };
        tokio::time::timeout(self.request_timeout, done).await.map_err(late)?
    }

    /// Runs `job` here where it works on no more than `TOKENS_PER_TURN` tokens, else as [`Self::run_text`] does.
    ///
    /// # Errors
    /// As [`Self::run_text`].
    pub async fn write<T, F>(&self, num_tokens: usize, job: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        if num_tokens <= TOKENS_PER_TURN {
            return Ok(job());
        }
        self.run_text(|| Ok(job())).await
    }

    /// Requests in flight now.
    pub fn num_in_flight(&self) -> usize {
        self.max_in_flight - self.in_flight.available_permits()
    }

    /// Returns when no request is in flight.
    pub async fn idle(&self) {
        let all = u32::try_from(self.max_in_flight).expect("checked with the configuration");
        let _all = self.in_flight.acquire_many(all).await.expect("the semaphore is never closed");
    }
}

/// The CORS answers for `--allowed-origins`, `None` where there are none.
pub fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    let layer = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE])
        .expose_headers([REQUEST_ID, ORIGIN_HEADER, header::RETRY_AFTER]);
    Some(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn text_that_waits_for_a_core_waits_no_longer_than_a_request_may_take() {
        let limits = Limits { request_timeout: Duration::from_millis(10), ..Limits::new(&Config::default()) };
        let all = limits.text_jobs.available_permits().try_into().unwrap();
        let taken = limits.text_jobs.acquire_many(all).await.unwrap();
        assert!(matches!(limits.run_text(|| Ok(())).await, Err(ApiError::Timeout { .. })));
        drop(taken);
        let patient = Limits { request_timeout: Duration::from_secs(60), ..limits };
        patient.run_text(|| Ok(())).await.unwrap();
    }

    #[tokio::test]
    async fn only_long_answers_are_written_elsewhere() {
        let limits = Limits::new(&Config::default());
        let here = std::thread::current().id();
        let writer = || std::thread::current().id();
        assert_eq!(limits.write(TOKENS_PER_TURN, writer).await.unwrap(), here);
        assert_ne!(limits.write(TOKENS_PER_TURN + 1, writer).await.unwrap(), here);
    }

    #[test]
    fn a_place_is_given_back_when_the_permit_is_dropped() {
        let config = Config { max_num_seqs: 1, max_queue: 1, ..Config::default() };
        let limits = Limits::new(&config);
        let first = limits.admit().unwrap();
        let _second = limits.admit().unwrap();
        assert!(matches!(limits.admit(), Err(ApiError::Busy { limit: 2 })));
        assert_eq!(limits.num_in_flight(), 2);
        drop(first);
        limits.admit().unwrap();
    }
}

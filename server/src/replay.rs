//! Stored answers as they were written: a request that says the same bytes again is answered without being read.
//!
//! It still needs its key and its place, is counted as any other, and finds nothing that the output cache has not: an answer that was
//! removed there, or whose time is over, is not replayed.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use cache::{Digest, Key};
use tokio::time::Instant;

use crate::app::{Model, unix_seconds};
use crate::cache_salt::{Salt, Tenant};
use crate::generate::{Batch, Indexed, Output};
use crate::limits::Permit;
use crate::openai::FinishReason;
use crate::sse;
use crate::telemetry::metrics::{ChoiceMeter, RequestFacts};

/// Answers of more sequences are put together each time: every one of them is looked for in the output cache.
const MAX_SEQUENCES: usize = 8;

/// Written answers by the bytes of their requests, within so many bytes.
#[derive(Debug)]
pub struct Replays {
    answers: moka::sync::Cache<Key, Arc<Replay>>,
}

/// The bytes of a request, who sent it and where to.
#[derive(Clone, Copy, Debug)]
pub struct Asked(Key);

impl Asked {
    pub fn new(path: &'static str, tenant: Tenant, body: &[u8]) -> Self {
        let salt = Salt::new(tenant, None).bytes();
        Self(Digest::new("replay").text("path", path).field("salt", &salt).field("body", body).key())
    }
}

/// The request that asks.
#[derive(Clone, Copy, Debug)]
pub struct Asking<'a> {
    pub permit: &'a Permit,
    pub request_id: &'a str,
    /// When it stops waiting for caches.
    pub cache_deadline: Instant,
}

/// The JSON of an answer, or of each chunk of a stream.
#[derive(Debug)]
pub enum Texts {
    Object(String),
    Stream(Vec<String>),
}

/// What every object of an answer starts with, and what differs from request to request.
#[derive(Clone, Copy, Debug)]
pub struct Stamp<'a> {
    /// In front of the request id.
    pub prefix: &'static str,
    pub request_id: &'a str,
    /// Seconds since the epoch.
    pub created: u64,
}

impl Stamp<'_> {
    fn quoted_id(&self) -> String {
        serde_json::to_string(&self.id()).expect("a text is JSON")
    }

    pub fn id(&self) -> String {
        format!("{}{}", self.prefix, self.request_id)
    }
}

/// An answer without its stamps.
#[derive(Debug)]
struct Replay {
    is_stream: bool,
    prefix: &'static str,
    parts: Vec<Part>,
    sequences: Vec<Sequence>,
    /// Where the output cache has what it was made of.
    keys: Vec<Key>,
}

/// An object, cut around its stamps: `{"id":` ID `between` CREATED `rest`.
#[derive(Debug)]
struct Part {
    between: String,
    rest: String,
}

/// What is counted of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    facts: RequestFacts,
    num_tokens: usize,
    reason: &'static str,
}

impl Replays {
    pub fn new(max_bytes: u64) -> Self {
        let weigher = |_: &Key, replay: &Arc<Replay>| u32::try_from(replay.num_bytes()).unwrap_or(u32::MAX);
        Self { answers: moka::sync::Cache::builder().max_capacity(max_bytes).weigher(weigher).build() }
    }

    /// The answer, if the same was asked before and the output cache still has it.
    pub async fn answer(&self, asked: Option<Asked>, model: &Model, by: &Asking<'_>) -> Option<Response> {
        let asked = asked?;
        let replay = self.answers.get(&asked.0)?;
        if !model.outputs()?.holds(&replay.keys, by.cache_deadline).await {
            self.answers.invalidate(&asked.0);
            return None;
        }
        for sequence in &replay.sequences {
            let facts = RequestFacts { arrival: by.permit.arrival, ..sequence.facts };
            ChoiceMeter::new(facts).replayed(sequence.num_tokens, sequence.reason);
        }
        let stamp = Stamp { prefix: replay.prefix, request_id: by.request_id, created: unix_seconds() };
        Some(replay.respond(&stamp))
    }

    /// Answers with `texts`, and again where the same is asked.
    pub fn keep(
        &self,
        asked: Option<Asked>,
        found: (Vec<Key>, Vec<Sequence>),
        (texts, stamp): (Texts, &Stamp<'_>),
    ) -> Response {
        let (keys, sequences) = found;
        let (is_stream, texts) = match texts {
            Texts::Object(text) => (false, vec![text]),
            Texts::Stream(texts) => (true, texts),
        };
        let parts = texts.iter().map(|text| Part::cut(text, stamp)).collect();
        let replay = Replay { is_stream, prefix: stamp.prefix, parts, sequences, keys };
        let response = replay.respond(stamp);
        if let Some(asked) = asked.filter(|_| replay.keys.len() <= MAX_SEQUENCES) {
            self.answers.insert(asked.0, Arc::new(replay));
        }
        response
    }

    pub fn clear(&self) {
        self.answers.invalidate_all();
    }
}

/// The sequences behind the outputs of a batch, which are all there.
pub fn sequences(batch: &Batch, outputs: &[Indexed]) -> Vec<Sequence> {
    let start = |&facts| Sequence { facts, num_tokens: 0, reason: "length" };
    let mut sequences: Vec<_> = batch.facts.iter().map(start).collect();
    for Indexed { index, output } in outputs {
        let Output::Delta(delta) = output else { continue };
        let sequence = &mut sequences[*index as usize];
        sequence.num_tokens += delta.token_ids.len();
        if delta.finish.as_ref().is_some_and(|finish| finish.reason == FinishReason::Stop) {
            sequence.reason = "stop";
        }
    }
    sequences
}

impl Replay {
    fn num_bytes(&self) -> usize {
        let parts: usize = self.parts.iter().map(|part| size_of::<Part>() + part.between.len() + part.rest.len()).sum();
        size_of::<Self>() + parts + size_of_val(&*self.sequences) + size_of_val(&*self.keys)
    }

    fn respond(&self, stamp: &Stamp<'_>) -> Response {
        let (id, created) = (stamp.quoted_id(), stamp.created.to_string());
        let mut body = String::with_capacity(self.num_bytes() + self.parts.len() * (id.len() + 32) + 32);
        for part in &self.parts {
            let text = [Part::HEAD, &id, &part.between, &created, &part.rest];
            match self.is_stream {
                true => sse::push_event(&mut body, &text),
                false => text.iter().for_each(|text| body.push_str(text)),
            }
        }
        if self.is_stream {
            sse::push_event(&mut body, &[sse::DONE]);
        }
        let mut response = Response::new(Body::from(body));
        let headers = response.headers_mut();
        let kind = if self.is_stream { "text/event-stream" } else { "application/json" };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        if self.is_stream {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        }
        response
    }
}

impl Part {
    const HEAD: &str = "{\"id\":";
    const CREATED: &str = "\"created\":";

    /// Panics where the object does not start with its stamps, as all of ours do.
    fn cut(text: &str, stamp: &Stamp<'_>) -> Self {
        let cut = || {
            let text = text.strip_prefix(Self::HEAD)?.strip_prefix(&*stamp.quoted_id())?;
            let created = text.find(Self::CREATED)? + Self::CREATED.len();
            let rest = text[created..].strip_prefix(&*stamp.created.to_string())?;
            Some(Self { between: text[..created].to_owned(), rest: rest.to_owned() })
        };
        cut().expect("objects start with id, kind and time")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_the_same_but_for_its_stamps() {
        let old = Stamp { prefix: "cmpl-", request_id: "a\"1\\", created: 7 };
        let object = serde_json::json!({"text": "\"created\":7, \"id\":\"cmpl-a\""}).to_string();
        let text = format!("{{\"id\":{},\"object\":\"x\",\"created\":7,\"choices\":[{object}]}}", old.quoted_id());
        let part = Part::cut(&text, &old);
        let whole = |stamp: &Stamp<'_>| {
            [Part::HEAD, &stamp.quoted_id(), &part.between, &stamp.created.to_string(), &part.rest].concat()
        };
        assert_eq!(whole(&old), text);
        let new = Stamp { request_id: "b", created: 123, ..old };
        assert_eq!(whole(&new), text.replacen(&old.quoted_id(), "\"cmpl-b\"", 1).replacen(":7", ":123", 1));
    }
}

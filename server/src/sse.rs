//! Server-sent events as OpenAI sends them: one JSON object per event, `[DONE]` last, an error event where a request fails.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt as _};
use serde::Serialize;

use crate::error::ApiError;

/// What the last event says.
pub const DONE: &str = "[DONE]";

/// Answers with `chunks`, then `[DONE]`; an error ends them. After `keep_alive` of silence a comment line is sent.
pub fn respond<C, S>(chunks: S, keep_alive: Duration) -> Response
where
    C: Serialize,
    S: Stream<Item = Result<C, ApiError>> + Send + 'static,
{
    let events = payloads(chunks).map(|data| Ok::<_, Infallible>(Event::default().data(data)));
    let keep_alive = KeepAlive::new().interval(keep_alive).text("keep-alive");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // nginx would gather the events otherwise.
    response.headers_mut().insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// The `data:` of each event.
fn payloads<C, S>(chunks: S) -> impl Stream<Item = String> + Send + 'static
where
    C: Serialize,
    S: Stream<Item = Result<C, ApiError>> + Send + 'static,
{
    let until_error = chunks.scan(false, |failed, chunk| {
        let out = (!*failed).then(|| {
            *failed = chunk.is_err();
            match chunk {
                Ok(chunk) => to_json(&chunk),
                Err(error) => to_json(&error.to_wire()),
            }
        });
        std::future::ready(out)
    });
    until_error.chain(stream::iter([DONE.to_owned()]))
}

/// Appends an event whose data are these texts, one after the other, none with a line break; as [`respond`] writes it.
pub fn push_event(body: &mut String, data: &[&str]) {
    body.push_str("data: ");
    data.iter().for_each(|text| body.push_str(text));
    body.push_str("\n\n");
}

/// The JSON of a wire type.
pub fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("wire types have string keys and finite numbers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn done_comes_last_even_after_an_error_and_nothing_comes_between() {
        let chunks = [Ok(1), Err(ApiError::ShuttingDown), Ok(2)];
        let texts: Vec<String> = payloads(stream::iter(chunks)).collect().await;
        assert_eq!((texts.len(), texts[0].as_str(), texts[2].as_str()), (3, "1", "[DONE]"));
        let error: serde_json::Value = serde_json::from_str(&texts[1]).unwrap();
        assert_eq!(error["error"]["code"], "shutting_down");
    }
}

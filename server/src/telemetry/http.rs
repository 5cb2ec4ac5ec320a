//! The outermost middleware: a request id, one log line, and the HTTP metrics.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use metrics::{counter, histogram};
use tracing::Instrument as _;

use crate::output_cache::ORIGIN_HEADER;

/// Of every answer, and of requests that bring their own.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Bytes of a client's request id that are kept.
const MAX_ID_BYTES: usize = 128;

/// The request's id: the client's `X-Request-Id` where it is printable, else a fresh one. Answers carry it back.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// Wraps every request.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(&request);
    let path = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let method = match request.method().as_str() {
        known @ ("GET" | "POST" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "PATCH") => known.to_owned(),
        // Methods are free text: as a label they would have no bound.
        _ => "other".to_owned(),
    };
    request.extensions_mut().insert(RequestId(id.clone()));
    let span = tracing::info_span!("request", id = %id);
    let mut response = next.run(request).instrument(span.clone()).await;

    let status = response.status();
    let seconds = start.elapsed().as_secs_f64();
    // Probes and scrapes come every few seconds and would drown the rest.
    span.in_scope(|| match method.as_str() {
        "GET" | "HEAD" => tracing::debug!(%method, %path, status = status.as_u16(), seconds, "answered"),
        _ => {
            let cache = response.headers().get(ORIGIN_HEADER).and_then(|value| value.to_str().ok());
            tracing::info!(%method, %path, status = status.as_u16(), seconds, cache, "answered");
        }
    });
    histogram!("http_request_duration_seconds", "method" => method.clone(), "path" => path.clone()).record(seconds);
    counter!("http_requests_total", "method" => method, "path" => path, "status" => status.as_u16().to_string())
        .increment(1);
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn request_id(request: &Request) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given {
        Some(id) if (1..=MAX_ID_BYTES).contains(&id.len()) => id.to_owned(),
        _ => uuid::Uuid::now_v7().simple().to_string(),
    }
}

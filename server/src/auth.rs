//! Bearer API keys: which paths need one, and the compare that takes equal time for right and wrong keys.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq as _};

use crate::config::Config;
use crate::error::ApiError;

/// The keys of the server; without any, every path is open.
#[derive(Debug)]
pub struct Auth {
    keys: Vec<crate::config::Secret>,
    metrics_public: bool,
}

impl Auth {
    pub fn new(config: &Config) -> Self {
        Self { keys: config.api_key.clone(), metrics_public: config.metrics_public }
    }

    /// # Errors
    /// A missing or wrong key on a path that needs one.
    pub fn check(&self, path: &str, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.keys.is_empty() || self.is_open(path) {
            return Ok(());
        }
        let header = headers.get(header::AUTHORIZATION).ok_or(ApiError::MissingKey)?;
        let given = bearer(header.as_bytes()).ok_or(ApiError::MissingKey)?;
        // All keys are compared, whichever one fits, so that time says nothing about them but their length.
        let found = self.keys.iter().fold(Choice::from(0), |found, key| found | key.expose().ct_eq(given));
        if bool::from(found) { Ok(()) } else { Err(ApiError::WrongKey) }
    }

    fn is_open(&self, path: &str) -> bool {
        matches!(path, "/" | "/health" | "/ready" | "/docs" | "/openapi.json")
            || path.starts_with("/docs/")
            || (self.metrics_public && path == "/metrics")
    }
}

/// Middleware in front of every route.
pub async fn require_key(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Result<Response, ApiError> {
    auth.check(request.uri().path(), request.headers())?;
    Ok(next.run(request).await)
}

/// The credential of an `Authorization` value; the scheme is case-insensitive (RFC 9110).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn check(settings: &str, path: &str, header: Option<&str>) -> Result<(), ApiError> {
        let settings: Settings = toml::from_str(settings).unwrap();
        let auth = Auth::new(&Config::resolve(settings, None).unwrap());
        let mut headers = HeaderMap::new();
        if let Some(value) = header {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        auth.check(path, &headers)
    }

    #[test]
    fn paths_that_read_or_compute_need_a_key() {
        let keys = "api_key = [\"one\", \"two\"]";
        for header in ["Bearer one", "Bearer two", "bearer  two "] {
            check(keys, "/v1/models", Some(header)).unwrap();
        }
        for header in ["Bearer on", "Bearer onee", "Bearer ", "Bearer one two"] {
            assert!(matches!(check(keys, "/v1/models", Some(header)), Err(ApiError::WrongKey)), "{header}");
        }
        for header in [None, Some("one"), Some("Basic b25l")] {
            assert!(matches!(check(keys, "/v1/models", header), Err(ApiError::MissingKey)), "{header:?}");
        }
        for path in ["/metrics", "/server_info", "/version", "/tokenize", "/nowhere", "/docsx"] {
            assert!(check(keys, path, None).is_err(), "{path}");
        }
    }

    #[test]
    fn probes_pages_and_public_metrics_are_open() {
        for path in ["/", "/health", "/ready", "/docs", "/docs/swagger-ui.css", "/openapi.json"] {
            check("api_key = [\"one\"]", path, None).unwrap();
        }
        check("api_key = [\"one\"]\nmetrics_public = true", "/metrics", None).unwrap();
        check("", "/v1/models", None).unwrap();
    }
}

//! Bearer API keys: which paths need one, and the compare that takes equal time for right and wrong keys.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq as _};

use crate::cache_salt::Tenant;
use crate::config::Config;
use crate::error::ApiError;

/// The keys of the server; without any, every path is open.
#[derive(Debug)]
pub struct Auth {
    keys: Vec<crate::config::Secret>,
    metrics_public: bool,
    cache_shared: bool,
    admin_key: Option<crate::config::Secret>,
}

impl Auth {
    pub fn new(config: &Config) -> Self {
        Self {
            keys: config.api_key.clone(),
            metrics_public: config.metrics_public,
            cache_shared: config.cache_shared,
            admin_key: config.admin_key.clone(),
        }
    }

    /// Whose request it is, as far as caches are concerned.
    ///
    /// # Errors
    /// A missing or wrong key on a path that needs one.
    pub fn check(&self, path: &str, headers: &HeaderMap) -> Result<Tenant, ApiError> {
        if is_for_admins(path) {
            let key = self.admin_key.as_ref().ok_or(ApiError::NoAdminKey)?;
            let given = given_key(headers).map_err(|_| ApiError::MissingAdminKey)?;
            let is_right = bool::from(key.expose().ct_eq(given));
            return if is_right { Ok(Tenant::SHARED) } else { Err(ApiError::WrongAdminKey) };
        }
        if self.keys.is_empty() || self.is_open(path) {
            return Ok(Tenant::SHARED);
        }
        let given = given_key(headers)?;
        // All keys are compared, whichever one fits, so that time says nothing about them but their length.
        let found = self.keys.iter().fold(Choice::from(0), |found, key| found | key.expose().ct_eq(given));
        match bool::from(found) {
            true if self.cache_shared => Ok(Tenant::SHARED),
            true => Ok(Tenant::of_key(given)),
            false => Err(ApiError::WrongKey),
        }
    }

    fn is_open(&self, path: &str) -> bool {
        matches!(path, "/" | "/health" | "/ready" | "/docs" | "/openapi.json")
            || path.starts_with("/docs/")
            || (self.metrics_public && path == "/metrics")
    }
}

/// Paths that change what all tenants see, or tell of them.
fn is_for_admins(path: &str) -> bool {
    path == "/v1/cache" || path.starts_with("/v1/cache/") || path == "/v1/moe/profile"
}

fn given_key(headers: &HeaderMap) -> Result<&[u8], ApiError> {
    let header = headers.get(header::AUTHORIZATION).ok_or(ApiError::MissingKey)?;
    bearer(header.as_bytes()).ok_or(ApiError::MissingKey)
}

/// Middleware in front of every route; what is behind it finds a [`Tenant`] among the request's extensions.
pub async fn require_key(
    State(auth): State<Arc<Auth>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let tenant = auth.check(request.uri().path(), request.headers())?;
    request.extensions_mut().insert(tenant);
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

    fn check(settings: &str, path: &str, header: Option<&str>) -> Result<Tenant, ApiError> {
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
    fn each_key_is_a_tenant_unless_caches_are_shared() {
        let keys = "api_key = [\"one\", \"two\"]";
        let tenant = |settings, header| check(settings, "/v1/completions", header).unwrap();
        assert_eq!(tenant(keys, Some("Bearer one")), tenant(keys, Some("bearer  one ")));
        assert_ne!(tenant(keys, Some("Bearer one")), tenant(keys, Some("Bearer two")));
        assert_ne!(tenant(keys, Some("Bearer one")), Tenant::SHARED);
        assert_eq!(tenant("", Some("Bearer one")), Tenant::SHARED);
        assert_eq!(tenant(&format!("{keys}\ncache_shared = true"), Some("Bearer one")), Tenant::SHARED);
    }

    #[test]
    fn caches_and_profiles_are_for_the_admin_key_alone() {
        let paths = ["/v1/cache", "/v1/cache/clear", "/v1/cache/nowhere", "/v1/moe/profile"];
        for path in paths {
            assert!(matches!(check("", path, None), Err(ApiError::NoAdminKey)), "{path}");
            for settings in ["admin_key = \"root\"", "api_key = [\"one\"]\nadmin_key = \"root\""] {
                check(settings, path, Some("Bearer root")).unwrap();
                assert!(matches!(check(settings, path, Some("Bearer one")), Err(ApiError::WrongAdminKey)), "{path}");
                assert!(matches!(check(settings, path, None), Err(ApiError::MissingAdminKey)), "{path}");
            }
        }
        let both = "api_key = [\"one\"]\nadmin_key = \"root\"";
        assert!(check(both, "/v1/models", Some("Bearer root")).is_err(), "it opens nothing else");
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

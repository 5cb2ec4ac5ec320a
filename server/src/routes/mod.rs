//! One handler file per endpoint, and the table that binds them to paths and to the OpenAPI document.

mod body;
mod cache;
mod chat;
mod completions;
mod docs;
mod experts;
mod metrics;
mod models;
mod moe;
mod probes;
mod prompt_ids;
mod server_info;
mod tokenize;

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::http::HeaderValue;
use axum::response::Response;
use axum::routing::get;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::error::ApiError;
use crate::output_cache::{ORIGIN_HEADER, Origin};

/// What is wrong with a query, by the name of the parameter where that is known.
fn bad_query(rejection: &QueryRejection) -> ApiError {
    let text = rejection.body_text();
    let reason = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
    let is_name = |name: &str| name.chars().all(|char| char.is_ascii_lowercase() || char == '_');
    match reason.split_once(": ").filter(|(name, _)| is_name(name)) {
        Some((param, reason)) => ApiError::WrongType { param: Some(param.to_owned()), reason: reason.to_owned() },
        None => ApiError::WrongType { param: None, reason: reason.to_owned() },
    }
}

/// What the document says beside the routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Moesaic",
        description = "The OpenAI API over a mixture-of-experts model. Where OpenAI defines no field, vLLM's are taken.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    // Model names hold slashes, so the route is a wildcard, which OpenAPI paths cannot say.
    paths(models::retrieve),
    tags(
        (name = "inference", description = "Generate text"),
        (name = "experts", description = "What routers choose"),
        (name = "text", description = "Strings to token ids and back"),
        (name = "operation", description = "Probes, metrics and settings")
    )
)]
struct Document;

fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(chat::complete))
        .routes(routes!(completions::complete))
        .routes(routes!(models::list))
        .routes(routes!(moe::of_text, moe::of_prompt))
        .routes(routes!(experts::loads))
        .routes(routes!(experts::profile))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .routes(routes!(probes::health))
        .routes(routes!(probes::ready))
        .routes(routes!(probes::version))
        .routes(routes!(metrics::render))
        .routes(routes!(server_info::show))
        .routes(routes!(cache::stats))
        .routes(routes!(cache::clear))
        .routes(routes!(docs::openapi))
}

/// Says where the answer comes from, where the output cache was asked.
fn tell_origin(mut response: Response, origin: Option<Origin>) -> Response {
    if let Some(origin) = origin {
        response.headers_mut().insert(ORIGIN_HEADER, HeaderValue::from_static(origin.name()));
    }
    response
}

/// All routes.
pub fn router() -> Router<Arc<App>> {
    let (router, _) = described().split_for_parts();
    router.route("/v1/models/{*model}", get(models::retrieve)).route("/", get(docs::index)).merge(docs::pages())
}

/// The OpenAPI document as it is kept in `openapi/openapi.json`.
pub fn openapi_json() -> String {
    let document = described().into_openapi();
    document.to_pretty_json().expect("the document is plain JSON") + "\n"
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kept_openapi_document_is_current() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi/openapi.json");
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == super::openapi_json(),
            "{} is stale: run `moesaic openapi > openapi/openapi.json`",
            path.display()
        );
    }
}

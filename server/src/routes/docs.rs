//! `GET /`, `/docs` and `/openapi.json`: the interface explains itself, offline.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Redirect};
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::app::App;

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "operation", responses(
    (status = 200, description = "The OpenAPI document", body = Object),
))]
pub async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], super::openapi_json())
}

/// Sends browsers to the docs page.
pub async fn index() -> Redirect {
    Redirect::temporary("/docs/")
}

/// The docs page with its assets, all from the binary.
pub fn pages() -> Router<Arc<App>> {
    SwaggerUi::new("/docs").config(Config::from("/openapi.json")).into()
}

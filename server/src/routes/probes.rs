//! `GET /health`, `/ready` and `/version`: what orchestrators ask.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::ApiError;
use crate::openai::error::ErrorResponse;

/// An answer that says all is well.
#[derive(Serialize, ToSchema)]
pub struct Status {
    /// `ok` or `ready`.
    status: &'static str,
}

/// The server's version.
#[derive(Serialize, ToSchema)]
pub struct Version {
    version: &'static str,
}

/// Whether the process should go on living
#[utoipa::path(get, path = "/health", tag = "operation", responses(
    (status = 200, description = "The process lives, loading or not", body = Status),
    (status = 503, description = "The step loop has stopped: restart the process", body = ErrorResponse),
))]
pub async fn health(State(app): State<Arc<App>>) -> Result<Json<Status>, ApiError> {
    if app.is_live() { Ok(Json(Status { status: "ok" })) } else { Err(ApiError::EngineDead) }
}

/// Whether requests should be sent here
#[utoipa::path(get, path = "/ready", tag = "operation", responses(
    (status = 200, description = "The model is loaded and the step loop moves", body = Status),
    (status = 503, description = "Loading, shutting down, or stopped", body = ErrorResponse),
))]
pub async fn ready(State(app): State<Arc<App>>) -> Result<Json<Status>, ApiError> {
    if app.is_ready() {
        return Ok(Json(Status { status: "ready" }));
    }
    Err(match app.loaded() {
        _ if app.shutdown.is_draining() => ApiError::ShuttingDown,
        None => ApiError::Loading,
        Some(_) => ApiError::EngineDead,
    })
}

/// The server's version
#[utoipa::path(get, path = "/version", tag = "operation", responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

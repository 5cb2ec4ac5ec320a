//! `GET /metrics` in the Prometheus text format.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use crate::app::App;
use crate::telemetry::metrics::observe_engine;

/// Metrics in the Prometheus text format
#[utoipa::path(get, path = "/metrics", tag = "operation", responses(
    (status = 200, body = String, content_type = "text/plain"),
))]
pub async fn render(State(app): State<Arc<App>>) -> impl IntoResponse {
    if let Some(model) = app.loaded() {
        observe_engine(&model.engine);
        if let Some(outputs) = model.outputs() {
            outputs.observe().await;
        }
        if let Some(kv_tier) = model.kv_tier() {
            kv_tier.observe().await;
        }
        if let Some(routing) = model.routing() {
            routing.observe().await;
        }
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}

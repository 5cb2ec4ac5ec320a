//! `GET /v1/models` and `GET /v1/models/{model}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};

use crate::app::{App, Model};
use crate::error::ApiError;
use crate::openai::error::ErrorResponse;
use crate::openai::models::{ModelCard, ModelList};
use crate::validate::model_name;

/// List the names that requests may use
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "inference",
    responses(
        (status = 200, body = ModelList),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let model = app.loaded().ok_or(ApiError::Loading)?;
    let data = app.model_names.iter().map(|name| card(&app, model, name)).collect();
    Ok(Json(ModelList { object: "list".to_owned(), data }))
}

/// Describe one name
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    tag = "inference",
    params(("model" = String, Path, description = "A served model's name")),
    responses(
        (status = 200, body = ModelCard),
        (status = 404, description = "There is no such model", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn retrieve(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    let Path(name) = name.map_err(|rejection| ApiError::invalid("model", rejection.body_text()))?;
    let model = app.loaded().ok_or(ApiError::Loading)?;
    model_name(Some(&name), &model.limits)?;
    Ok(Json(card(&app, model, &name)))
}

fn card(app: &App, model: &Model, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model".to_owned(),
        created: model.created,
        owned_by: "moesaic".to_owned(),
        root: app.model_names[0].clone(),
        max_model_len: model.limits.max_tokens,
    }
}

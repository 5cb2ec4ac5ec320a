//! Every way to turn a request down, and the only place that knows status codes.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::{GenerationError, SubmitError};
use thiserror::Error;

use crate::openai::error::{ErrorBody, ErrorResponse};

/// Why a request failed. The texts are what clients read.
#[derive(Clone, Debug, Error)]
pub enum ApiError {
    #[error("the body is not valid JSON: {reason}")]
    Malformed { reason: String },
    #[error("{}{reason}", param.as_ref().map(|param| format!("`{param}`: ")).unwrap_or_default())]
    WrongType { param: Option<String>, reason: String },
    #[error("content type `{found}` is not supported; send `Content-Type: application/json`")]
    ContentType { found: String },
    #[error("`{param}`: {reason}")]
    Invalid { param: String, reason: String },
    #[error("`{param}` is not supported: {hint}")]
    Unsupported { param: String, hint: String },
    #[error("{reason}; shorten the prompt or lower `max_tokens`")]
    ContextLength { param: &'static str, reason: String },
    #[error("the model `{name}` does not exist; this server has {served}")]
    UnknownModel { name: String, served: String },
    #[error("there is no {method} {path}; GET /docs lists what there is")]
    NoRoute { method: String, path: String },
    #[error("{path} does not answer {method}; GET /docs lists what there is")]
    NoMethod { method: String, path: String },
    #[error("no API key was given; send `Authorization: Bearer KEY`")]
    MissingKey,
    #[error("the API key is not valid")]
    WrongKey,
    #[error("no admin key was given; send `Authorization: Bearer KEY` with the server's --admin-key")]
    MissingAdminKey,
    #[error("the admin key is not valid; it is what the server was started with as --admin-key")]
    WrongAdminKey,
    #[error("this server has no admin key; start it with --admin-key to open this path")]
    NoAdminKey,
    #[error("the body is larger than {limit} bytes; the server's --max-body-bytes sets the limit")]
    BodyTooLarge { limit: u64 },
    #[error("the body did not arrive within {seconds} seconds")]
    BodyTimeout { seconds: u64 },
    #[error("the connection broke while the body was read")]
    BodyBroken,
    #[error(
        "the request took longer than {seconds} seconds; ask for fewer tokens or raise the server's --request-timeout"
    )]
    Timeout { seconds: f64 },
    #[error("{limit} requests are already running or waiting; try again later")]
    Busy { limit: usize },
    #[error("the model is still being loaded; try again later")]
    Loading,
    #[error("the server is shutting down; try another one")]
    ShuttingDown,
    #[error("the engine has stopped after a device error; the server must be restarted")]
    EngineDead,
    #[error("the request failed: {0}")]
    Generation(GenerationError),
    #[error("internal error; the server's log has the details under the request id")]
    Internal,
}

impl ApiError {
    /// A field whose value is not allowed.
    pub fn invalid(param: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { param: param.into(), reason: reason.into() }
    }

    /// What the engine says about a request whose prompt came in `param`.
    pub fn from_submit(error: SubmitError, param: &'static str) -> Self {
        match error {
            SubmitError::EmptyPrompt => Self::invalid(param, error.to_string()),
            SubmitError::TokenOutOfRange { .. } => Self::invalid(param, error.to_string()),
            SubmitError::TooLong { .. } | SubmitError::NeverFits { .. } => {
                Self::ContextLength { param, reason: error.to_string() }
            }
            SubmitError::NoPromptLogprobs => Self::invalid("prompt_logprobs", error.to_string()),
            SubmitError::NoRoutedExperts { .. } => Self::invalid("return_routed_experts", error.to_string()),
            SubmitError::NoExpertUse { .. } => Self::invalid("moe.usage", error.to_string()),
            SubmitError::QueueFull { limit } => Self::Busy { limit },
            SubmitError::ShuttingDown => Self::ShuttingDown,
            SubmitError::Dead => Self::EngineDead,
        }
    }

    pub fn status(&self) -> StatusCode {
        match self {
            Self::Malformed { .. }
            | Self::WrongType { .. }
            | Self::Invalid { .. }
            | Self::Unsupported { .. }
            | Self::ContextLength { .. }
            | Self::BodyBroken => StatusCode::BAD_REQUEST,
            Self::MissingKey | Self::WrongKey | Self::MissingAdminKey | Self::WrongAdminKey => StatusCode::UNAUTHORIZED,
            Self::NoAdminKey => StatusCode::FORBIDDEN,
            Self::UnknownModel { .. } | Self::NoRoute { .. } => StatusCode::NOT_FOUND,
            Self::NoMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ContentType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal | Self::Generation(GenerationError::CorruptedLogits | GenerationError::Device(_)) => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
            Self::Loading
            | Self::ShuttingDown
            | Self::EngineDead
            | Self::Generation(GenerationError::ShuttingDown | GenerationError::ExpertUnavailable(_)) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// What programs tell errors apart by.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed { .. } => "invalid_json",
            Self::WrongType { .. } => "invalid_type",
            Self::ContentType { .. } => "unsupported_media_type",
            Self::Invalid { .. } => "invalid_value",
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::ContextLength { .. } => "context_length_exceeded",
            Self::UnknownModel { .. } => "model_not_found",
            Self::NoRoute { .. } => "not_found",
            Self::NoMethod { .. } => "method_not_allowed",
            Self::MissingKey | Self::WrongKey => "invalid_api_key",
            Self::MissingAdminKey | Self::WrongAdminKey => "invalid_admin_key",
            Self::NoAdminKey => "no_admin_key",
            Self::BodyTooLarge { .. } => "request_too_large",
            Self::BodyTimeout { .. } | Self::Timeout { .. } => "timeout",
            Self::BodyBroken => "incomplete_body",
            Self::Busy { .. } => "queue_full",
            Self::Loading => "model_loading",
            Self::ShuttingDown | Self::Generation(GenerationError::ShuttingDown) => "shutting_down",
            Self::EngineDead | Self::Generation(GenerationError::Device(_)) => "engine_dead",
            Self::Generation(GenerationError::CorruptedLogits) => "corrupted_logits",
            Self::Generation(GenerationError::ExpertUnavailable(_)) => "expert_unavailable",
            Self::Internal => "internal_error",
        }
    }

    /// The request field at fault.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } | Self::Unsupported { param, .. } => Some(param),
            Self::WrongType { param, .. } => param.as_deref(),
            Self::ContextLength { param, .. } => Some(param),
            Self::UnknownModel { .. } => Some("model"),
            _ => None,
        }
    }

    /// Seconds after which trying again makes sense.
    fn retry_after(&self) -> Option<u32> {
        match self {
            Self::Busy { .. } => Some(1),
            Self::Loading | Self::ShuttingDown | Self::Generation(GenerationError::ShuttingDown) => Some(5),
            _ => None,
        }
    }

    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The object that clients read, in a response or in a stream's event.
    pub fn to_wire(&self) -> ErrorResponse {
        ErrorResponse {
            error: ErrorBody {
                message: self.to_string(),
                kind: self.kind().to_owned(),
                param: self.param().map(str::to_owned),
                code: Some(self.code().to_owned()),
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.to_wire())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_openai_shape_and_say_when_to_retry() {
        let error = ApiError::from_submit(SubmitError::QueueFull { limit: 3 }, "messages");
        let response = error.clone().into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        let wire = serde_json::to_value(error.to_wire()).unwrap();
        assert_eq!(wire["error"]["type"], "rate_limit_error");
        assert_eq!(wire["error"]["code"], "queue_full");
        assert!(wire["error"]["param"].is_null());
    }

    #[test]
    fn a_prompt_that_is_too_long_names_its_field() {
        let long = SubmitError::TooLong { prompt_len: 9000, max_tokens: 1, limit: 8192 };
        let error = ApiError::from_submit(long, "prompt");
        assert_eq!(
            (error.status().as_u16(), error.param(), error.code()),
            (400, Some("prompt"), "context_length_exceeded")
        );
    }
}

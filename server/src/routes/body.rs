//! JSON bodies: read within limits, and errors that name the field.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::app::App;
use crate::error::ApiError;
use crate::limits::BODY_TIMEOUT;

/// A JSON object that was read in full.
pub struct JsonBody(pub Value);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        RawBody::from_request(request, app).await?.object().map(Self)
    }
}

/// The bytes of a body that says it is JSON.
pub struct RawBody(pub Bytes);

impl RawBody {
    /// # Errors
    /// The bytes are no JSON object.
    pub fn object(&self) -> Result<Value, ApiError> {
        parse_object(&self.0)
    }
}

impl FromRequest<Arc<App>> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        check_content_type(request.headers())?;
        let limit = app.limits.max_body_bytes;
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if length.is_some_and(|length: u64| length > limit) {
            return Err(ApiError::BodyTooLarge { limit });
        }
        let bytes = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, app)).await;
        let bytes = bytes.map_err(|_| ApiError::BodyTimeout { seconds: BODY_TIMEOUT.as_secs() })?;
        let bytes = bytes.map_err(|rejection| match rejection {
            BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
                ApiError::BodyTooLarge { limit }
            }
            _ => ApiError::BodyBroken,
        })?;
        Ok(Self(bytes))
    }
}

/// Reads `T` out of an object that may hold other fields, too.
///
/// # Errors
/// [`ApiError::WrongType`] with the path of the field.
pub fn parse<T: DeserializeOwned>(body: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|error| {
        let path = error.path().to_string();
        ApiError::WrongType { param: (path != ".").then_some(path), reason: error.inner().to_string() }
    })
}

fn parse_object(bytes: &[u8]) -> Result<Value, ApiError> {
    let body: Value =
        serde_json::from_slice(bytes).map_err(|error| ApiError::Malformed { reason: error.to_string() })?;
    match body.is_object() {
        true => Ok(body),
        false => Err(ApiError::WrongType { param: None, reason: "the body must be a JSON object".to_owned() }),
    }
}

/// Absent is fine; what curl sends without a header is not, because it is a mistake more often than not.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
    let kind = text.split(';').next().unwrap_or_default().trim();
    match kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json")) {
        true => Ok(()),
        false => Err(ApiError::ContentType { found: kind.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::sampling::SamplingOptions;
    use serde_json::json;

    #[test]
    fn wrong_types_name_their_field() {
        for (body, param) in [
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"n": 1.5}), "n"),
            (json!({"stop_token_ids": [1, "x"]}), "stop_token_ids[1]"),
            (json!({"logit_bias": {"5": "x"}}), "logit_bias.5"),
            (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
            (json!({"stop": {}}), "stop"),
        ] {
            let error = parse::<SamplingOptions>(&body).unwrap_err();
            assert_eq!((error.param(), error.code()), (Some(param), "invalid_type"), "{body}");
            assert!(!error.to_string().contains("enum"), "in words of the API: {error}");
        }
        parse::<SamplingOptions>(&json!({"temperature": null, "nobody_knows": {}})).unwrap();
    }

    #[test]
    fn bodies_that_are_not_objects_are_refused() {
        for (text, code) in
            [("", "invalid_json"), ("{", "invalid_json"), ("[]", "invalid_type"), ("{\"a\":1e999}", "invalid_json")]
        {
            assert_eq!(parse_object(text.as_bytes()).unwrap_err().code(), code, "{text}");
        }
    }

    #[test]
    fn only_json_is_taken() {
        let check = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(value));
            check_content_type(&headers)
        };
        for value in
            ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"]
        {
            check(value).unwrap();
        }
        for value in ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"] {
            assert_eq!(check(value).unwrap_err().status(), 415, "{value}");
        }
    }
}

//! What can go wrong between a client and a server.

use serde_json::Value;
use thiserror::Error;

use super::printable;

/// Longest error text without an error object that is repeated, in characters.
const MAX_MESSAGE_CHARS: usize = 500;

#[derive(Debug, Error)]
pub enum ClientError {
    #[error("{url} cannot be used: {reason}")]
    BadUrl { url: String, reason: String },
    #[error("no answer from {url}: {cause}")]
    Transport { url: String, cause: ureq::Error },
    #[error("{url} took too long; hint: allow more with --timeout")]
    Timeout { url: String },
    /// `message` is the server's own.
    #[error("{message} (status {status} of {url})")]
    Status { url: String, status: u16, message: String },
    /// An error event in a stream; `message` is the server's own.
    #[error("{message}")]
    Stream { message: String },
    #[error("the answer of {url} ends before `[DONE]`")]
    CutOff { url: String },
    #[error("the answer of {url} cannot be read: {reason}")]
    BadAnswer { url: String, reason: String },
}

impl ClientError {
    pub(super) fn transport(url: &str, error: ureq::Error) -> Self {
        match error {
            ureq::Error::Timeout(_) => Self::Timeout { url: url.to_owned() },
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => Self::bad_answer(url, error),
            cause => Self::Transport { url: url.to_owned(), cause },
        }
    }

    pub(super) fn bad_answer(url: &str, reason: impl ToString) -> Self {
        Self::BadAnswer { url: url.to_owned(), reason: reason.to_string() }
    }

    /// A short name to count errors by.
    pub fn kind(&self) -> String {
        match self {
            Self::BadUrl { .. } => "bad_url".to_owned(),
            Self::Transport { .. } => "connection".to_owned(),
            Self::Timeout { .. } => "timeout".to_owned(),
            Self::Status { status, .. } => format!("http_{status}"),
            Self::Stream { .. } => "stream_error".to_owned(),
            Self::CutOff { .. } => "cut_off".to_owned(),
            Self::BadAnswer { .. } => "bad_answer".to_owned(),
        }
    }
}

/// The message of an error object, in the shapes in use, else the beginning of the body.
pub(super) fn error_message(body: &str) -> String {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let message = ["/error/message", "/error", "/message", "/detail"]
        .iter()
        .find_map(|pointer| value.pointer(pointer).and_then(Value::as_str));
    match message {
        Some(message) => printable(message),
        None if body.trim().is_empty() => "no reason given".to_owned(),
        None => printable(body.trim()).chars().take(MAX_MESSAGE_CHARS).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_in_all_shapes() {
        for (body, message) in [
            (r#"{"error": {"message": "too long", "code": null}}"#, "too long"),
            (r#"{"error": "no such model"}"#, "no such model"),
            (r#"{"object": "error", "message": "busy"}"#, "busy"),
            (r#"{"detail": "Not Found"}"#, "Not Found"),
            (r#"{"detail": [{"loc": []}]}"#, r#"{"detail": [{"loc": []}]}"#),
            ("  \n", "no reason given"),
            ("Bad Gateway\n", "Bad Gateway"),
            ("\u{1b}[2JBad", "[2JBad"),
            ("{\"error\": \"\\u001b]0;title\\u0007no\"}", "]0;titleno"),
        ] {
            assert_eq!(error_message(body), message, "{body}");
        }
        assert_eq!(error_message(&"x".repeat(9000)).len(), MAX_MESSAGE_CHARS);
    }
}

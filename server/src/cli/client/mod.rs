//! A blocking client for servers that speak the OpenAI API, for the subcommands that talk to one.
//!
//! `event_stream` reads server-sent events, `wire` has what is read of an answer, `error` what can go wrong.

#[cfg(test)]
pub mod canned_server;
mod error;
mod event_stream;
mod wire;

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use ureq::http::{Response, Uri, header};
use ureq::{Agent, Body, BodyReader};

pub use self::error::ClientError;
use self::error::error_message;
use self::event_stream::EventStream;
pub use self::wire::{Answer, TokenUsage};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_JSON_BYTES: u64 = 256 << 20;
/// Enough for any error object.
const MAX_ERROR_BYTES: u64 = 1 << 20;

const MODELS: &str = "/v1/models";

/// Which server to talk to.
#[derive(Args, Clone, Debug)]
pub struct ServerArgs {
    /// Address of the server, with or without `/v1`
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model to ask for [default: the first of /v1/models]
    #[arg(long)]
    pub model: Option<String>,
    /// Key to send as bearer token
    #[arg(long, env = "MOESAIC_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Seconds that one request may take in all
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
}

/// A connection pool to one server.
pub struct Client {
    agent: Agent,
    base_url: String,
    authorization: Option<String>,
}

impl Client {
    /// Keeps up to `max_connections` open between requests.
    ///
    /// # Errors
    /// [`ClientError::BadUrl`].
    pub fn new(args: &ServerArgs, max_connections: usize) -> Result<Self, ClientError> {
        let (base_url, is_local) = parse_base_url(&args.url)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Decompression would gather events.
            .accept_encoding("identity")
            .user_agent(concat!("moesaic/", env!("CARGO_PKG_VERSION")))
            .max_idle_connections(max_connections)
            .max_idle_connections_per_host(max_connections)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(Duration::from_secs(args.timeout.into())));
        if is_local {
            config = config.proxy(None);
        }
        Ok(Self {
            agent: Agent::new_with_config(config.build()),
            base_url,
            authorization: args.api_key.as_ref().map(|key| format!("Bearer {key}")),
        })
    }

    /// Scheme, host and port, and a path where the server has one, without `/v1`.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// The first model that the server lists.
    ///
    /// # Errors
    /// As [`Client::post`]; [`ClientError::BadAnswer`] for an empty list.
    pub fn first_model(&self) -> Result<String, ClientError> {
        let models: Value = self.get(MODELS)?;
        let id = models.pointer("/data/0/id").and_then(Value::as_str);
        id.map(str::to_owned)
            .ok_or_else(|| ClientError::bad_answer(&format!("{}{MODELS}", self.base_url), "it lists no model"))
    }

    /// Reads the JSON of `path`.
    ///
    /// # Errors
    /// What [`ClientError`] says, but for its stream errors.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let url = format!("{}{path}", self.base_url);
        let request = self.authorized(self.agent.get(&url));
        let response = request.call().map_err(|error| ClientError::transport(&url, error))?;
        self.read_json(&url, response)
    }

    /// Posts `body` to `path` and reads the JSON of the answer.
    ///
    /// # Errors
    /// What [`ClientError`] says, but for its stream errors.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, ClientError> {
        let (url, response) = self.send(path, body)?;
        self.read_json(&url, response)
    }

    /// The same, for what a header of the answer says; `None` where it has none of this name. The JSON is read, and dropped.
    ///
    /// # Errors
    /// What [`ClientError`] says, but for its stream errors.
    pub fn post_for_header(&self, path: &str, body: &Value, name: &str) -> Result<Option<String>, ClientError> {
        let (url, response) = self.send(path, body)?;
        let found = response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        self.read_json::<IgnoredAny>(&url, response)?;
        Ok(found)
    }

    /// Posts `body` to `path` and hands out the chunks of the answer as they come.
    ///
    /// # Errors
    /// What [`ClientError`] says, but for its stream errors.
    pub fn post_streaming(&self, path: &str, body: &Value) -> Result<Chunks, ClientError> {
        let (url, response) = self.send(path, body)?;
        Ok(Chunks { events: EventStream::new(checked(&url, response)?.into_body().into_reader()), url })
    }

    fn send(&self, path: &str, body: &Value) -> Result<(String, Response<Body>), ClientError> {
        let url = format!("{}{path}", self.base_url);
        let request = self.authorized(self.agent.post(&url).content_type("application/json"));
        let response = request.send(body.to_string()).map_err(|error| ClientError::transport(&url, error))?;
        Ok((url, response))
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.authorization {
            Some(value) => request.header(header::AUTHORIZATION, value),
            None => request,
        }
    }

    fn read_json<T: DeserializeOwned>(&self, url: &str, response: Response<Body>) -> Result<T, ClientError> {
        let body = checked(url, response)?.into_body().into_with_config().limit(MAX_JSON_BYTES).read_to_vec();
        let body = body.map_err(|error| ClientError::transport(url, error))?;
        serde_json::from_slice(&body).map_err(|error| ClientError::bad_answer(url, error))
    }
}

/// The chunks of a streamed answer.
pub struct Chunks {
    events: EventStream<BodyReader<'static>>,
    url: String,
}

impl Chunks {
    /// The next chunk; `None` once the server said `[DONE]`.
    ///
    /// # Errors
    /// [`ClientError::Stream`] for an error event, [`ClientError::CutOff`] where the answer ends without `[DONE]`, and
    /// what stops the connection or makes a chunk unreadable.
    pub fn next_chunk(&mut self) -> Result<Option<Answer>, ClientError> {
        let data = self.events.next_data().map_err(|error| ClientError::transport(&self.url, error.into()))?;
        let data = data.ok_or_else(|| ClientError::CutOff { url: self.url.clone() })?;
        if data == "[DONE]" {
            return Ok(None);
        }
        let chunk: Answer = serde_json::from_str(&data).map_err(|error| ClientError::bad_answer(&self.url, error))?;
        match chunk.error {
            Some(_) => Err(ClientError::Stream { message: error_message(&data) }),
            None => Ok(Some(chunk)),
        }
    }

    /// Reads what follows `[DONE]`, so that the connection can be used again.
    pub fn finish(mut self) {
        // The answer is complete: an error now costs the connection only.
        drop(self.events.next_data());
    }
}

/// Without control characters: what a server sends must not steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars().filter(|char| !char.is_control() || matches!(char, '\n' | '\t')).collect()
}

fn checked(url: &str, response: Response<Body>) -> Result<Response<Body>, ClientError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = response.into_body().into_with_config().limit(MAX_ERROR_BYTES).lossy_utf8(true).read_to_string();
    let body = body.map_err(|error| ClientError::transport(url, error))?;
    Err(ClientError::Status { url: url.to_owned(), status: status.as_u16(), message: error_message(&body) })
}

/// The address without `/v1`, and whether it is this machine, where a proxy from the environment has no say.
fn parse_base_url(url: &str) -> Result<(String, bool), ClientError> {
    let bad = |reason: &str| ClientError::BadUrl { url: url.to_owned(), reason: reason.to_owned() };
    let uri: Uri = url.parse().map_err(|error: ureq::http::uri::InvalidUri| bad(&error.to_string()))?;
    let Some("http" | "https") = uri.scheme_str() else { return Err(bad("it must start with http:// or https://")) };
    let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
    if authority.as_str().contains('@') {
        // The address is printed and kept in reports.
        return Err(ClientError::BadUrl {
            url: "the address".into(),
            reason: "a secret belongs into --api-key".into(),
        });
    }
    let host = authority.host().trim_matches(['[', ']']);
    let is_local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let base = url.trim_end_matches('/');
    Ok((base.strip_suffix("/v1").unwrap_or(base).trim_end_matches('/').to_owned(), is_local))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lose_v1_and_tell_the_own_machine() {
        for (url, base, is_local) in [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000", true),
            ("http://localhost:8000/v1/", "http://localhost:8000", true),
            ("http://[::1]:8000/", "http://[::1]:8000", true),
            ("https://models.example/shared/v1", "https://models.example/shared", false),
        ] {
            assert_eq!(parse_base_url(url).unwrap(), (base.to_owned(), is_local), "{url}");
        }
        for url in ["127.0.0.1:8000", "ftp://host", "http://", "", "/v1"] {
            assert!(matches!(parse_base_url(url), Err(ClientError::BadUrl { .. })), "{url}");
        }
    }

    #[test]
    fn secrets_in_addresses_are_refused_and_not_repeated() {
        let error = parse_base_url("http://user:hunter2@host").unwrap_err().to_string();
        assert!(error.contains("--api-key") && !error.contains("hunter2"), "{error}");
    }
}

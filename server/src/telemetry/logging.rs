//! Log lines on stderr, as text or JSON.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};

/// Starts logging; a second call in one process changes nothing.
///
/// # Errors
/// `log_level` is not a filter; the text says why.
pub fn start(config: &Config) -> Result<(), String> {
    let filter = EnvFilter::try_new(&config.log_level)
        .map_err(|error| format!("`log_level` is `{}`: {error}", config.log_level))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    // Only tests start twice, and then the first one's settings stay.
    if result.is_err() {
        tracing::debug!("logging was started before");
    }
    Ok(())
}

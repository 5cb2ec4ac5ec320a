//! The reference of all settings, generated from their table.

use clap::CommandFactory as _;

use super::{Config, Settings};

/// The settings as a command of their own, for walking over them.
#[derive(clap::Parser)]
pub(super) struct SettingsCommand {
    #[command(flatten)]
    _settings: Settings,
}

/// The reference of all settings as Markdown: what `docs/configuration.md` holds.
pub fn reference() -> String {
    let defaults = toml::Table::try_from(Config::default()).expect("the defaults serialize");
    let mut text = String::from(
        "# Configuration\n\nGenerated from the settings table by `moesaic config-reference`; a test keeps it true.\n\n\
         A setting is looked up as a flag, then as an environment variable, then in the TOML file named by `--config` or\n\
         `MOESAIC_CONFIG` (keys are the flags' names with `_` for `-`), then its default is taken. Unknown keys, flags and\n\
         `MOESAIC_*` variables are refused. Lists are repeated flags, comma-separated variables and TOML arrays.\n\n\
         | flag | variable | default | meaning |\n|---|---|---|---|\n",
    );
    for arg in SettingsCommand::command().get_arguments() {
        let flag = match arg.get_long() {
            Some("help") => continue,
            Some(flag) => format!("--{flag}"),
            None => "MODEL".to_owned(),
        };
        let default = match defaults.get(arg.get_id().as_str()) {
            Some(toml::Value::String(value)) => value.clone(),
            Some(toml::Value::Array(_)) | None => String::new(),
            Some(value) => value.to_string(),
        };
        let env = arg.get_env().map(|env| env.to_string_lossy().into_owned()).unwrap_or_default();
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let shown = if arg.is_hide_possible_values_set() { Vec::new() } else { arg.get_possible_values() };
        let values: Vec<String> = shown.iter().map(|value| value.get_name().to_owned()).collect();
        let values = match values.is_empty() || values == ["true", "false"] {
            true => String::new(),
            false => format!(" ({})", values.join(", ")),
        };
        text.push_str(&format!("| `{flag}` | `{env}` | {default} | {help}{values} |\n"));
    }
    text
}

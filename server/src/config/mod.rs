//! The configuration of the server: one table of settings gives flags, environment variables, file keys and their reference.
//!
//! `values` holds the types of single settings, `routing` those about experts' choices, `reference` writes the page about all of
//! them.

mod reference;
mod routing;
#[cfg(test)]
mod tests;
mod values;

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::{Args, CommandFactory as _};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use reference::SettingsCommand;
pub use reference::reference;
pub use routing::CapacityMode;
pub use values::{
    ByteSize, DeepestTier, DeviceName, ExpertShare, IsaType, KvTierType, KvType, LogFormat, PolicyType, QuantType,
    ReadType, Seconds, Secret, WarmupType, WeightType,
};

/// Why the configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a valid configuration: {reason}", path = path.display())]
    File { path: PathBuf, reason: String },
    #[error("unknown environment variable `{name}`; known are {known}")]
    UnknownVariable { name: String, known: String },
    #[error("`{setting}` is {value}, allowed are {allowed}")]
    OutOfRange { setting: &'static str, value: String, allowed: &'static str },
    #[error(
        "`{setting}` is not set, which the value of `{wanted_by}` needs; hint: --{flag}",
        flag = setting.replace('_', "-")
    )]
    Missing { setting: &'static str, wanted_by: &'static str },
    #[error("{path} holds no API key; write one key per line", path = path.display())]
    NoKeys { path: PathBuf },
}

/// Defines [`Settings`] (what was typed: every field optional) and [`Config`] (what it means: every field resolved) from one
/// list, so that a setting is described exactly once.
macro_rules! settings {
    (
        values { $($(#[doc = $vdoc:literal])* $(#[arg($($varg:tt)*)])? $vname:ident: $vtype:ty = $vdefault:expr;)* }
        optional { $($(#[doc = $odoc:literal])* $(#[arg($($oarg:tt)*)])? $oname:ident: $otype:ty;)* }
        lists { $($(#[doc = $ldoc:literal])* $(#[arg($($larg:tt)*)])? $lname:ident: $ltype:ty;)* }
    ) => {
        /// Settings of one layer (flags over environment, or the file); a field that is `None` leaves it to the next.
        #[derive(Args, Clone, Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Settings {
            $($(#[doc = $vdoc])* #[arg($($($varg)*)?)] pub $vname: Option<$vtype>,)*
            $($(#[doc = $odoc])* #[arg($($($oarg)*)?)] pub $oname: Option<$otype>,)*
            $($(#[doc = $ldoc])* #[arg(value_delimiter = ',', $($($larg)*)?)] pub $lname: Option<Vec<$ltype>>,)*
        }

        /// The resolved configuration, printed at start and served at `/server_info`; secrets serialize redacted.
        #[derive(Clone, Debug, Serialize)]
        pub struct Config {
            $($(#[doc = $vdoc])* pub $vname: $vtype,)*
            $($(#[doc = $odoc])* #[serde(skip_serializing_if = "Option::is_none")] pub $oname: Option<$otype>,)*
            $($(#[doc = $ldoc])* pub $lname: Vec<$ltype>,)*
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($vname: $vdefault,)* $($oname: None,)* $($lname: Vec::new(),)* }
            }
        }

        impl Settings {
            /// This layer where it says something, else the lower one.
            fn over(self, lower: Self) -> Self {
                Self {
                    $($vname: self.$vname.or(lower.$vname),)*
                    $($oname: self.$oname.or(lower.$oname),)*
                    $($lname: self.$lname.or(lower.$lname),)*
                }
            }

            fn over_defaults(self) -> Config {
                let defaults = Config::default();
                Config {
                    $($vname: self.$vname.unwrap_or(defaults.$vname),)*
                    $($oname: self.$oname,)*
                    $($lname: self.$lname.unwrap_or_default(),)*
                }
            }
        }
    };
}

settings! {
    values {
        /// Address to listen on
        #[arg(long, env = "MOESAIC_HOST")]
        host: IpAddr = IpAddr::from([127, 0, 0, 1]);
        /// Port to listen on; 0 takes a free one, which is printed
        #[arg(long, env = "MOESAIC_PORT", value_parser = parse_port)]
        port: u16 = 8000;
        /// Storage type of the weights in memory
        #[arg(long, env = "MOESAIC_DTYPE")]
        dtype: WeightType = WeightType::Auto;
        /// Quantize while loading: matrices of layers to this, embedding and output projection to int8 in either case
        #[arg(long, env = "MOESAIC_QUANT")]
        quant: QuantType = QuantType::None;
        /// Which experts stay in memory when others come, under --expert-memory
        #[arg(long, env = "MOESAIC_EXPERT_POLICY")]
        expert_policy: PolicyType = PolicyType::Lfru;
        /// Which experts are read at the start; without --expert-memory all weights that stay in mapped files, or none
        #[arg(long, env = "MOESAIC_EXPERT_WARMUP")]
        expert_warmup: WarmupType = WarmupType::All;
        /// Read experts before they are needed, under --expert-memory; =false reads each when a step needs it
        #[arg(long, env = "MOESAIC_EXPERT_PREFETCH", num_args = 0..=1, require_equals = true, hide_possible_values = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
        expert_prefetch: bool = true;
        /// How experts are read, under --expert-memory
        #[arg(long, env = "MOESAIC_EXPERT_READ")]
        expert_read: ReadType = ReadType::Auto;
        /// Storage type of keys and values in the KV cache; auto is f32 for f32 weights, else bf16
        #[arg(long, env = "MOESAIC_KV_CACHE_DTYPE")]
        kv_cache_dtype: KvType = KvType::Auto;
        /// Where the model computes: auto, cpu, cuda or cuda:N; auto is the first GPU of a build with CUDA, else the CPU
        #[arg(long, env = "MOESAIC_DEVICE")]
        device: DeviceName = DeviceName::default();
        /// Share of a GPU's memory, 0.05 to 1, that weights, KV cache and steps take beside what others have of it
        #[arg(long, env = "MOESAIC_GPU_MEMORY_UTILIZATION")]
        gpu_memory_utilization: f64 = 0.9;
        /// Instruction set of the kernels; auto is the fastest that the machine has
        #[arg(long, env = "MOESAIC_ISA")]
        isa: IsaType = IsaType::Auto;
        /// Load the multi-token-prediction layers too, with room for their keys and values; an error where the model has none
        #[arg(long, env = "MOESAIC_LOAD_MTP", num_args = 0..=1, require_equals = true, hide_possible_values = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
        load_mtp: bool = false;
        /// Tokens per KV block, a power of two from 1 to 256
        #[arg(long, env = "MOESAIC_BLOCK_SIZE")]
        block_size: usize = 16;
        /// Keep computed blocks of prompts and outputs for requests that begin alike; =false computes every prompt anew
        #[arg(long, env = "MOESAIC_ENABLE_PREFIX_CACHING", num_args = 0..=1, require_equals = true, hide_possible_values = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
        enable_prefix_caching: bool = true;
        /// Share what is cached between API keys; else none can learn by timing what another asked
        #[arg(long, env = "MOESAIC_CACHE_SHARED", num_args = 0..=1, require_equals = true, hide_possible_values = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
        cache_shared: bool = false;
        /// Sequences running at once, 1 to 65536
        #[arg(long, env = "MOESAIC_MAX_NUM_SEQS")]
        max_num_seqs: usize = 512;
        /// Prompt and decode tokens of one step together, 1 to 1048576
        #[arg(long, env = "MOESAIC_MAX_NUM_BATCHED_TOKENS")]
        max_num_batched_tokens: usize = 512;
        /// Sequences waiting for their first step, 1 to 1048576; further requests get 429
        #[arg(long, env = "MOESAIC_MAX_QUEUE")]
        max_queue: usize = 1024;
        /// Milliseconds, 0 to 100, that an idle engine gathers requests before its first step
        #[arg(long, env = "MOESAIC_BATCH_TIMEOUT_MS")]
        batch_timeout_ms: u64 = 0;
        /// Bytes of cached answers in memory, a quarter of them for finding requests that say the same bytes again
        #[arg(long, env = "MOESAIC_OUTPUT_CACHE_MEMORY")]
        output_cache_memory: ByteSize = ByteSize(256 << 20);
        /// Seconds that a cached answer is used, up to 30 days
        #[arg(long, env = "MOESAIC_OUTPUT_CACHE_TTL")]
        output_cache_ttl: Seconds = Seconds(3600.0);
        /// Milliseconds, 1 to 10000, that one request may wait in all to be told what caches have
        #[arg(long, env = "MOESAIC_CACHE_TIMEOUT_MS")]
        cache_timeout_ms: u64 = 50;
        /// Bytes of memory that remember which experts blocks of prompts took; 0 turns that off, in slow tiers too
        #[arg(long, env = "MOESAIC_ROUTING_CACHE_MEMORY")]
        routing_cache_memory: ByteSize = ByteSize(8 << 20);
        /// Bytes of memory for blocks of prompts beyond the KV cache; 0 keeps none there
        #[arg(long, env = "MOESAIC_KV_TIER_MEMORY")]
        kv_tier_memory: ByteSize = ByteSize(0);
        /// How blocks of prompts are kept beyond the KV cache: as they are in it, or int8 in half the bytes, which changes outputs
        #[arg(long, env = "MOESAIC_KV_TIER_DTYPE")]
        kv_tier_dtype: KvTierType = KvTierType::Auto;
        /// Seconds that a block of a prompt is kept beyond the KV cache, up to 30 days
        #[arg(long, env = "MOESAIC_KV_TIER_TTL")]
        kv_tier_ttl: Seconds = Seconds(86_400.0);
        /// Seconds that loading the blocks of a prompt may take; what has not come then is computed
        #[arg(long, env = "MOESAIC_KV_TIER_TIMEOUT")]
        kv_tier_timeout: Seconds = Seconds(5.0);
        /// Bytes of --cache-dir
        #[arg(long, env = "MOESAIC_CACHE_DISK")]
        cache_disk: ByteSize = ByteSize(4 << 30);
        /// What keys in Redis start with: up to 64 letters, digits, `-`, `_`, `.` and `:`
        #[arg(long, env = "MOESAIC_REDIS_PREFIX")]
        redis_prefix: String = "moesaic".to_owned();
        /// What becomes of an expert's tokens above --capacity-factor: their weights are scaled down together, or the least dropped
        #[arg(long, env = "MOESAIC_CAPACITY_MODE")]
        capacity_mode: CapacityMode = CapacityMode::Scale;
        /// Standard deviation, 0 to 100, of noise on router logits by a request's seed, which changes outputs; 0 is none
        #[arg(long, env = "MOESAIC_ROUTER_NOISE")]
        router_noise: f64 = 0.0;
        /// What an expert's score loses, 0 to 100, per fair share that it lately had too much; couples requests, 0 is off
        #[arg(long, env = "MOESAIC_OVERLOAD_DECAY")]
        overload_decay: f64 = 0.0;
        /// Keep a token's first experts whose weights reach this share, 0.001 to 1, which changes outputs; `moe.top_p` overrides it
        #[arg(long, env = "MOESAIC_EXPERT_TOP_P")]
        expert_top_p: f64 = 1.0;
        /// Serve /metrics without an API key
        #[arg(long, env = "MOESAIC_METRICS_PUBLIC", num_args = 0..=1, require_equals = true, hide_possible_values = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
        metrics_public: bool = false;
        /// Largest request body, in bytes or with a suffix (8MiB)
        #[arg(long, env = "MOESAIC_MAX_BODY_BYTES")]
        max_body_bytes: ByteSize = ByteSize(8 << 20);
        /// Open connections, 1 to 65536; further ones wait in the listen queue
        #[arg(long, env = "MOESAIC_MAX_CONNECTIONS")]
        max_connections: usize = 4096;
        /// Seconds a request may take from its arrival to its last token
        #[arg(long, env = "MOESAIC_REQUEST_TIMEOUT")]
        request_timeout: Seconds = Seconds(600.0);
        /// Seconds that running requests get to finish after SIGTERM or SIGINT
        #[arg(long, env = "MOESAIC_SHUTDOWN_TIMEOUT")]
        shutdown_timeout: Seconds = Seconds(30.0);
        /// Seconds of silence after which a stream gets a comment line that keeps proxies from closing it
        #[arg(long, env = "MOESAIC_KEEP_ALIVE_INTERVAL")]
        keep_alive_interval: Seconds = Seconds(15.0);
        /// Form of the log lines on stderr
        #[arg(long, env = "MOESAIC_LOG_FORMAT")]
        log_format: LogFormat = LogFormat::Text;
        /// Log filter: a level, or directives such as `info,engine=debug`
        #[arg(long, env = "MOESAIC_LOG_LEVEL")]
        log_level: String = "info".to_owned();
    }
    optional {
        /// Hugging Face folder, GGUF file or hub id; the demo model where absent
        #[arg(env = "MOESAIC_MODEL", value_name = "MODEL")]
        model: String;
        /// Branch, tag or commit of a hub model
        #[arg(long, env = "MOESAIC_REVISION")]
        revision: String;
        /// Compute threads; all cores the process may run on where not set
        #[arg(long, env = "MOESAIC_THREADS")]
        threads: usize;
        /// Longest prompt plus output in tokens; the model's own limit where not set. Fixes longrope and dynamic NTK at load
        #[arg(long, env = "MOESAIC_MAX_MODEL_LEN")]
        max_model_len: usize;
        /// Memory of the experts of a packed folder (8GiB, or 50% of their bytes); the others are read when they are needed. All where not set
        #[arg(long, env = "MOESAIC_EXPERT_MEMORY")]
        expert_memory: ExpertShare;
        /// File that `moesaic profile` or POST /v1/moe/profile wrote: which experts are hot, for --expert-policy and --expert-warmup under --expert-memory
        #[arg(long, env = "MOESAIC_EXPERT_PROFILE")]
        expert_profile: PathBuf;
        /// File with a Jinja chat template that replaces the model's own
        #[arg(long, env = "MOESAIC_CHAT_TEMPLATE")]
        chat_template: PathBuf;
        /// Bytes of the KV cache (2GiB); what --max-num-seqs full sequences need, at most 40 % of free memory, where not set; on a GPU all that is left of its share
        #[arg(long, env = "MOESAIC_KV_CACHE_MEMORY")]
        kv_cache_memory: ByteSize;
        /// Limit on the tokens of an expert in a step, in even shares of it, 0.01 to 1000; couples requests, none where not set
        #[arg(long, env = "MOESAIC_CAPACITY_FACTOR")]
        capacity_factor: f64;
        /// Deepest tier of the cache of deterministic answers; where not set, memory and each tier that has its setting below
        #[arg(long, env = "MOESAIC_OUTPUT_CACHE")]
        output_cache: DeepestTier;
        /// Deepest tier that keeps blocks of prompts beyond the KV cache; where not set, each tier that has its setting
        #[arg(long, env = "MOESAIC_KV_TIER")]
        kv_tier: DeepestTier;
        /// Folder for cached values, which outlive the server
        #[arg(long, env = "MOESAIC_CACHE_DIR")]
        cache_dir: PathBuf;
        /// Redis that shares cached values among servers: redis://, rediss://, unix:// or redis+cluster://HOST:PORT,HOST:PORT
        #[arg(long, env = "MOESAIC_REDIS_URL", hide_env_values = true)]
        redis_url: Secret;
        /// File with the certificates, as PEM, that may vouch for a Redis over TLS; those that the system trusts where not set
        #[arg(long, env = "MOESAIC_REDIS_CA_FILE")]
        redis_ca_file: PathBuf;
        /// Key, beside the API keys, that /v1/cache and /v1/moe/profile want as `Authorization: Bearer KEY`; closed where not set
        #[arg(long, env = "MOESAIC_ADMIN_KEY", hide_env_values = true)]
        admin_key: Secret;
        /// File with one API key per line
        #[arg(long, env = "MOESAIC_API_KEY_FILE")]
        api_key_file: PathBuf;
    }
    lists {
        /// Name that requests call the model by; repeatable, the first one is the name in answers
        #[arg(long, env = "MOESAIC_SERVED_MODEL_NAME")]
        served_model_name: String;
        /// API key that requests must carry as `Authorization: Bearer KEY`; repeatable
        #[arg(long, env = "MOESAIC_API_KEY", hide_env_values = true)]
        api_key: Secret;
        /// Origin that browsers may call from (`*` for any); repeatable, CORS is off where none is given
        #[arg(long, env = "MOESAIC_ALLOWED_ORIGINS")]
        allowed_origins: String;
    }
}

/// Refuses a number outside a range, which `allowed` says in words.
fn in_range(
    setting: &'static str,
    value: f64,
    (range, allowed): (RangeInclusive<f64>, &'static str),
) -> Result<(), ConfigError> {
    match range.contains(&value) {
        true => Ok(()),
        false => Err(ConfigError::OutOfRange { setting, value: value.to_string(), allowed }),
    }
}

/// Environment variables beside those of the settings table.
const OTHER_VARIABLES: [&str; 1] = ["MOESAIC_CONFIG"];

impl Config {
    /// Resolves default < file < environment < flag; `typed` holds flags over environment already.
    ///
    /// # Errors
    /// An unreadable or invalid file, an unknown key, a value out of its range.
    pub fn resolve(typed: Settings, file: Option<&Path>) -> Result<Self, ConfigError> {
        let file_layer = match file {
            Some(path) => read_file(path)?,
            None => Settings::default(),
        };
        let mut config = typed.over(file_layer).over_defaults();
        if let Some(path) = config.api_key_file.clone() {
            config.api_key.extend(read_keys(&path)?);
        }
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML, secrets redacted.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("the configuration is plain tables and values")
    }

    fn check(&self) -> Result<(), ConfigError> {
        let ranges: [(&'static str, usize, bool, &'static str); 5] = [
            (
                "block_size",
                self.block_size,
                self.block_size.is_power_of_two() && self.block_size <= 256,
                "powers of two from 1 to 256",
            ),
            ("max_num_seqs", self.max_num_seqs, (1..=65_536).contains(&self.max_num_seqs), "1 to 65536"),
            (
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                (1..=1 << 20).contains(&self.max_num_batched_tokens),
                "1 to 1048576",
            ),
            ("max_queue", self.max_queue, (1..=1 << 20).contains(&self.max_queue), "1 to 1048576"),
            ("max_connections", self.max_connections, (1..=65_536).contains(&self.max_connections), "1 to 65536"),
        ];
        for (setting, value, ok, allowed) in ranges {
            if !ok {
                return Err(ConfigError::OutOfRange { setting, value: value.to_string(), allowed });
            }
        }
        self.check_other_limits()
    }

    fn check_other_limits(&self) -> Result<(), ConfigError> {
        let out_of_range = |setting, value: String, allowed| Err(ConfigError::OutOfRange { setting, value, allowed });
        if self.batch_timeout_ms > 100 {
            return out_of_range("batch_timeout_ms", self.batch_timeout_ms.to_string(), "0 to 100");
        }
        if self.threads.is_some_and(|threads| !(1..=1024).contains(&threads)) {
            return out_of_range("threads", format!("{}", self.threads.unwrap_or(0)), "1 to 1024");
        }
        if self.max_model_len == Some(0) {
            return out_of_range("max_model_len", "0".to_owned(), "1 and up");
        }
        if self.max_body_bytes.0 == 0 || self.max_body_bytes.0 > 1 << 30 {
            return out_of_range("max_body_bytes", self.max_body_bytes.to_string(), "1 to 1GiB");
        }
        if let Some(name) = self.served_model_name.iter().find(|name| name.trim().is_empty()) {
            return out_of_range("served_model_name", format!("`{name}`"), "names that are not blank");
        }
        if self.api_key.iter().any(|key| !key.is_visible_ascii()) {
            return out_of_range("api_key", "***".to_owned(), "keys of visible ASCII characters, at least one");
        }
        self.check_caches()?;
        self.check_experts()?;
        self.check_routing()?;
        in_range("gpu_memory_utilization", self.gpu_memory_utilization, (0.05..=1.0, "0.05 to 1"))?;
        for (setting, seconds) in [
            ("request_timeout", self.request_timeout),
            ("keep_alive_interval", self.keep_alive_interval),
            ("kv_tier_timeout", self.kv_tier_timeout),
        ] {
            if seconds.0 <= 0.0 {
                return out_of_range(setting, seconds.to_string(), "more than 0 seconds");
            }
        }
        Ok(())
    }
}

impl Config {
    fn check_experts(&self) -> Result<(), ConfigError> {
        let missing = |setting, wanted_by| Err(ConfigError::Missing { setting, wanted_by });
        match &self.expert_profile {
            None if self.expert_policy == PolicyType::Pinned => missing("expert_profile", "expert_policy"),
            None if self.expert_warmup == WarmupType::Hot => missing("expert_profile", "expert_warmup"),
            _ => Ok(()),
        }
    }

    fn check_caches(&self) -> Result<(), ConfigError> {
        let out_of_range = |setting, value: String, allowed| Err(ConfigError::OutOfRange { setting, value, allowed });
        for (depth, wanted_by) in [(self.output_cache, "output_cache"), (self.kv_tier, "kv_tier")] {
            let missing = |setting| Err(ConfigError::Missing { setting, wanted_by });
            match depth {
                Some(DeepestTier::Disk) if self.cache_dir.is_none() => return missing("cache_dir"),
                Some(DeepestTier::Redis) if self.redis_url.is_none() => return missing("redis_url"),
                _ => {}
            }
        }
        if self.kv_tier == Some(DeepestTier::Memory) && self.kv_tier_memory.0 == 0 {
            return Err(ConfigError::Missing { setting: "kv_tier_memory", wanted_by: "kv_tier" });
        }
        if self.redis_ca_file.is_some() && self.redis_url.is_none() {
            return Err(ConfigError::Missing { setting: "redis_url", wanted_by: "redis_ca_file" });
        }
        if !(1..=10_000).contains(&self.cache_timeout_ms) {
            return out_of_range("cache_timeout_ms", self.cache_timeout_ms.to_string(), "1 to 10000");
        }
        let lifetimes = [("output_cache_ttl", self.output_cache_ttl), ("kv_tier_ttl", self.kv_tier_ttl)];
        if let Some((setting, ttl)) = lifetimes.into_iter().find(|(_, ttl)| !(0.001..=30.0 * 86_400.0).contains(&ttl.0))
        {
            return out_of_range(setting, ttl.to_string(), "0.001 to 2592000 seconds");
        }
        if self.admin_key.as_ref().is_some_and(|key| !key.is_visible_ascii()) {
            return out_of_range("admin_key", "***".to_owned(), "keys of visible ASCII characters, at least one");
        }
        if self.admin_key.as_ref().is_some_and(|admin| self.api_key.iter().any(|key| key.expose() == admin.expose())) {
            return out_of_range("admin_key", "***".to_owned(), "keys that are no --api-key: those are for clients");
        }
        if self.cache_disk.0 == 0 {
            return out_of_range(
                "cache_disk",
                "0".to_owned(),
                "1 byte or more; without --cache-dir there is no disk tier",
            );
        }
        Ok(())
    }

    /// The deepest tier of the output cache.
    pub fn output_cache_depth(&self) -> DeepestTier {
        self.output_cache.or(self.deepest_slow_tier()).unwrap_or(DeepestTier::Memory)
    }

    /// Deepest tier for blocks of prompts.
    pub fn kv_tier_depth(&self) -> DeepestTier {
        let memory = if self.kv_tier_memory.0 > 0 { DeepestTier::Memory } else { DeepestTier::Off };
        self.kv_tier.or(self.deepest_slow_tier()).unwrap_or(memory)
    }

    /// Of those that have their setting.
    fn deepest_slow_tier(&self) -> Option<DeepestTier> {
        let disk = self.cache_dir.as_ref().map(|_| DeepestTier::Disk);
        self.redis_url.as_ref().map(|_| DeepestTier::Redis).or(disk)
    }
}

/// Refuses `MOESAIC_*` variables that no setting reads, so that a typing error cannot go unnoticed. Variables that
/// Kubernetes injects for a service named `moesaic` are let through.
///
/// # Errors
/// [`ConfigError::UnknownVariable`] for the first one.
pub fn check_environment(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let settings = SettingsCommand::command();
    let known: Vec<String> = settings
        .get_arguments()
        .filter_map(|arg| arg.get_env().map(|env| env.to_string_lossy().into_owned()))
        .chain(OTHER_VARIABLES.map(str::to_owned))
        .collect();
    for name in names {
        let injected = name.starts_with("MOESAIC_SERVICE_") || name.starts_with("MOESAIC_PORT_");
        if name.starts_with("MOESAIC_") && !injected && !known.contains(&name) {
            return Err(ConfigError::UnknownVariable { name, known: known.join(", ") });
        }
    }
    Ok(())
}

fn read_file(path: &Path) -> Result<Settings, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse_file(&text).map_err(|reason| ConfigError::File { path: path.to_owned(), reason })
}

/// Reads the settings in `text`. The reason of a failure quotes no line of the file and no value of a secret.
fn parse_file(text: &str) -> Result<Settings, String> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line_idx =
            error.span().and_then(|span| text.get(..span.start)).map_or(0, |head| head.matches('\n').count());
        format!("line {}: {}", line_idx + 1, error.message())
    })?;
    serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|error| {
        let key = error.path().to_string();
        match key.as_str() {
            "." => error.inner().message().to_owned(),
            key if key == "api_key" || key.starts_with("api_key[") => format!("`{key}`: expected a list of strings"),
            key => format!("`{key}`: {}", error.inner().message()),
        }
    })
}

fn read_keys(path: &Path) -> Result<Vec<Secret>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let keys: Vec<Secret> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| Secret(line.to_owned()))
        .collect();
    // A file without keys must not open the server to everyone.
    if keys.is_empty() { Err(ConfigError::NoKeys { path: path.to_owned() }) } else { Ok(keys) }
}

/// Kubernetes sets `MOESAIC_PORT=tcp://…` in pods beside a service named `moesaic`; say so instead of "invalid digit".
fn parse_port(text: &str) -> Result<u16, String> {
    if text.starts_with("tcp://") {
        return Err("set by Kubernetes for a service named moesaic; set `enableServiceLinks: false` in the pod".into());
    }
    text.parse().map_err(|_| "expected a number from 0 to 65535".into())
}

//! Precedence, ranges, redaction, and the drift test of the reference.

use super::*;

fn settings(toml_text: &str) -> Settings {
    toml::from_str(toml_text).unwrap()
}

#[test]
fn a_typed_value_wins_over_the_file_and_the_file_over_the_default() {
    let file = settings("port = 1\nblock_size = 32\nmax_body_bytes = \"1KiB\"\nserved_model_name = [\"a\"]");
    let typed = settings("port = 2");
    let config = typed.over(file).over_defaults();
    assert_eq!((config.port, config.block_size, config.max_num_seqs), (2, 32, 512));
    assert_eq!((config.max_body_bytes, config.served_model_name), (ByteSize(1024), vec!["a".to_owned()]));
}

#[test]
fn unknown_keys_are_refused() {
    let error = toml::from_str::<Settings>("prot = 1").unwrap_err().to_string();
    assert!(error.contains("unknown field `prot`"), "{error}");
    let check = |name: &str| check_environment(std::iter::once(name.to_owned()));
    assert!(matches!(check("MOESAIC_PROT"), Err(ConfigError::UnknownVariable { .. })));
    for allowed in ["MOESAIC_PORT", "MOESAIC_CONFIG", "MOESAIC_SERVICE_HOST", "MOESAIC_PORT_80_TCP", "HOME"] {
        check(allowed).unwrap();
    }
}

#[test]
fn values_out_of_range_name_the_setting() {
    for (text, setting) in [
        ("block_size = 24", "block_size"),
        ("batch_timeout_ms = 101", "batch_timeout_ms"),
        ("max_num_seqs = 0", "max_num_seqs"),
        ("request_timeout = 0", "request_timeout"),
        ("api_key = [\"\"]", "api_key"),
        ("threads = 0", "threads"),
        ("capacity_factor = 0.0", "capacity_factor"),
        ("capacity_factor = nan", "capacity_factor"),
        ("router_noise = -0.5", "router_noise"),
        ("overload_decay = 101", "overload_decay"),
        ("expert_top_p = 0", "expert_top_p"),
    ] {
        let error = Config::resolve(settings(text), None).unwrap_err().to_string();
        assert!(error.contains(setting), "{text}: {error}");
    }
}

#[test]
fn routing_is_changed_only_where_a_setting_says_so() {
    let options = |text| Config::resolve(settings(text), None).unwrap().routing_options();
    assert!(!options("").is_on());
    assert!(
        !options("capacity_mode = \"drop\"\nexpert_top_p = 0.5").is_on(),
        "a mode is none, a top-p is each request's"
    );
    for (text, couples) in
        [("capacity_factor = 1.25", true), ("overload_decay = 0.1", true), ("router_noise = 0.1", false)]
    {
        let options = options(text);
        assert!(options.is_on(), "{text}");
        assert_eq!(options.couples_requests(), couples, "{text}");
    }
}

#[test]
fn secrets_are_redacted_wherever_they_are_shown() {
    let config = Config::resolve(settings("api_key = [\"sk-visible\"]"), None).unwrap();
    assert_eq!(config.api_key[0].expose(), b"sk-visible");
    let shown = format!("{config:?}{}{}", config.to_toml(), serde_json::to_string(&config).unwrap());
    assert!(!shown.contains("sk-visible"), "{shown}");
}

#[test]
fn errors_in_a_file_name_the_place_and_never_quote_a_secret() {
    for (text, place) in [
        ("api_key = \"sk-visible\"", "`api_key`"),
        ("api_key = [[\"sk-visible\"]]", "`api_key[0]`"),
        ("port = 1\napi_key = [\"sk-visible]", "line 2"),
        ("api_key = [\"sk-visible\"] x", "line 1"),
        ("block_size = \"x\"", "`block_size`"),
        ("prot = 1", "unknown field `prot`"),
    ] {
        let error = parse_file(text).unwrap_err();
        assert!(error.contains(place) && !error.contains("sk-visible"), "{text}: {error}");
    }
}

#[test]
fn byte_sizes_are_read_and_written() {
    for (text, bytes, shown) in [
        ("2GiB", 2 << 30, "2GiB"),
        ("1.5KiB", 1536, "1536"),
        ("3MB", 3_000_000, "3000000"),
        ("10", 10, "10"),
        ("1e9", 1_000_000_000, "1000000000"),
        ("1024.0", 1024, "1KiB"),
        ("1.1KiB", 1126, "1126"),
        (" 4 KiB ", 4096, "4KiB"),
    ] {
        let size: ByteSize = text.parse().unwrap();
        assert_eq!((size.0, size.to_string().as_str()), (bytes, shown), "{text}");
    }
    for text in ["", "x", "-1", "1XB", "99999999999TiB", "inf", "0.5", "1.5B", "0.0001KiB"] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
}

#[test]
fn the_reference_page_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == reference(), "{} is stale: run `moesaic config-reference > docs/configuration.md`", path.display());
}

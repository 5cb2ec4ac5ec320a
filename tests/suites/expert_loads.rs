//! `/v1/moe/experts` and the gauges of balance: they count what requests were told of their experts, and nothing else.

use harness::{Request, Server};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";
const LOADS: &str = "/v1/moe/experts";

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a count: {value}"))
}

/// A greedy completion, and the experts of all its computed tokens: `[token][layer][slot]`.
fn routed(server: &Server, seed: u64, max_tokens: u64) -> Vec<Value> {
    let prompt: Vec<u64> = (0..40).map(|idx| 3 + (seed * 131 + idx * 37) % 360).collect();
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0,
        "return_routed_experts": true});
    let choice = &server.ask(PATH, &body)["choices"][0];
    [list(&choice["prompt_routed_experts"]), list(&choice["routed_experts"])].concat()
}

fn loads(server: &Server, query: &str) -> Value {
    let response = server.get(&format!("{LOADS}{query}"));
    assert_eq!(response.status, 200, "{query}: {}", response.text());
    response.json()
}

/// The matrix that these tokens make.
fn counted(tokens: &[Value], matrix: &Value) -> Vec<Vec<u64>> {
    let empty = |layer: &Value| vec![0; number(&layer["num_experts"]) as usize];
    let mut counts: Vec<Vec<u64>> = list(&matrix["layers"]).iter().map(empty).collect();
    for token in tokens {
        for (counts, experts) in counts.iter_mut().zip(list(token)) {
            list(experts).iter().for_each(|expert| counts[number(expert) as usize] += 1);
        }
    }
    counts
}

fn check_family(model: &str) {
    let server = Server::start(SERVER, model, &["--enable-prefix-caching=false"]);
    let before = loads(&server, "");
    assert_eq!((before["object"].as_str(), before["model"].as_str()), (Some("moe.experts"), Some(model)));
    let is_unused = |layer: &Value| layer["num_tokens"] == 0 && layer["gini"].is_null();
    assert!(list(&before["layers"]).iter().all(is_unused), "{before}");
    let tokens = [routed(&server, 1, 5), routed(&server, 2, 9)].concat();
    let matrix = loads(&server, "");
    let counts = counted(&tokens, &matrix);
    assert_eq!(list(&matrix["layers"]).len(), list(&tokens[0]).len(), "{model}: a row for each router");
    for (idx, (layer, counts)) in list(&matrix["layers"]).iter().zip(&counts).enumerate() {
        assert_eq!((number(&layer["layer"]), &layer["loads"]), (idx as u64, &json!(counts)), "{model}");
        assert_eq!(number(&layer["num_tokens"]), tokens.len() as u64, "{model}");
        assert_eq!(number(&layer["top_k"]), list(&tokens[0][idx]).len() as u64, "{model}");
        let shares: f64 = list(&layer["shares"]).iter().map(|share| share.as_f64().expect("a share")).sum();
        assert!((shares - 1.0).abs() < 1e-9 && layer["utilization"].is_null(), "{model}: {layer}");
    }
    // All of it was a moment ago.
    let window = loads(&server, "?window=600");
    assert_eq!((&window["layers"], &window["window"]), (&matrix["layers"], &json!(600)), "{model}");
    assert!(window["seconds"].as_f64().expect("a number") <= 600.0);
    check_metrics(&server, &counts);
}

/// The gauges say of the matrix what it says itself.
fn check_metrics(server: &Server, counts: &[Vec<u64>]) {
    let metrics = server.metrics();
    for (layer, counts) in counts.iter().enumerate() {
        let layer = layer.to_string();
        let value = |name: &str| metrics.value(name, &[("layer", &layer)]).expect("a gauge of each layer");
        let total: u64 = counts.iter().sum();
        let largest = *counts.iter().max().expect("there are experts");
        let imbalance = value("moesaic_expert_imbalance_ratio");
        assert!((imbalance - (largest * counts.len() as u64) as f64 / total as f64).abs() < 1e-9, "{imbalance}");
        assert!((0.0..1.0).contains(&value("moesaic_expert_gini")));
        assert!((0.0..=(counts.len() as f64).log2() + 1e-9).contains(&value("moesaic_router_entropy")));
        let hot = metrics.value("moesaic_expert_hot_share", &[("layer", &layer), ("rank", "1")]);
        assert_eq!(hot, Some(largest as f64 / total as f64));
        assert_eq!(metrics.value("moesaic_expert_hot_share", &[("layer", &layer), ("rank", "9")]), None);
        assert_eq!(metrics.value("moesaic_expert_utilization", &[("layer", &layer)]), None, "it has no capacity");
    }
    let is_series = |line: &&str| !line.is_empty() && !line.starts_with('#');
    let num_with = |label: &str| metrics.text().lines().filter(is_series).filter(|line| line.contains(label)).count();
    let num_others = num_with("") - num_with("layer=\"");
    // Of layers with a capacity there is one more.
    let num_by_layer = num_with("layer=\"0\"") + 1;
    assert!(num_others + 61 * num_by_layer < 2000, "{num_others} series, and {num_by_layer} of each layer");
}

#[test]
fn the_matrix_counts_what_requests_were_told() {
    // Of these, jetmoe has two routers in a layer, longcat experts that compute nothing, deepseek a layer without.
    for model in ["mixtral-base", "jetmoe-base", "longcat_flash-base", "deepseek_v2-lite"] {
        check_family(model);
    }
}

#[test]
fn tokens_from_a_cache_are_not_counted_again() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let num_tokens = |matrix: &Value| number(&matrix["layers"][0]["num_tokens"]);
    routed(&server, 1, 1);
    let first = num_tokens(&loads(&server, ""));
    routed(&server, 1, 1);
    // Two whole blocks of the prompt's 40 tokens were there.
    assert_eq!((first, num_tokens(&loads(&server, ""))), (40, 48));
}

#[test]
fn capacity_shows_as_utilization() {
    let server = Server::start(SERVER, "switch_transformers-capacity", &[]);
    let body = json!({"prompt": (0..40).map(|idx| 3 + idx * 7 % 50).collect::<Vec<u32>>(), "max_tokens": 1});
    server.ask(PATH, &body);
    let matrix = loads(&server, "");
    let used: Vec<f64> = list(&matrix["layers"]).iter().filter_map(|layer| layer["utilization"].as_f64()).collect();
    assert!(!used.is_empty() && used.iter().all(|share| (0.0..=1.0).contains(share)), "{matrix}");
    let text = server.metrics().text().to_owned();
    let num_gauges = text.lines().filter(|line| line.starts_with("moesaic_expert_utilization{")).count();
    assert_eq!(num_gauges, used.len(), "{text}");
}

#[test]
fn the_matrix_comes_as_csv_too() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    routed(&server, 1, 3);
    let matrix = loads(&server, "?format=json");
    let mut expected = String::from("layer,expert,load,share\n");
    for layer in list(&matrix["layers"]) {
        let total: u64 = list(&layer["loads"]).iter().map(number).sum();
        for (expert, load) in list(&layer["loads"]).iter().enumerate() {
            let share = number(load) as f64 / total as f64;
            expected.push_str(&format!("{},{expert},{load},{share}\n", layer["layer"]));
        }
    }
    let asked = server.get(&format!("{LOADS}?format=csv&window=60"));
    assert_eq!((asked.header("content-type"), asked.text()), (Some("text/csv; charset=utf-8"), expected.clone()));
    let accepted = server.send(&Request::get(LOADS).header("Accept", "text/csv"));
    assert_eq!((accepted.header("content-type"), accepted.text()), (Some("text/csv; charset=utf-8"), expected));
    let named = server.send(&Request::get(&format!("{LOADS}?format=json")).header("Accept", "text/csv"));
    assert_eq!(named.header("content-type"), Some("application/json"), "what the query names counts");
}

#[test]
fn queries_that_cannot_be_meant_are_refused() {
    let server = Server::start(SERVER, "mixtral-base", &["--api-key", "one"]);
    let get = |path: &str| server.send(&Request::get(path).header("Authorization", "Bearer one"));
    for (query, expected) in [
        ("window=0", "`window`: is 0 seconds, allowed are 1 to 600"),
        ("window=601", "`window`: is 601 seconds, allowed are 1 to 600"),
        ("window=-1", "`window`: `-1` is not a whole number of seconds from 1 to 600"),
        ("window=1.5", "`window`: `1.5` is not a whole number of seconds from 1 to 600"),
        ("window=abc", "`window`: `abc` is not a whole number of seconds from 1 to 600"),
        ("window=", "`window`: `` is not a whole number of seconds from 1 to 600"),
        ("window=99999999999", "`window`: `99999999999` is not a whole number of seconds from 1 to 600"),
        ("window=1&window=2", "duplicate field `window`"),
        ("format=xml", "`format`: unknown variant `xml`, expected `json` or `csv`"),
        ("windows=60", "unknown field `windows`, expected `window` or `format`"),
    ] {
        let response = get(&format!("{LOADS}?{query}"));
        let message = response.json()["error"]["message"].as_str().expect("a message").to_owned();
        assert_eq!(response.status, 400, "{query}: {message}");
        assert!(message.contains(expected), "{query}: {message}");
    }
    assert_eq!(get(LOADS).status, 200);
    assert_eq!(server.get(LOADS).status, 401, "it wants a key as others do");
}

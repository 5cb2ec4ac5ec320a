//! The arguments, and whole runs against a server that answers as told.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use serde_json::{Value, json};

use super::*;
use crate::cli::client::canned_server::{self, Reply, Request};

#[derive(Debug, Parser)]
struct Program {
    #[command(flatten)]
    args: BenchArgs,
}

fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
    Program::try_parse_from(std::iter::once("bench").chain(line.split_whitespace())).map(|program| program.args)
}

#[test]
fn arguments_have_defaults_lists_and_limits() {
    let args = parse("").unwrap();
    assert_eq!((args.server.url.as_str(), args.concurrency.as_slice()), ("http://127.0.0.1:8000", &[1][..]));
    assert_eq!((args.prompt_tokens, args.output_tokens, args.warmup), (128, 64, 1));
    let args = parse("--concurrency 1,4,16 --endpoint chat --stream never --seed 7 --json -").unwrap();
    assert_eq!((args.concurrency, args.endpoint, args.stream), (vec![1, 4, 16], Endpoint::Chat, Streaming::Never));
    for wrong in ["--concurrency 0", "--concurrency 1,x", "--num-requests 0", "--output-tokens 0", "--stream maybe"] {
        assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
    }
}

#[test]
fn keys_are_not_part_of_the_command() {
    let words = ["/some/path/moesaic", "bench", "--api-key", "s3cret", "--api-key=s3cret", "--seed", "1"];
    let command = command_line(words.iter().map(OsString::from));
    assert_eq!(command, "moesaic bench --api-key *** --api-key=*** --seed 1");
}

/// `num_tokens` chunks of a completion, and the usage.
fn completion(num_tokens: usize, with_ids: bool) -> Reply {
    let choice = |idx: usize| match with_ids {
        true => json!({"choices": [{"index": 0, "text": "w", "token_ids": [idx]}], "usage": null}),
        false => json!({"choices": [{"index": 0, "text": "w"}]}),
    };
    let opening = json!({"choices": [{"index": 0, "text": "", "prompt_token_ids": [1, 2, 3]}]});
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": num_tokens}});
    let mut events = vec![opening];
    events.extend((0..num_tokens).map(choice));
    events.push(usage);
    Reply::events(&events)
}

fn measured(args: &str, answer: impl Fn(Request) -> Reply + Send + Sync + 'static) -> anyhow::Result<(Report, String)> {
    let address = canned_server::start(answer);
    let mut table = Vec::new();
    let report = measure(&parse(&format!("--url http://{address} {args}")).unwrap(), &mut table)?;
    Ok((report, String::from_utf8(table).unwrap()))
}

fn model_list() -> Reply {
    Reply::json(200, json!({"object": "list", "data": [{"id": "tiny"}]}))
}

#[test]
fn tokens_are_counted_exactly_and_failures_by_kind() {
    let num_completions = AtomicUsize::new(0);
    let answer = move |request: Request| match request.path.as_str() {
        "/v1/models" => model_list(),
        "/tokenize" => Reply::json(200, json!({"count": 100, "tokens": (50..150).collect::<Vec<u32>>()})),
        "/v1/completions" => {
            let body = &request.body;
            let ids: Vec<u64> = body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
            assert!(ids.len() == 11 && ids.iter().all(|id| (50..150).contains(id)));
            assert_eq!(
                (&body["model"], &body["ignore_eos"], &body["min_tokens"]),
                (&json!("tiny"), &json!(true), &json!(5))
            );
            assert_eq!(request.authorization.as_deref(), Some("Bearer k"));
            // The first is the warm-up.
            match num_completions.fetch_add(1, Ordering::SeqCst) {
                3 => Reply::json(503, json!({"error": {"message": "the queue is full"}})),
                _ => completion(5, true),
            }
        }
        path => panic!("{path}"),
    };
    let args = "--concurrency 1,3 --num-requests 8 --prompt-tokens 11 --output-tokens 5 --api-key k";
    let (report, table) = measured(args, answer).unwrap();
    assert_eq!((report.model.as_str(), report.prompts, report.runs.len()), ("tiny", prompts::PromptKind::TokenIds, 2));
    let [first, second] = &report.runs[..] else { panic!("two runs") };
    assert_eq!((first.num_requests, first.num_succeeded, first.num_output_tokens), (8, 7, 35));
    assert_eq!((first.num_prompt_tokens, first.num_other_lengths), (Some(77), 0));
    assert_eq!((first.errors.len(), first.errors["http_503"].count), (1, 1));
    assert!(first.errors["http_503"].example.contains("the queue is full"));
    assert_eq!((second.num_succeeded, second.num_output_tokens, second.errors.len()), (8, 40, 0));
    assert_eq!(first.tokens_counted_by, Some(load::CountedBy::TokenIds));
    assert!(first.ttft_ms.is_some() && first.tpot_ms.is_some() && first.itl_ms.is_some());
    assert!(table.contains("counted by token ids") && table.contains("1 x http_503"), "{table}");
    let json: Value = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["runs"][1]["concurrency"], &json["endpoint"]), (&json!(3), &json!("completions")));
    assert!(json["machine"]["memory_bytes"].as_u64() > Some(0));
}

#[test]
fn plain_servers_get_words_and_are_taken_at_their_word() {
    let prompts = Mutex::new(Vec::new());
    let answer = move |request: Request| match request.path.as_str() {
        "/v1/completions" => {
            let prompt = request.body["prompt"].as_str().unwrap().to_owned();
            assert_eq!(prompt.split(' ').count(), 9);
            let mut prompts = prompts.lock().unwrap();
            assert!(!prompts.contains(&prompt), "prompts are fresh");
            prompts.push(prompt);
            completion(4, false)
        }
        _ => Reply::json(404, json!({"detail": "Not Found"})),
    };
    let args = "--model m --concurrency 2 --num-requests 6 --prompt-tokens 9 --output-tokens 5";
    let (report, table) = measured(args, answer).unwrap();
    let run = &report.runs[0];
    assert_eq!((run.tokens_counted_by, run.num_output_tokens), (Some(load::CountedBy::Usage), 24));
    assert_eq!((run.num_prompt_tokens, run.num_other_lengths, run.num_succeeded), (Some(54), 6, 6));
    assert!(table.contains("6 answers did not have 5 tokens"), "{table}");
}

#[test]
fn whole_chats_are_timed_from_end_to_end_only() {
    let answer = |request: Request| match request.path.as_str() {
        "/tokenize" => Reply::json(200, json!({"tokens": vec![7; 4000]})),
        "/v1/chat/completions" => {
            let content = request.body["messages"][0]["content"].as_str().unwrap();
            assert_eq!((content.split(' ').count(), &request.body["stream"]), (5, &json!(false)));
            let usage = json!({"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15});
            Reply::json(200, json!({"choices": [{"message": {"content": "a b c"}}], "usage": usage}))
        }
        path => panic!("{path}"),
    };
    let args = "--model m --endpoint chat --stream never --num-requests 2 --prompt-tokens 10 --output-tokens 3";
    let (report, _) = measured(args, answer).unwrap();
    let run = &report.runs[0];
    assert_eq!((run.num_succeeded, run.num_output_tokens, run.num_prompt_tokens), (2, 6, Some(24)));
    assert!(run.ttft_ms.is_none() && run.e2e_ms.is_some());
}

#[test]
fn broken_streams_are_failures_of_their_own_kinds() {
    let num_completions = AtomicUsize::new(0);
    let answer = move |request: Request| match request.path.as_str() {
        "/v1/completions" => match num_completions.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::events(&[json!({"error": {"message": "device lost", "code": 500}})]),
            1 => Reply { pieces: vec!["data: {\"choices\": []}\n\n".to_owned()], ..completion(1, true) },
            2 => Reply::events(&[json!({"choices": 1})]),
            3 => Reply::events(&[json!({"choices": [{"index": 0, "text": "a"}]})]),
            _ => completion(1, true),
        },
        _ => Reply::json(404, json!({})),
    };
    let (report, _) = measured("--model m --num-requests 5 --warmup 0 --output-tokens 1", answer).unwrap();
    let run = &report.runs[0];
    let counts: Vec<(&str, usize)> = run.errors.iter().map(|(kind, error)| (kind.as_str(), error.count)).collect();
    assert_eq!(counts, [("bad_answer", 2), ("cut_off", 1), ("stream_error", 1)]);
    assert_eq!((run.errors["stream_error"].example.as_str(), run.num_succeeded), ("device lost", 1));
}

#[test]
fn a_server_that_cannot_be_used_is_an_error_at_once() {
    let error = measured("", |_| Reply::json(401, json!({"error": {"message": "wrong key"}}))).unwrap_err();
    assert!(error.to_string().starts_with("wrong key (status 401"), "{error}");
    let refused = |request: Request| match request.path.as_str() {
        "/v1/completions" => Reply::json(400, json!({"error": {"message": "prompt is too long"}})),
        _ => Reply::json(404, json!({})),
    };
    let error = measured("--model m", refused).unwrap_err();
    assert!(format!("{error:#}").starts_with("the warm-up failed: prompt is too long"), "{error:#}");
}

#[test]
fn failed_requests_fail_the_command_after_its_report() {
    let num_completions = AtomicUsize::new(0);
    let address = canned_server::start(move |request| match request.path.as_str() {
        "/v1/completions" if num_completions.fetch_add(1, Ordering::SeqCst) == 0 => Reply::json(500, json!({})),
        "/v1/completions" => completion(1, true),
        _ => Reply::json(404, json!({})),
    });
    let path = std::env::temp_dir().join(format!("moesaic-bench-{}.json", std::process::id()));
    let line = format!(
        "--url http://{address} --model m --num-requests 3 --warmup 0 --output-tokens 1 --json {}",
        path.display()
    );
    let error = run(parse(&line).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "1 of 3 requests failed");
    let report: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        (&report["runs"][0]["num_succeeded"], &report["runs"][0]["errors"]["http_500"]["count"]),
        (&json!(2), &json!(1))
    );
}

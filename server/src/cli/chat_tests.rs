//! Conversations with a server that answers as told.

use std::net::SocketAddr;

use clap::Parser;

use super::*;
use crate::cli::client::canned_server::{self, Reply, Request};

#[derive(Debug, Parser)]
struct Program {
    #[command(flatten)]
    args: ChatArgs,
}

fn conversation(address: SocketAddr, args: &[&str]) -> Conversation {
    let url = format!("http://{address}");
    let words = ["chat", "--url", &url, "--model", "m"].into_iter().chain(args.iter().copied());
    Conversation::new(Program::try_parse_from(words).unwrap().args).unwrap()
}

/// Answers with the contents it was sent; the question `fail` fails.
fn echo(request: Request) -> Reply {
    assert_eq!((request.path.as_str(), &request.body["max_tokens"]), ("/v1/chat/completions", &json!(5)));
    let messages = request.body["messages"].as_array().unwrap();
    let contents: Vec<&str> = messages.iter().map(|message| message["content"].as_str().unwrap()).collect();
    if contents.last() == Some(&"fail") {
        return Reply::json(400, json!({"error": {"message": "no such thing"}}));
    }
    let delta = |content: &str| json!({"choices": [{"delta": {"content": content}}]});
    Reply::events(&[
        json!({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        delta(&contents.join("|")),
        delta("\u{1b}!"),
    ])
}

#[test]
fn answers_are_printed_and_remembered_and_failures_forgotten() {
    let mut conversation = conversation(canned_server::start(echo), &["--system", "s", "--max-tokens", "5"]);
    let mut out = Vec::new();
    conversation.say("one".to_owned(), &mut out).unwrap();
    let error = conversation.say("fail".to_owned(), &mut out).unwrap_err();
    assert!(error.is::<ClientError>() && error.to_string().starts_with("no such thing"), "{error}");
    conversation.say("two".to_owned(), &mut out).unwrap();
    assert_eq!(String::from_utf8(out).unwrap(), "s|one!\ns|one|s|one\u{1b}!|two!\n".replace('\u{1b}', ""));
    assert_eq!(conversation.messages.len(), 5);
}

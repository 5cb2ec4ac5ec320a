//! `moesaic chat`: a conversation in the terminal with any server that speaks the OpenAI API.

use std::io::{self, BufRead as _, IsTerminal as _, Write};

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError, ServerArgs, printable};

#[derive(Args, Debug)]
pub struct ChatArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    /// System message at the start of the conversation
    #[arg(long)]
    pub system: Option<String>,
    /// Sampling temperature [default: the server's]
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Longest answer in tokens [default: the server's]
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Ask this, print the answer, and end; without it, lines are read until the end of input
    pub prompt: Option<String>,
}

struct Conversation {
    client: Client,
    model: String,
    temperature: Option<f32>,
    max_tokens: Option<u32>,
    messages: Vec<Value>,
}

/// # Errors
/// A server that cannot be used, a terminal that is gone; failed answers, unless they were to lines typed at a terminal.
pub fn run(args: ChatArgs) -> anyhow::Result<()> {
    let prompt = args.prompt.clone();
    let mut conversation = Conversation::new(args)?;
    let mut out = io::stdout().lock();
    match prompt {
        Some(prompt) => conversation.say(prompt, &mut out),
        None => conversation.hold(&mut out),
    }
}

impl Conversation {
    fn new(args: ChatArgs) -> Result<Self, ClientError> {
        let client = Client::new(&args.server, 1)?;
        let model = match args.server.model {
            Some(model) => model,
            None => client.first_model()?,
        };
        let messages = args.system.map(|system| json!({"role": "system", "content": system})).into_iter().collect();
        Ok(Self { client, model, temperature: args.temperature, max_tokens: args.max_tokens, messages })
    }

    /// Lines from stdin until it ends. A failed answer is told, and its question forgotten; where nobody was there to read that, it is an
    /// error in the end.
    fn hold(&mut self, out: &mut dyn Write) -> anyhow::Result<()> {
        let shows_prompt = io::stdin().is_terminal();
        let (mut num_asked, mut num_failed) = (0, 0);
        if shows_prompt {
            writeln!(out, "{} on {}; Ctrl-D or Ctrl-C ends\n", self.model, self.client.base_url())?;
        }
        let mut lines = io::stdin().lock().lines();
        loop {
            if shows_prompt {
                write!(out, "> ")?;
                out.flush()?;
            }
            let Some(line) = lines.next().transpose()? else { break };
            if line.trim().is_empty() {
                continue;
            }
            num_asked += 1;
            if let Err(error) = self.say(line, out) {
                if !error.is::<ClientError>() {
                    return Err(error);
                }
                num_failed += 1;
                eprintln!("error: {error}");
            }
        }
        if shows_prompt {
            writeln!(out)?;
        } else if num_failed > 0 {
            anyhow::bail!("{num_failed} of {num_asked} answers failed");
        }
        Ok(())
    }

    /// Sends `content` and prints the answer as it comes. Where it fails, the conversation stays as it was.
    fn say(&mut self, content: String, out: &mut dyn Write) -> anyhow::Result<()> {
        self.messages.push(json!({"role": "user", "content": content}));
        match self.answer(out) {
            Ok(answer) => self.messages.push(json!({"role": "assistant", "content": answer})),
            Err(error) => {
                self.messages.pop();
                return Err(error);
            }
        }
        Ok(())
    }

    fn answer(&self, out: &mut dyn Write) -> anyhow::Result<String> {
        let mut body = json!({"model": self.model, "messages": self.messages, "stream": true});
        if let Some(temperature) = self.temperature {
            body["temperature"] = temperature.into();
        }
        if let Some(max_tokens) = self.max_tokens {
            body["max_tokens"] = max_tokens.into();
        }
        let mut chunks = self.client.post_streaming("/v1/chat/completions", &body)?;
        let mut answer = String::new();
        loop {
            let chunk = chunks.next_chunk();
            if !matches!(chunk, Ok(Some(_))) {
                writeln!(out)?;
            }
            let Some(chunk) = chunk? else { break };
            for choice in &chunk.choices {
                write!(out, "{}", printable(choice.content()))?;
                answer.push_str(choice.content());
            }
            out.flush()?;
        }
        chunks.finish();
        Ok(answer)
    }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;

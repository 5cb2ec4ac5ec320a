//! Messages to a prompt, through the model's own Jinja template rendered as Hugging Face renders it.

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
};

use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};
use serde_json::{Map, Value as Json};

use super::{
    TextError, TokenizerFiles, python_json, python_time,
    tokenizer_config::{MAX_SETTINGS_BYTES, SpecialTokens, TokenizerConfig, read_optional, read_text},
};

/// The names that Hugging Face gives meaning: the template, and the one for requests with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Marks the end of the final message's content, so that the prompt can be cut there. Hugging Face's own text: a template
/// that trims content trims the space.
const FINAL_MESSAGE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Instructions that one rendering may take: thousands for each message of the longest conversation. Templates come with
/// checkpoints, and one that loops for ever must not hold a core.
const MAX_INSTRUCTIONS: u64 = 20_000_000;

/// Bytes that one rendering may write: far more than any context holds.
const MAX_PROMPT_BYTES: usize = 64 << 20;

/// What a template renders.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// An array of messages, with string or list content as the template expects it.
    pub messages: &'a Json,
    /// An array of tool definitions.
    pub tools: Option<&'a Json>,
    /// Ends the prompt with the opening of an assistant message.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message, which the model then continues.
    pub continue_final_message: bool,
    /// Further variables (`chat_template_kwargs`). They may shadow special tokens, but none of the fields above.
    pub extra: &'a Map<String, Json>,
}

/// A model's compiled chat template, or two: with and without tools.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_template: bool,
    special_tokens: SpecialTokens,
    /// Kimi's tokenizer sorts the keys of tool definitions before it renders them.
    sorts_tools: bool,
}

/// The error behind `raise_exception`, found again at the end of a chain of template errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// The template of `override_file`, else of `chat_template.jinja`, else of `tokenizer_config.json`; `None` where there
    /// is none of them.
    ///
    /// Errors: a file cannot be read, a template does not compile, or a list of templates has no `default`.
    pub fn load(model_dir: &Path, override_file: Option<&Path>) -> Result<Option<Self>, TextError> {
        let config = TokenizerConfig::load(model_dir)?;
        match find_sources(model_dir, override_file, &config)? {
            None => Ok(None),
            Some(sources) => Self::new(sources, config).map(Some),
        }
    }

    /// The template of `override_file`, else of a GGUF file.
    ///
    /// Errors: as [`Self::load`].
    pub fn from_gguf(files: &TokenizerFiles, override_file: Option<&Path>) -> Result<Option<Self>, TextError> {
        let config = TokenizerConfig::of_gguf(files)?;
        let sources = match override_file {
            Some(path) => Some(own_source(path)?),
            None => config_sources(&config)?,
        };
        sources.map(|sources| Self::new(sources, config)).transpose()
    }

    fn new((path, sources): Sources, config: TokenizerConfig) -> Result<Self, TextError> {
        let mut environment = environment();
        for (name, source) in &sources {
            environment
                .add_template_owned(name.clone(), rewrite_generation_tags(source))
                .map_err(|error| TextError::TemplateSyntax { path: path.clone(), message: describe(&error) })?;
        }
        let has = |wanted: &str| sources.iter().any(|(name, _)| name == wanted);
        if !has(DEFAULT) {
            let names = sources.into_iter().map(|(name, _)| name).collect();
            return Err(TextError::NoDefaultTemplate { path, names });
        }
        Ok(Self {
            environment,
            has_tool_template: has(TOOL_USE),
            sorts_tools: config.tokenizer_class() == "TikTokenTokenizer",
            special_tokens: config.special_tokens,
        })
    }

    /// The prompt of a conversation.
    ///
    /// Errors: the template raises an exception or cannot render these messages, or the final message cannot be continued.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        if !input.continue_final_message {
            return self.render_messages(input);
        }
        if input.add_generation_prompt {
            return Err(TextError::FinalMessageAndPrompt);
        }
        let mut messages = input.messages.clone();
        let content = final_text(&mut messages).ok_or(TextError::FinalMessageWithoutText)?;
        let original = content.clone();
        content.push_str(FINAL_MESSAGE_MARK);
        let rendered = self.render_messages(&ChatInput { messages: &messages, ..*input })?;
        cut_at_mark(rendered, &original)
    }

    fn render_messages(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        let name = if input.tools.is_some() && self.has_tool_template { TOOL_USE } else { DEFAULT };
        let template = self.environment.get_template(name).expect("added while loading");
        let mut prompt = BoundedText(Vec::new());
        let rendered = template.render_captured_to(self.variables(input), &mut prompt).map(drop);
        rendered.map_err(|error| match (error.kind(), raised(&error)) {
            (_, Some(message)) => TextError::TemplateRaised(message),
            (ErrorKind::OutOfFuel, _) => TextError::TemplateRender(format!("it takes over {MAX_INSTRUCTIONS} steps")),
            (ErrorKind::WriteFailure, _) => {
                TextError::TemplateRender(format!("it writes over {MAX_PROMPT_BYTES} bytes"))
            }
            _ => TextError::TemplateRender(describe(&error)),
        })?;
        Ok(String::from_utf8(prompt.0).expect("templates write whole strings"))
    }

    /// Later variables shadow earlier ones of the same name.
    fn variables(&self, input: &ChatInput<'_>) -> Value {
        let tools = input.tools.map(|tools| if self.sorts_tools { sorted(tools) } else { tools.clone() });
        let mut variables: Map<String, Json> = Map::new();
        for (role, token) in &self.special_tokens.by_role {
            variables.insert((*role).to_owned(), token.as_str().into());
        }
        if !self.special_tokens.additional.is_empty() {
            variables.insert("additional_special_tokens".to_owned(), self.special_tokens.additional.clone().into());
        }
        variables.insert("documents".to_owned(), Json::Null);
        variables.extend(input.extra.clone());
        variables.insert("messages".to_owned(), input.messages.clone());
        variables.insert("tools".to_owned(), tools.unwrap_or_default());
        variables.insert("add_generation_prompt".to_owned(), input.add_generation_prompt.into());
        Value::from(Serde(variables))
    }
}

/// The text of a rendering, up to [`MAX_PROMPT_BYTES`].
struct BoundedText(Vec<u8>);

impl io::Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_PROMPT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where templates come from, and their names and sources; one without a name is the default.
type Sources = (PathBuf, Vec<(String, String)>);

fn find_sources(
    model_dir: &Path,
    override_file: Option<&Path>,
    config: &TokenizerConfig,
) -> Result<Option<Sources>, TextError> {
    if let Some(path) = override_file {
        return own_source(path).map(Some);
    }
    let path = model_dir.join("chat_template.jinja");
    if let Some(source) = read_optional(&path, MAX_SETTINGS_BYTES)? {
        return Ok(Some((path, vec![(DEFAULT.to_owned(), source)])));
    }
    config_sources(config)
}

/// The template that somebody chose.
fn own_source(path: &Path) -> Result<Sources, TextError> {
    let source = read_text(path, MAX_SETTINGS_BYTES)?;
    Ok((path.to_owned(), vec![(DEFAULT.to_owned(), source)]))
}

/// What `tokenizer_config.json`, or a GGUF file, holds.
fn config_sources(config: &TokenizerConfig) -> Result<Option<Sources>, TextError> {
    let path = &config.path;
    let invalid = || TextError::invalid(path, "chat_template is neither a string nor a list of {name, template}");
    let sources = match config.chat_template() {
        None => return Ok(None),
        Some(Json::String(source)) => vec![(DEFAULT.to_owned(), source.clone())],
        Some(Json::Array(entries)) => entries
            .iter()
            .map(|entry| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned())))
            .collect::<Option<_>>()
            .ok_or_else(invalid)?,
        Some(_) => return Err(invalid()),
    };
    Ok(Some((path.clone(), sources)))
}

/// Jinja as `apply_chat_template` of transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("default delimiters are distinct"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_json::tojson);
    environment.add_filter("e", escape);
    environment.add_filter("escape", escape);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |format: &str| {
        python_time::strftime(format, &jiff::Zoned::now())
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
    });
    environment
}

/// Escapes HTML when a template asks for it, which minijinja does only where it escapes everything.
fn escape(text: &Value) -> String {
    let text = text.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

/// Jinja2's undefined value has no items; minijinja's has no length.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    let message = || format!("object of type {} has no length", value.kind());
    value.len().ok_or_else(|| Error::new(ErrorKind::InvalidOperation, message()))
}

/// None is iterable to minijinja and not to Python, where templates ask this of absent content.
fn is_iterable(value: &Value) -> bool {
    value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
}

/// To Python, whatever has a length and items: strings and mappings, too.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || value.len().is_some()
}

/// The message of `raise_exception`, if that is what went wrong.
fn raised(error: &Error) -> Option<String> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

fn describe(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}

/// Training marks assistant text with `{% generation %}`, a tag that changes nothing in a prompt: it becomes `{% if true %}`.
fn rewrite_generation_tags(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        rewritten.push_str(before);
        let (length, replacement) = generation_tag(tag).unwrap_or_default();
        rewritten.push_str(&replacement);
        rest = &tag[length..];
    }
    rewritten.push_str(rest);
    rewritten
}

/// The length of a generation tag after its `{%` and what replaces it; whitespace control stays.
fn generation_tag(tag: &str) -> Option<(usize, String)> {
    let end = tag.find("%}")?;
    let inner = &tag[..end];
    let name = inner.trim_matches(['-', '+']).trim();
    let replacement = match name {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return None,
    };
    Some((end, inner.replacen(name, &format!(" {replacement} "), 1)))
}

/// The text of the last message, or the last text part of it.
fn final_text(messages: &mut Json) -> Option<&mut String> {
    let content = messages.as_array_mut()?.last_mut()?.get_mut("content")?;
    let text = match content {
        Json::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text"))?,
        text => text,
    };
    match text {
        Json::String(text) => Some(text),
        _ => None,
    }
}

/// Ends `rendered` where the marked content ends.
fn cut_at_mark(mut rendered: String, content: &str) -> Result<String, TextError> {
    let mark = rendered.rfind(FINAL_MESSAGE_MARK.trim_end()).ok_or(TextError::FinalMessageLost)?;
    if !rendered.contains(content.trim()) {
        return Err(TextError::FinalMessageLost);
    }
    // A template that trims content took the mark's space away, and would have trimmed the end of the content, too.
    let trims = !rendered[mark..].starts_with(FINAL_MESSAGE_MARK);
    rendered.truncate(mark);
    if trims {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}

fn sorted(value: &Json) -> Json {
    match value {
        Json::Object(map) => {
            let mut entries: Vec<(&String, &Json)> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            Json::Object(entries.into_iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        Json::Array(items) => Json::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

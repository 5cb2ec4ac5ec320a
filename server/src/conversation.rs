//! Messages as requests carry them to messages as chat templates expect them, and from there to a prompt.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::chat::{ChatMessage, ChatOptions, MessageContent};
use crate::text::{ChatInput, ChatTemplate, EncodeOptions, TextError, Tokenizer};

const MAX_MESSAGES: usize = 4096;

/// A conversation in the form that templates take, with what else they are given.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    messages: Value,
    tools: Option<Value>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    add_special_tokens: bool,
    variables: Map<String, Value>,
}

impl Conversation {
    /// Checks the messages and brings them in form: parts become text, tool arguments objects.
    ///
    /// # Errors
    /// Missing or malformed messages, content that is not text, a template in the request.
    pub fn new(chat: &ChatOptions) -> Result<Self, ApiError> {
        if chat.chat_template.is_some() {
            let hint = "templates of requests are not trusted; start the server with --chat-template".to_owned();
            return Err(ApiError::Unsupported { param: "chat_template".to_owned(), hint });
        }
        let messages = chat.messages.as_deref().unwrap_or_default();
        if messages.is_empty() || messages.len() > MAX_MESSAGES {
            let reason = format!("has {} messages, allowed are 1 to {MAX_MESSAGES}", messages.len());
            return Err(ApiError::invalid("messages", reason));
        }
        let messages: Vec<Value> =
            messages.iter().enumerate().map(|(position, value)| message(position, value)).collect::<Result<_, _>>()?;
        let tools = chat.tools.clone().filter(|tools| tools.as_array().is_none_or(|tools| !tools.is_empty()));
        if tools.as_ref().is_some_and(|tools| !tools.is_array()) {
            return Err(ApiError::invalid("tools", "must be a list"));
        }
        let mut variables = chat.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(documents) = &chat.documents {
            variables.entry("documents").or_insert_with(|| documents.clone());
        }
        if let Some(effort) = &chat.reasoning_effort {
            variables.entry("reasoning_effort").or_insert_with(|| json!(effort));
        }
        let continue_final_message = chat.continue_final_message.unwrap_or(false);
        Ok(Self {
            messages: Value::from(messages),
            tools,
            add_generation_prompt: chat.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            add_special_tokens: chat.add_special_tokens.unwrap_or(false),
            variables,
        })
    }

    /// Renders and tokenizes.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn to_ids(&self, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<u32>, ApiError> {
        let input = ChatInput {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            extra: &self.variables,
        };
        let text = template.render(&input).map_err(|error| about_messages(&error))?;
        let options = EncodeOptions { add_special_tokens: self.add_special_tokens };
        tokenizer.encode(&text, options).map_err(|error| about_messages(&error))
    }
}

fn about_messages(error: &TextError) -> ApiError {
    ApiError::invalid("messages", error.to_string())
}

fn message(position: usize, value: &Value) -> Result<Value, ApiError> {
    let at = |field: &str| match field {
        "" | "." => format!("messages[{position}]"),
        field => format!("messages[{position}].{field}"),
    };
    let typed: ChatMessage = serde_path_to_error::deserialize(value).map_err(|error| ApiError::WrongType {
        param: Some(at(&error.path().to_string())),
        reason: error.inner().to_string(),
    })?;
    let role = match typed.role.as_str() {
        // OpenAI's newer name; templates know the older one.
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            let reason = format!("is `{other}`, allowed are system, developer, user, assistant and tool");
            return Err(ApiError::invalid(at("role"), reason));
        }
    };
    let content = content(typed.content, role, value, &at)?;
    let mut fields = value.as_object().cloned().unwrap_or_default();
    fields.insert("role".to_owned(), json!(role));
    fields.insert("content".to_owned(), content);
    if let Some(calls) = fields.get_mut("tool_calls") {
        parse_arguments(calls);
    }
    Ok(Value::Object(fields))
}

fn content(
    content: Option<MessageContent>,
    role: &str,
    message: &Value,
    at: &dyn Fn(&str) -> String,
) -> Result<Value, ApiError> {
    match content {
        Some(MessageContent::Text(text)) => Ok(json!(text)),
        // A turn that only calls tools has no text.
        None if role == "assistant" && message.get("tool_calls").is_some_and(|calls| !calls.is_null()) => {
            Ok(Value::Null)
        }
        None => Err(ApiError::invalid(at("content"), "is missing")),
        Some(MessageContent::Parts(parts)) => {
            let mut texts = Vec::with_capacity(parts.len());
            for (position, part) in parts.into_iter().enumerate() {
                let field = format!("content[{position}]");
                match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => texts.push(text),
                    ("text", None) => return Err(ApiError::invalid(at(&format!("{field}.text")), "is missing")),
                    (kind, _) => {
                        let hint = format!("the model reads text only, not parts of type `{kind}`");
                        return Err(ApiError::Unsupported { param: at(&format!("{field}.type")), hint });
                    }
                }
            }
            Ok(json!(texts.join("\n")))
        }
    }
}

/// Templates want the arguments of past calls as objects; the API has them as JSON text.
fn parse_arguments(calls: &mut Value) {
    for call in calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
        if let Some(parsed) = parsed {
            *arguments = Value::Object(parsed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(body: Value) -> Result<Conversation, ApiError> {
        Conversation::new(&serde_json::from_value(body).unwrap())
    }

    #[test]
    fn messages_are_brought_in_form() {
        let conversation = conversation(json!({"messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "extra": 1},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        ]}))
        .unwrap();
        assert_eq!(conversation.messages[0], json!({"role": "system", "content": "be brief"}));
        assert_eq!(conversation.messages[1], json!({"role": "user", "content": "a\nb", "extra": 1}));
        assert_eq!(conversation.messages[2]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert!(conversation.add_generation_prompt);
    }

    #[test]
    fn malformed_messages_name_their_place() {
        for (messages, param) in [
            (json!([]), "messages"),
            (json!(null), "messages"),
            (json!([1]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0]"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "bard", "content": "x"}]), "messages[0].role"),
            (json!([{"role": 1, "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user", "content": 1}]), "messages[0].content"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
                "messages[0].content[0].type",
            ),
        ] {
            let error = conversation(json!({ "messages": messages })).unwrap_err();
            assert_eq!((error.param(), error.status().as_u16()), (Some(param), 400), "{messages}: {error}");
        }
    }

    #[test]
    fn templates_of_requests_are_not_trusted() {
        let messages = json!([{"role": "user", "content": "x"}]);
        let error = conversation(json!({ "messages": messages, "chat_template": "{{ 1 }}" })).unwrap_err();
        assert_eq!((error.param(), error.code()), (Some("chat_template"), "unsupported_parameter"));
    }
}

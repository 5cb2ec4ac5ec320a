//! Chat templates against Python's Jinja2, where templates come from, and continuing a final message.

use serde_json::{Map, Value, json};

use super::ModelDir;
use crate::text::{ChatInput, ChatTemplate, TextError};

fn load(dir: &ModelDir) -> Result<Option<ChatTemplate>, TextError> {
    ChatTemplate::load(&dir.0, None)
}

fn from_config(name: &str, config: &Value) -> Result<Option<ChatTemplate>, TextError> {
    load(&ModelDir::new(name, &[("tokenizer_config.json", &config.to_string())]))
}

fn compile(name: &str, template: &str) -> ChatTemplate {
    from_config(name, &json!({"chat_template": template})).expect("it compiles").expect("it is there")
}

/// The cases and their results are `make_samples.py`'s.
#[test]
fn templates_render_as_in_python() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("templates.json")).expect("cases are JSON");
    for (case_idx, case) in cases.iter().enumerate() {
        let mut config = case["config"].clone();
        config["chat_template"] = case["template"].clone();
        if let Some(named) = case["named"].as_object() {
            config["chat_template"] =
                named.iter().map(|(name, template)| json!({"name": name, "template": template})).collect();
        }
        let template = from_config(&format!("case-{case_idx}"), &config).expect("it compiles").expect("it is there");
        let input = ChatInput {
            messages: &case["messages"],
            tools: Some(&case["tools"]).filter(|tools| !tools.is_null()),
            add_generation_prompt: case["add_generation_prompt"] == true,
            continue_final_message: false,
            extra: case["extra"].as_object().expect("an object"),
        };
        match (template.render(&input), case["raised"].as_str()) {
            (Ok(text), None) => assert_eq!(text, case["expected"], "{}", case["name"]),
            (Err(TextError::TemplateRaised(message)), Some(raised)) => assert_eq!(message, raised, "{}", case["name"]),
            (result, _) => panic!("{}: {result:?}, expected {} {}", case["name"], case["expected"], case["raised"]),
        }
    }
}

fn render(template: &ChatTemplate, messages: &Value, continue_final_message: bool) -> Result<String, TextError> {
    template.render(&ChatInput {
        messages,
        tools: None,
        add_generation_prompt: false,
        continue_final_message,
        extra: &Map::new(),
    })
}

#[test]
fn templates_are_looked_for_in_order() {
    let no_messages = json!([]);
    let files = [
        ("tokenizer_config.json", "{\"chat_template\": \"config\"}"),
        ("chat_template.jinja", "jinja"),
        ("own", "own"),
    ];
    let dir = ModelDir::new("order", &files);
    let text =
        |template: Option<ChatTemplate>| render(&template.expect("it is there"), &no_messages, false).expect("text");
    assert_eq!(text(ChatTemplate::load(&dir.0, Some(&dir.0.join("own"))).expect("own")), "own");
    assert_eq!(text(load(&dir).expect("jinja")), "jinja");
    std::fs::remove_file(dir.0.join("chat_template.jinja")).expect("removed");
    assert_eq!(text(load(&dir).expect("config")), "config");

    assert!(load(&ModelDir::new("none", &[])).expect("no files").is_none());
    assert!(from_config("null", &json!({"chat_template": null})).expect("null").is_none());
    let missing = ChatTemplate::load(&dir.0, Some(&dir.0.join("missing"))).expect_err("no such file");
    assert!(matches!(missing, TextError::ReadFile { .. }), "{missing}");
}

#[test]
fn unusable_templates_are_refused_while_loading() {
    let cases = [
        (json!("{% if %}"), "does not compile"),
        (json!("a\n{{ 1 | nofilter("), "line 2"),
        (json!([{"name": "rag", "template": ""}]), "none named \"default\""),
        (json!([{"name": "default"}]), "neither a string nor a list"),
        (json!(1), "neither a string nor a list"),
    ];
    for (case_idx, (template, expected)) in cases.into_iter().enumerate() {
        let error =
            from_config(&format!("unusable-{case_idx}"), &json!({"chat_template": template})).expect_err("unusable");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn render_errors_tell_the_line() {
    let template = compile("error-line", "a\n{{ messages[0].content.nope() }}");
    let error = render(&template, &json!([{"content": "x"}]), false).expect_err("no such method");
    assert!(matches!(error, TextError::TemplateRender(_)), "{error:?}");
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn templates_that_do_not_end_or_write_without_limit_are_stopped() {
    let long = "x".repeat(4000);
    for (name, template, expected) in [
        ("endless", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("flood", "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}", "bytes"),
        ("recursive", "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("wide", "{{ messages | tojson(indent=1000000000) }}", "indents by at most"),
        (
            "deep",
            "{% set n = namespace(x=[]) %}{% for a in range(600) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
            "levels",
        ),
    ] {
        let error = render(&compile(name, template), &json!([{"content": long}]), false).expect_err(name);
        assert!(matches!(error, TextError::TemplateRender(_)), "{name}: {error:?}");
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
}

#[test]
fn a_final_message_can_be_continued() {
    let plain = compile("plain", "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}");
    let trimming = compile("trim", "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}");
    let parts =
        compile("parts", "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}");
    let dropping = compile("drop", "{% for m in messages %}{{ m.role }}{% endfor %}");
    let text = |content: Value| json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]);

    let continued = |template: &ChatTemplate, content: Value| render(template, &text(content), true);
    assert_eq!(continued(&plain, json!("The ")).expect("plain"), "<user>q</>\n<assistant>The ");
    assert_eq!(continued(&trimming, json!("The ")).expect("trimming"), "<user>q</>\n<assistant>The");
    let list = json!([{"role": "assistant", "content": [{"text": "a"}, {"text": "b"}, {"type": "image"}]}]);
    assert_eq!(render(&parts, &list, true).expect("parts"), "a;b");

    assert!(matches!(continued(&dropping, json!("x")), Err(TextError::FinalMessageLost)));
    assert!(matches!(continued(&plain, json!(null)), Err(TextError::FinalMessageWithoutText)));
    assert!(matches!(render(&plain, &json!([]), true), Err(TextError::FinalMessageWithoutText)));
    let messages = text(json!("x"));
    let both = ChatInput {
        messages: &messages,
        tools: None,
        add_generation_prompt: true,
        continue_final_message: true,
        extra: &Map::new(),
    };
    assert!(matches!(plain.render(&both), Err(TextError::FinalMessageAndPrompt)));
}

#[test]
fn kimi_sorts_the_keys_of_tools() {
    let config = json!({"tokenizer_class": "TikTokenTokenizer", "chat_template": "{{ tools | tojson }}"});
    let template = from_config("kimi", &config).expect("it compiles").expect("it is there");
    let tools = json!([{"type": "function", "function": {"name": "f", "description": "d"}}]);
    let input = ChatInput {
        messages: &json!([]),
        tools: Some(&tools),
        add_generation_prompt: true,
        continue_final_message: false,
        extra: &Map::new(),
    };
    let expected = r#"[{"function": {"description": "d", "name": "f"}, "type": "function"}]"#;
    assert_eq!(template.render(&input).expect("text"), expected);
}

#[test]
fn strftime_now_knows_the_date() {
    let template = compile("now", "{{ strftime_now('%Y') }}|{{ strftime_now('%d %b %Y') | length }}");
    let text = render(&template, &json!([]), false).expect("text");
    let (year, length) = text.split_once('|').expect("two parts");
    assert!(year.parse::<u32>().expect("a year") >= 2024, "{text}");
    assert_eq!(length, "11");
}

//! What the text side adds to the engine's fingerprint: tokenizer and chat template.

use std::fs;
use std::io;
use std::path::Path;

use cache::{Digest, Fingerprint};

/// Files of a model folder that say how text becomes tokens, and back.
const TEXT_EXTENSIONS: [&str; 5] = ["json", "jinja", "model", "tiktoken", "txt"];

/// The fingerprint of answers: `engine` is that of the weights and the numerics. A GGUF file brings its tokenizer within the
/// bytes that the engine's has read.
///
/// # Errors
/// A file that was there when the model was loaded cannot be read any more.
pub fn whole(engine: [u8; 32], model: &Path, template: Option<&Path>) -> io::Result<Fingerprint> {
    let mut digest = Digest::new("fingerprint");
    digest.field("engine", &engine);
    if model.is_dir() {
        let mut paths: Vec<_> =
            fs::read_dir(model)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
        paths.retain(|path| is_text(path));
        paths.sort_unstable();
        for path in paths {
            digest.field(&path.file_name().unwrap_or_default().to_string_lossy(), &fs::read(&path)?);
        }
    }
    if let Some(path) = template {
        digest.field("--chat-template", &fs::read(path)?);
    }
    Ok(digest.fingerprint())
}

fn is_text(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    // The index of shards changes with how they are cut, not with what is in them.
    path.is_file() && TEXT_EXTENSIONS.contains(&&*extension) && !name.ends_with(".safetensors.index.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new() -> Self {
            let dir = std::env::temp_dir().join(format!("moesaic-fingerprint-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn tokenizer_and_template_count_and_weights_do_not() {
        let dir = Scratch::new();
        let write = |name: &str, text: &str| fs::write(dir.0.join(name), text).unwrap();
        let template = dir.0.join("other.tmpl");
        fs::write(&template, "a").unwrap();
        write("tokenizer.json", "{}");
        let now = || whole([0; 32], &dir.0, None).unwrap();
        let first = now();
        write("model.safetensors", "weights");
        write("model.safetensors.index.json", "{}");
        assert_eq!(now(), first);
        assert_ne!(whole([1; 32], &dir.0, None).unwrap(), first);
        let with_template = whole([0; 32], &dir.0, Some(&template)).unwrap();
        assert_ne!(with_template, first);
        write("other.tmpl", "b");
        assert_ne!(whole([0; 32], &dir.0, Some(&template)).unwrap(), with_template);
        write("chat_template.jinja", "x");
        let second = now();
        assert_ne!(second, first);
        write("tokenizer.json", "{ }");
        assert_ne!(now(), second);
    }
}

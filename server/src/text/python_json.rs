//! JSON as Python's `json.dumps` writes it: the `tojson` filter of chat templates.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind},
};

/// Widest indentation: templates use 2 or 4, and each line of the output takes it once per level.
const MAX_INDENT: usize = 64;

/// Deepest nesting: request bodies end at 128, calls in them at twice that; deeper values would overflow the stack.
const MAX_DEPTH: usize = 512;

/// The arguments of Hugging Face's `tojson`, with its defaults.
#[derive(Debug)]
struct JsonFormat {
    ensure_ascii: bool,
    /// Spaces per level; everything on one line where there is none.
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, without HTML escapes.
pub(super) fn tojson(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let format = JsonFormat::parse(&positional, &kwargs)?;
    let mut out = String::new();
    format.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl JsonFormat {
    fn parse(positional: &[Value], kwargs: &Kwargs) -> Result<Self, Error> {
        let argument = |position: usize, name: &str| -> Result<Option<Value>, Error> {
            let named: Option<Value> = kwargs.get(name)?;
            Ok(named.or_else(|| positional.get(position).cloned()).filter(|value| !value.is_none()))
        };
        let ensure_ascii = argument(0, "ensure_ascii")?;
        let indent = argument(1, "indent")?;
        let separators = argument(2, "separators")?;
        let sort_keys = argument(3, "sort_keys")?;
        kwargs.assert_all_used()?;

        let indent = indent.map(usize::try_from).transpose()?;
        if indent.is_some_and(|indent| indent > MAX_INDENT) {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson indents by at most {MAX_INDENT}")));
        }
        let default_items = if indent.is_some() { "," } else { ", " };
        let (item_separator, key_separator) = match separators {
            Some(separators) => {
                (separators.get_item_by_index(0)?.to_string(), separators.get_item_by_index(1)?.to_string())
            }
            None => (default_items.to_owned(), ": ".to_owned()),
        };
        Ok(Self {
            ensure_ascii: ensure_ascii.is_some_and(|value| value.is_true()),
            indent,
            item_separator,
            key_separator,
            sort_keys: sort_keys.is_some_and(|value| value.is_true()),
        })
    }

    fn write(&self, value: &Value, level: usize, out: &mut String) -> Result<(), Error> {
        if level > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson nests at most {MAX_DEPTH} levels")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_block(('[', ']'), &items, level, out, |item, out| self.write(item, level + 1, out))?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((json_key(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|(left, _), (right, _)| left.cmp(right));
                }
                self.write_block(('{', '}'), &entries, level, out, |(key, item), out| {
                    self.write_string(key, out);
                    out.push_str(&self.key_separator);
                    self.write(item, level + 1, out)
                })?;
            }
            kind => {
                let message = format!("object of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_block<T>(
        &self,
        (open, close): (char, char),
        items: &[T],
        level: usize,
        out: &mut String,
        write_item: impl Fn(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (item_idx, item) in items.iter().enumerate() {
            if item_idx > 0 {
                out.push_str(&self.item_separator);
            }
            self.write_line_break(level + 1, out);
            write_item(item, out)?;
        }
        if !items.is_empty() {
            self.write_line_break(level, out);
        }
        out.push(close);
        Ok(())
    }

    fn write_line_break(&self, level: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        for char in text.chars() {
            match char {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => push_escape(char, out),
                ' '..='~' => out.push(char),
                _ if self.ensure_ascii => push_escape(char, out),
                _ => out.push(char),
            }
        }
        out.push('"');
    }
}

fn push_escape(char: char, out: &mut String) {
    for unit in char.encode_utf16(&mut [0; 2]) {
        out.push_str(&format!("\\u{unit:04x}"));
    }
}

/// Python writes keys that are not strings as JSON would write them as values.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(python_float(f64::try_from(key.clone())?)),
        kind => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("keys must be str, int, float, bool or None, not {kind}"),
        )),
    }
}

/// `repr` of a Python float: the shortest digits, in scientific form outside 1e-4 ≤ |x| < 1e16.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("{:e} writes an exponent");
    let exponent: i32 = exponent.parse().expect("{:e} writes a decimal exponent");
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

//! The filter `tojson` as `transformers` installs it: Python's `json.dumps(value, ensure_ascii=False)`,
//! without jinja's escaping of HTML.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Widest indentation.
const INDENT_MAX: usize = 16;
/// Deepest nesting that is written.
const DEPTH_MAX: usize = 128;

/// How `json.dumps` was asked to write.
struct Style {
    ascii: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
    sorted: bool,
}

#[allow(clippy::needless_pass_by_value)] // minijinja calls filters with owned keyword arguments.
pub(super) fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let bad = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = match indent {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => match (indent.as_str(), usize::try_from(indent.clone())) {
            (Some(text), _) => Some(text.to_owned()),
            (None, Ok(n)) => Some(" ".repeat(n.min(INDENT_MAX))),
            _ => return Err(bad("indent is neither a number nor text")),
        },
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (between, after_key) = match separators.as_deref() {
        Some([between, after_key]) => (between.clone(), after_key.clone()),
        Some(_) => return Err(bad("separators are not two texts")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        between,
        after_key,
    };
    kwargs.assert_all_used()?;
    if value.is_undefined() {
        return Err(bad("the value is undefined"));
    }
    let mut out = String::new();
    style.write(&mut out, value, 1)?;
    Ok(Value::from_safe_string(out))
}

/// Keys and values, or items without keys.
type Items = Vec<(Option<String>, Value)>;

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let refused = || Error::new(ErrorKind::BadSerialization, format!("tojson: {} is not JSON", value.kind()));
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::BadSerialization, format!("tojson: nested deeper than {DEPTH_MAX}")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.text(out, value.as_str().ok_or_else(refused)?),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item)).collect();
                self.items(out, ('[', ']'), items, depth)?;
            }
            ValueKind::Map => {
                let mut items: Items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    // Python writes keys that are no texts as such.
                    let key = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                        ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                            let mut text = String::new();
                            self.write(&mut text, &key, depth)?;
                            text
                        }
                        _ => return Err(refused()),
                    };
                    items.push((Some(key), item));
                }
                if self.sorted {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.items(out, ('{', '}'), items, depth)?;
            }
            _ => return Err(refused()),
        }
        Ok(())
    }

    fn items(&self, out: &mut String, (open, close): (char, char), items: Items, depth: usize) -> Result<(), Error> {
        out.push(open);
        let empty = items.is_empty();
        for (i, (key, value)) in items.into_iter().enumerate() {
            if i > 0 {
                out.push_str(&self.between);
            }
            self.line(out, depth);
            if let Some(key) = key {
                self.text(out, &key);
                out.push_str(&self.after_key);
            }
            self.write(out, &value, depth + 1)?;
        }
        if !empty {
            self.line(out, depth - 1);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn text(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            let _ = match c {
                '"' => write!(out, "\\\""),
                '\\' => write!(out, "\\\\"),
                '\n' => write!(out, "\\n"),
                '\r' => write!(out, "\\r"),
                '\t' => write!(out, "\\t"),
                '\u{8}' => write!(out, "\\b"),
                '\u{c}' => write!(out, "\\f"),
                c if c < ' ' || (self.ascii && !c.is_ascii()) => {
                    c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))
                }
                c => write!(out, "{c}"),
            };
        }
        out.push('"');
    }
}

/// A float as Python's `repr` writes it.
fn float(x: f64) -> String {
    if !x.is_finite() {
        let name = if x.is_nan() { "NaN" } else { "Infinity" };
        return if x < 0.0 { format!("-{name}") } else { name.to_owned() };
    }
    let shortest = format!("{x:e}");
    let exponent: i32 = shortest.rsplit_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    if !(-4..16).contains(&exponent) && x != 0.0 {
        let (digits, _) = shortest.split_once('e').unwrap_or((&shortest, ""));
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let text = format!("{x}");
    if text.contains('.') { text } else { text + ".0" }
}

#[cfg(test)]
mod tests {
    use super::float;

    #[test]
    fn floats_as_python_writes_them() {
        let table = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (1.5e300, "1.5e+300"),
            (-2.5, "-2.5"),
            (0.0, "0.0"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            (f64::NAN, "NaN"),
        ];
        for (x, text) in table {
            assert_eq!(float(x), text);
        }
    }
}

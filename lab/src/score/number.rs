//! Numbers in text.

/// The last number of `text`: digits with thousands commas, a decimal point, a sign before them.
pub(super) fn last(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    // The run of digits, commas and points that ends here.
    let mut begin = end;
    while begin > 0 && (digit(begin - 1) || (matches!(bytes[begin - 1], b',' | b'.') && begin > 1 && digit(begin - 2)))
    {
        begin -= 1;
    }
    // A point before it without a digit: `.5`.
    if begin > 0 && bytes[begin - 1] == b'.' && !text[begin..end].contains('.') {
        begin -= 1;
    }
    let run = &text[begin..end];
    let whole = run.split('.').next().unwrap_or(run);
    if run.matches('.').count() > 1
        || !grouped(whole)
        || run.rsplit('.').next().is_some_and(|part| run.contains('.') && part.contains(','))
    {
        // Not one number (a date, a list without blanks): its last part is.
        begin += run.rfind([',', '.']).map_or(0, |at| at + 1);
    }
    let sign = text[..begin].strip_suffix(['-', '−']).or_else(|| text[..begin].strip_suffix("-$"));
    let negative = sign.is_some_and(|before| !before.ends_with(|c: char| c.is_alphanumeric() || c == ')'));
    let number: f64 = text[begin..end].replace(',', "").parse().ok()?;
    Some(if negative { -number } else { number })
}

/// True if the commas of a whole number separate thousands.
fn grouped(whole: &str) -> bool {
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or_default().len();
    let rest: Vec<usize> = groups.map(str::len).collect();
    rest.is_empty() || ((1..=3).contains(&first) && rest.iter().all(|len| *len == 3))
}

/// True if two numbers are the same, but for the last bits of a decimal fraction.
pub(super) fn equal(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_numbers() {
        for (text, number) in [
            ("18", Some(18.0)),
            ("#### 1,234", Some(1234.0)),
            ("It costs $3.50.", Some(3.5)),
            ("$1,000,000!", Some(1_000_000.0)),
            ("about .5", Some(0.5)),
            ("5-3", Some(3.0)),
            ("it is -3.", Some(-3.0)),
            ("minus −7 °C", Some(-7.0)),
            ("-$20", Some(-20.0)),
            ("1,2,3", Some(3.0)),
            ("on 2024.10.5", Some(5.0)),
            ("12%", Some(12.0)),
            ("x2 = 4 apples", Some(4.0)),
            ("四 4 个", Some(4.0)),
            ("none", None),
            ("", None),
            ("3.", Some(3.0)),
            ("1e5", Some(5.0)),
        ] {
            assert_eq!(last(text), number, "{text}");
        }
        assert!(equal(0.1 + 0.2, 0.3) && !equal(1.0, 1.001) && equal(1e12, 1e12));
    }
}

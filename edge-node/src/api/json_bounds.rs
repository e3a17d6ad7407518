//! How much a JSON body may consist of. A parsed value takes many times its bytes (`[],` is 3 of them
//! and becomes 72), so its values are counted before any is made.

use super::error::ApiError;

/// Most values of a body: numbers, strings, objects and so on, keys not counted. A prompt of token ids
/// has one per token.
const VALUES_MAX: usize = 160 * 1024;
/// Most objects and arrays of a body. A message of text is one, a tool's schema a few dozen.
const CONTAINERS_MAX: usize = 32 * 1024;
/// Deepest nesting of objects and arrays.
const DEPTH_MAX: usize = 96;

/// Checks a body before it is parsed. One that is no JSON may pass: the parser finds what is wrong.
pub(crate) fn check(body: &[u8]) -> Result<(), ApiError> {
    let (mut containers, mut separators, mut depth) = (0, 0, 0_usize);
    let mut rest = body.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => skip_string(&mut rest),
            b',' => separators += 1,
            b'[' | b'{' => {
                containers += 1;
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(too_much(&format!("nested more than {DEPTH_MAX} levels deep")));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => continue,
        }
        if containers > CONTAINERS_MAX {
            return Err(too_much(&format!("of more than {CONTAINERS_MAX} objects and arrays")));
        }
        // Each value but the first of its container, and the root, stands behind a comma.
        if separators + containers >= VALUES_MAX {
            return Err(too_much(&format!("of more than {VALUES_MAX} values")));
        }
    }
    Ok(())
}

/// Moves past the closing quote of a string.
fn skip_string(rest: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => return,
            b'\\' => {
                rest.next();
            }
            _ => {}
        }
    }
}

fn too_much(what: &str) -> ApiError {
    ApiError::bad_request("body_too_complex", format!("the body is JSON {what}; send less at once"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_containers_and_depth_are_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let list = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
        let table = [
            (nested(DEPTH_MAX), None),
            (nested(DEPTH_MAX + 1), Some("levels deep")),
            ("[".repeat(4 << 20), Some("levels deep")),
            (list("[]", CONTAINERS_MAX - 1), None),
            (list("{}", CONTAINERS_MAX), Some("objects and arrays")),
            (list("7", VALUES_MAX - 1), None),
            (list("\"\"", VALUES_MAX), Some("values")),
            (format!("{{{}}}", vec!["\"a\":1"; VALUES_MAX].join(",")), Some("values")),
            // In a string, nothing counts.
            (format!("\"{}\"", "[,\\\"{".repeat(VALUES_MAX)), None),
            (format!("\"\\\\\"{}", "[".repeat(DEPTH_MAX + 1)), Some("levels deep")),
            // What is no JSON is for the parser.
            ("\"abc\\".into(), None),
            ("]]}}".into(), None),
        ];
        for (body, problem) in table {
            let result = check(body.as_bytes());
            let begin: String = body.chars().take(20).collect();
            match problem {
                None => assert_eq!(result, Ok(()), "{begin}"),
                Some(problem) => {
                    let error = result.expect_err(&begin);
                    assert!(error.message.contains(problem), "{begin}: {error}");
                    assert_eq!((error.status.as_u16(), error.code), (400, Some("body_too_complex")));
                }
            }
        }
    }
}

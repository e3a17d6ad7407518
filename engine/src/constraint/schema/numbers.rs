//! Bounds of numbers as the library holds them.
//!
//! It reads each number as a double, takes `exclusiveMinimum: 0` with `maximum: 0.5` to allow 0, adds 1 to a
//! double to step over an integer, and fails past 2^63. So it gets bounds that are doubles, lie within the
//! schema's, and are inclusive where it goes wrong with exclusive ones.

use serde_json::{Map, Number, Value};

use super::super::ConstraintError;
use super::Preparer;

/// The largest double below 2^63: the library's numbers end there.
const LARGEST: f64 = 9_223_372_036_854_774_784.0;
/// From here on an integer has 19 digits, and the library cannot count to the next power of ten.
const NINETEEN_DIGITS: f64 = 1e18;
/// What stands for the smallest number above 0, and above another one as a part of that: a few digits more
/// than schemas have, and not the next double, which does not survive being written and read.
const ABOVE_ZERO: f64 = 1e-12;
const NEXT_TO: f64 = 1e-12;

/// The end of a range.
#[derive(Clone, Copy)]
struct Bound<'a> {
    value: &'a Number,
    exclusive: bool,
}

impl Bound<'_> {
    /// The double that this lower bound becomes, and whether it stays exclusive.
    fn lower(self, integer: bool) -> (f64, bool) {
        if let (true, Some(exact)) = (integer, self.exact()) {
            return (at_least(exact + i128::from(self.exclusive)), false);
        }
        let (double, exact) = self.double();
        match (integer, self.exclusive) {
            (true, true) if double.fract() == 0.0 => (double + 1.0, false),
            (true, _) => (double.ceil(), false),
            (false, true) if double == 0.0 => (ABOVE_ZERO, false),
            (false, true) if double > 0.0 && double.fract() == 0.0 => (double + double * NEXT_TO, false),
            (false, exclusive) => (exact.map_or(double, at_least), exclusive),
        }
    }

    fn double(self) -> (f64, Option<i128>) {
        (self.value.as_f64().unwrap_or(f64::NAN), self.exact())
    }

    /// The value, if it is written as an integer.
    fn exact(self) -> Option<i128> {
        self.value.as_i64().map(i128::from).or_else(|| self.value.as_u64().map(i128::from))
    }
}

/// The smallest double that is not below `n`.
fn at_least(n: i128) -> f64 {
    let near = n as f64;
    if (near as i128) < n { near.next_up() } else { near }
}

/// The number with its sign turned; none past the integers.
fn negated(value: &Number) -> Option<Number> {
    match (value.as_i64(), value.as_u64(), value.as_f64()) {
        (Some(n), ..) if n != i64::MIN => Some(Number::from(-n)),
        (None, Some(_), _) | (Some(_), ..) => Number::from_i128(-(Bound { value, exclusive: false }.exact()?))
            .or_else(|| Number::from_f64(-value.as_f64()?)),
        (None, None, Some(double)) => Number::from_f64(-double),
        (None, None, None) => None,
    }
}

impl Preparer<'_> {
    /// Takes over what a schema says of numbers.
    pub(super) fn numbers(
        &self,
        map: &Map<String, Value>,
        out: &mut Map<String, Value>,
    ) -> Result<(), ConstraintError> {
        if let Some(step) = map.get("multipleOf") {
            if step.as_f64().is_none_or(|step| step <= 0.0) {
                return Err(self.refuse("`multipleOf` must be a number above 0"));
            }
            out.insert("multipleOf".into(), step.clone());
        }
        let names = |word: &str| match map.get("type") {
            Some(Value::String(kind)) => kind == word,
            Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == word),
            _ => false,
        };
        let integer = names("integer") && !names("number");
        let least = self.strictest(map, "minimum", "exclusiveMinimum", |bound| Some(bound.lower(integer)))?;
        // The upper bound is the lower one of the numbers with their signs turned.
        let most = self.strictest(map, "maximum", "exclusiveMaximum", |bound| {
            let turned = negated(bound.value)?;
            Some(Bound { value: &turned, ..*bound }.lower(integer))
        })?;
        let (least, least_exclusive) = least.unzip();
        let (most, most_exclusive) = most.map(|(turned, exclusive)| (-turned, exclusive)).unzip();
        let (mut least, mut most) = (least, most);
        if least.is_none() && most.is_none() {
            return Ok(());
        }
        if least.is_some_and(|least| least > LARGEST) || most.is_some_and(|most| most < -LARGEST) {
            return Err(self.refuse("`minimum` and `maximum` are supported up to 2^63"));
        }
        if least == Some(ABOVE_ZERO)
            && let Some(most) = most.filter(|most| *most > 0.0)
        {
            least = Some(ABOVE_ZERO.min(most / 2.0));
        }
        if most == Some(-ABOVE_ZERO)
            && let Some(least) = least.filter(|least| *least < 0.0)
        {
            most = Some((-ABOVE_ZERO).max(least / 2.0));
        }
        if least.is_some_and(|least| least >= NINETEEN_DIGITS) || most.is_some_and(|most| most > LARGEST) {
            most = Some(most.unwrap_or(LARGEST).min(LARGEST));
        }
        if most.is_some_and(|most| most <= -NINETEEN_DIGITS) || least.is_some_and(|least| least < -LARGEST) {
            least = Some(least.unwrap_or(-LARGEST).max(-LARGEST));
        }
        let exclusive = least_exclusive == Some(true) || most_exclusive == Some(true);
        if let (Some(least), Some(most)) = (least, most)
            && (least > most || exclusive && least >= most)
        {
            return Err(self.refuse("no number that can be held lies between `minimum` and `maximum`"));
        }
        let words = [
            ("minimum", "exclusiveMinimum", least, least_exclusive),
            ("maximum", "exclusiveMaximum", most, most_exclusive),
        ];
        for (inclusive_word, exclusive_word, bound, exclusive) in words {
            let word = if exclusive == Some(true) { exclusive_word } else { inclusive_word };
            bound.and_then(|bound| out.insert(word.into(), written(bound)));
        }
        Ok(())
    }

    /// The stricter of two lower bounds.
    fn strictest(
        &self,
        map: &Map<String, Value>,
        word: &str,
        exclusive_word: &str,
        lower: impl Fn(&Bound<'_>) -> Option<(f64, bool)>,
    ) -> Result<Option<(f64, bool)>, ConstraintError> {
        let number = |word: &str| match map.get(word) {
            None | Some(Value::Bool(false)) => Ok(None),
            Some(Value::Number(number)) => Ok(Some(number)),
            Some(_) => Err(self.refuse(&format!("`{word}` must be a number"))),
        };
        let inclusive = number(word)?;
        let exclusive = match map.get(exclusive_word) {
            // As draft 4 has it.
            Some(Value::Bool(true)) => inclusive,
            _ => number(exclusive_word)?,
        };
        let bounds = [
            inclusive.map(|value| Bound { value, exclusive: false }),
            exclusive.map(|value| Bound { value, exclusive: true }),
        ];
        let all = bounds.iter().flatten().map(lower).collect::<Option<Vec<(f64, bool)>>>();
        let all = all.ok_or_else(|| self.refuse(&format!("`{word}` is past what a number can be")))?;
        Ok(all.into_iter().max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))))
    }

    /// Refuses a value whose numbers the library would change: it writes integers as the nearest double.
    pub(super) fn exact(&self, value: &Value) -> Result<(), ConstraintError> {
        match value {
            Value::Number(number) => {
                let double = number.as_f64().unwrap_or(f64::NAN);
                let exact = Bound { value: number, exclusive: false }.exact();
                let held = exact.map_or(double.abs() < 2.0 * LARGEST, |n| double as i128 == n);
                let problem = || format!("the number {number} in `const` or `enum` is past 2^53 and cannot be held");
                if held { Ok(()) } else { Err(self.refuse(&problem())) }
            }
            Value::Array(list) => list.iter().try_for_each(|value| self.exact(value)),
            Value::Object(map) => map.values().try_for_each(|value| self.exact(value)),
            _ => Ok(()),
        }
    }
}

/// A double, as an integer if it is one.
fn written(double: f64) -> Value {
    // Minus zero is zero.
    if double.fract() == 0.0 { (double as i64).into() } else { double.into() }
}

/// A count that is written as a float.
pub(super) fn whole(rule: &Value) -> Value {
    match rule.as_f64() {
        Some(n) if rule.is_f64() && n.fract() == 0.0 && (0.0..1e15).contains(&n) => (n as u64).into(),
        _ => rule.clone(),
    }
}

/// How many `multipleOf` hold for one number. The library multiplies them in 32 bits.
pub(super) fn factors(map: &Map<String, Value>) -> usize {
    let of = |schema: &Value| schema.as_object().map_or(0, factors);
    let list = |word: &str| map.get(word).and_then(Value::as_array).into_iter().flatten().map(of);
    usize::from(map.contains_key("multipleOf")) + list("allOf").sum::<usize>() + list("anyOf").max().unwrap_or(0)
}

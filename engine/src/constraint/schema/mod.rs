//! From a JSON schema as people write it to one that the grammar library holds exactly.
//!
//! The library (llguidance) leaves out what it takes for annotations, reads numbers as doubles, follows
//! references by their spelling and counts a repeated key twice. What it would hold less strictly than the
//! schema says is rewritten here, or refused by name: an answer that ends by itself is in the schema.
//!
//! - Only keywords that the library holds are passed on. An unknown keyword is an annotation, as
//!   the specification says; one that narrows values and cannot be held is refused ([`keywords`]).
//! - References are resolved here (RFC 6901 with percent-encoding, anchors) and renamed ([`reference`]).
//! - Bounds of numbers become inclusive doubles that lie within them ([`numbers`]), formats become patterns
//!   where the library is laxer than their standard ([`formats`]).
//! - Patterns that the library misreads are spelt otherwise ([`patterns`]).
//! - An object that names its keys has no others, unless the schema says that it has ([`objects`]).
//! - `oneOf` becomes `anyOf` where no value is in two branches ([`choice`]).
//! - A schema without a finite value is refused ([`finite`]).

mod choice;
mod finite;
mod formats;
mod keywords;
mod numbers;
mod objects;
mod patterns;
mod reference;

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::ConstraintError;
use objects::Evaluated;

pub use keywords::{format_is_held, says_nothing};
pub use reference::resolve;

/// Most schemas in a schema, counted as often as they are written out.
const NODES_MAX: usize = 20_000;
/// Deepest nesting of schemas.
const DEPTH_MAX: usize = 128;
/// Longest path that a refusal names, characters.
const PATH_CHARS_MAX: usize = 80;

/// White space that a JSON grammar allows between two parts: a blank, or a line break with an
/// indentation. Bounded, so that no model fills its answer with blanks.
pub(super) const JSON_SPACE: &str = r"\x20|\n[\x20\x09]{0,32}";
/// Escapes in strings other than `\u`. Where keys are told apart, each must have one spelling only.
const ESCAPES_WITHOUT_U: &str = "nrbtf\\\"";

/// The settings of the library, which stand in the schema.
const SETTINGS: &str = "x-guidance";

/// `schema` as the library is given it. Its references point into `root`, which may be `schema` itself.
pub(super) fn prepare(schema: &Value, root: &Value) -> Result<Value, ConstraintError> {
    let Value::Object(_) = schema else {
        return Err(ConstraintError::Rejected("a schema must be an object".into()));
    };
    let mut preparer = Preparer::new(schema, root);
    let prepared = preparer.at_value(schema)?;
    let mut definitions = Map::new();
    // Targets are found while targets are prepared.
    let mut next = 0;
    while let Some(&target) = preparer.targets.get(next) {
        preparer.begin(next);
        definitions.insert(name(next), preparer.at_value(target)?);
        next += 1;
    }
    preparer.no_reference_leads_to_itself()?;
    finite::check(&prepared, &definitions)?;
    let mut settings = json!({ "whitespace_pattern": JSON_SPACE });
    if preparer.keys_told_apart {
        settings["json_allowed_escapes"] = ESCAPES_WITHOUT_U.into();
    }
    let mut map = match prepared {
        Value::Object(map) => map,
        // `true` and `false` are schemas too.
        Value::Bool(true) => Map::new(),
        _ => return Err(ConstraintError::Rejected("no value is in the schema".into())),
    };
    if !definitions.is_empty() {
        map.insert("$defs".into(), Value::Object(definitions));
    }
    map.insert(SETTINGS.into(), settings);
    Ok(Value::Object(map))
}

/// The name of the definition at a position.
fn name(index: usize) -> String {
    format!("d{index}")
}

/// Walks a schema.
struct Preparer<'a> {
    /// What references point into.
    root: &'a Value,
    /// If `root` is what is prepared, `#` needs no definition.
    whole: bool,
    nodes: usize,
    depth: usize,
    /// Where the walk is, for refusals.
    path: Vec<String>,
    /// What references point to, in the order of the first reference.
    targets: Vec<&'a Value>,
    /// Positions in `targets` by address.
    known: HashMap<*const Value, usize>,
    /// The target whose schema is being prepared; none for the schema itself.
    current: Option<usize>,
    /// How many values lie between the beginning of `current` and the walk's place.
    values: usize,
    /// From a schema to one that the same value must be in, by reference.
    leads_to: Vec<(Option<usize>, Option<usize>)>,
    /// Targets that are being written out in place.
    in_place: Vec<*const Value>,
    /// Some object has keys of its own and others.
    keys_told_apart: bool,
}

impl<'a> Preparer<'a> {
    fn new(schema: &'a Value, root: &'a Value) -> Self {
        Self {
            root,
            whole: std::ptr::eq(schema, root),
            nodes: 0,
            depth: 0,
            path: Vec::new(),
            targets: Vec::new(),
            known: HashMap::new(),
            current: None,
            values: 0,
            leads_to: Vec::new(),
            in_place: Vec::new(),
            keys_told_apart: false,
        }
    }

    fn begin(&mut self, target: usize) {
        self.current = Some(target);
        self.values = 0;
    }

    /// An error that says where.
    fn refuse(&self, problem: &str) -> ConstraintError {
        if self.path.is_empty() {
            return ConstraintError::Rejected(problem.into());
        }
        let path: String = self.path.join(".").chars().take(PATH_CHARS_MAX).collect();
        ConstraintError::Rejected(format!("{problem} (in `{path}`)"))
    }

    fn unsupported(&self, word: &str) -> ConstraintError {
        self.refuse(&format!("the keyword `{word}` is not supported here"))
    }

    fn count(&mut self) -> Result<(), ConstraintError> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(self.refuse(&format!("the schema has more than {NODES_MAX} parts")));
        }
        Ok(())
    }

    /// A schema that a part of the value is in: a member, an item.
    fn child(&mut self, place: &str, schema: &'a Value) -> Result<Value, ConstraintError> {
        self.path.push(place.to_owned());
        self.values += 1;
        let prepared = self.at_value(schema);
        self.values -= 1;
        self.path.pop();
        prepared
    }

    /// A schema that stands for a whole value. A reference stays one.
    fn at_value(&mut self, schema: &'a Value) -> Result<Value, ConstraintError> {
        let mut said = keywords::said(schema);
        match (said.next(), said.next()) {
            (Some(("$ref", reference)), None) => self.refer(reference),
            (Some(("allOf", Value::Array(list))), None) if list.len() == 1 => self.deeper(|p| p.at_value(&list[0])),
            _ => self.at_value_itself(schema),
        }
    }

    fn at_value_itself(&mut self, schema: &'a Value) -> Result<Value, ConstraintError> {
        self.schema(schema, &Evaluated::default(), true)
    }

    fn refer(&mut self, reference: &'a Value) -> Result<Value, ConstraintError> {
        let target = self.target(reference)?;
        let index = self.index(target);
        if self.values == 0 {
            self.leads_to.push((self.current, index));
        }
        Ok(json!({ "$ref": index.map_or_else(|| "#".into(), |i| format!("#/$defs/{}", name(i))) }))
    }

    fn target(&self, reference: &'a Value) -> Result<&'a Value, ConstraintError> {
        let Value::String(text) = reference else { return Err(self.refuse("`$ref` must be a string")) };
        resolve(self.root, text).map_err(|problem| self.refuse(&problem))
    }

    /// The definition's position; none for the whole schema.
    fn index(&mut self, target: &'a Value) -> Option<usize> {
        if self.whole && std::ptr::eq(target, self.root) {
            return None;
        }
        let next = self.targets.len();
        let index = *self.known.entry(std::ptr::from_ref(target)).or_insert(next);
        if index == next {
            self.targets.push(target);
        }
        Some(index)
    }

    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, ConstraintError>) -> Result<T, ConstraintError> {
        self.depth += 1;
        let done = if self.depth > DEPTH_MAX {
            Err(self.refuse(&format!("the schema is nested deeper than {DEPTH_MAX}")))
        } else {
            work(self)
        };
        self.depth -= 1;
        done
    }

    /// A schema in its place. `outer` is what schemas beside it say of the same value's members; `alone` if
    /// there are none.
    fn schema(&mut self, schema: &'a Value, outer: &Evaluated, alone: bool) -> Result<Value, ConstraintError> {
        self.count()?;
        match schema {
            Value::Bool(_) => Ok(schema.clone()),
            Value::Object(map) => self.deeper(|p| p.keywords(map, outer, alone)),
            _ => Err(self.refuse("a schema must be an object, `true` or `false`")),
        }
    }

    fn keywords(
        &mut self,
        map: &'a Map<String, Value>,
        outer: &Evaluated,
        alone: bool,
    ) -> Result<Value, ConstraintError> {
        if map.contains_key(SETTINGS) {
            return Err(self.unsupported(SETTINGS));
        }
        if let Some(word) = keywords::not_held(map) {
            return Err(self.unsupported(word));
        }
        if map.get("not").is_some_and(keywords::is_anything) {
            return Ok(Value::Bool(false));
        }
        let alone = alone && !keywords::COMBINING.iter().any(|word| map.contains_key(*word));
        let beside = self.beside(map, outer)?;
        let mut out = Map::new();
        let mut all_of = Vec::new();
        // The library takes keywords in their order, which is the order of the keys it writes.
        for (word, rule) in map {
            match (word.as_str(), rule) {
                ("$ref", _) => all_of.push(self.at_target(rule, |p, target| p.schema(target, &beside.all, false))?),
                ("allOf", Value::Array(list)) => {
                    for member in list {
                        all_of.push(self.schema(member, &beside.all, false)?);
                    }
                }
                ("anyOf", Value::Array(list)) => {
                    let branches = self.branches(list, &beside.of_any)?;
                    out.insert("anyOf".into(), branches.into());
                }
                ("oneOf", Value::Array(list)) => {
                    let branches = self.one_of(list, &beside.of_one)?;
                    all_of.push(json!({ "anyOf": branches }));
                }
                ("const", value) => {
                    self.exact(value)?;
                    out.insert(word.clone(), value.clone());
                }
                ("enum", Value::Array(values)) => {
                    values.iter().try_for_each(|value| self.exact(value))?;
                    out.insert(word.clone(), rule.clone());
                }
                ("allOf" | "anyOf" | "oneOf" | "enum", _) => {
                    return Err(self.refuse(&format!("`{word}` must be an array")));
                }
                ("type" | "minLength" | "maxLength" | "minItems" | "maxItems", _) => {
                    out.insert(word.clone(), numbers::whole(rule));
                }
                ("properties", _) => {
                    out.insert(word.clone(), Value::Null);
                }
                _ => {}
            }
            // Where the combined schemas stand among the others decides on the order of keys too.
            if !all_of.is_empty() && !out.contains_key("allOf") {
                out.insert("allOf".into(), Value::Null);
            }
        }
        self.text(map, &mut out, &mut all_of)?;
        self.numbers(map, &mut out)?;
        self.items(map, &mut out, alone)?;
        self.members(map, &mut out, &beside.of_own, alone)?;
        if !all_of.is_empty() {
            if out.len() == 1 && all_of.len() == 1 {
                return Ok(all_of.remove(0));
            }
            out.insert("allOf".into(), all_of.into());
        }
        if numbers::factors(&out) > 1 {
            return Err(self.refuse("`multipleOf` is supported once for a number, not in several schemas"));
        }
        Ok(Value::Object(out))
    }

    /// Takes over what a schema says of strings.
    fn text(
        &self,
        map: &Map<String, Value>,
        out: &mut Map<String, Value>,
        all_of: &mut Vec<Value>,
    ) -> Result<(), ConstraintError> {
        let string = |word: &str| match map.get(word) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(self.refuse(&format!("`{word}` must be a string"))),
        };
        let own = string("pattern")?.map(patterns::held);
        let format = string("format")?.filter(|format| keywords::format_is_held(format));
        let of_format = format.and_then(formats::pattern);
        if of_format.is_none() {
            format.and_then(|format| out.insert("format".into(), format.into()));
        }
        for pattern in [own, of_format].into_iter().flatten() {
            if out.contains_key("pattern") {
                all_of.push(json!({ "pattern": pattern }));
            } else {
                out.insert("pattern".into(), pattern.into());
            }
        }
        Ok(())
    }

    /// Works on the target of a reference as if it stood where the reference does.
    fn at_target<T>(
        &mut self,
        reference: &'a Value,
        work: impl FnOnce(&mut Self, &'a Value) -> Result<T, ConstraintError>,
    ) -> Result<T, ConstraintError> {
        let target = self.target(reference)?;
        let address = std::ptr::from_ref(target);
        if self.in_place.contains(&address) {
            return Err(self.refuse(&format!("the `$ref` {reference} leads back to itself")));
        }
        self.in_place.push(address);
        let done = self.deeper(|p| work(p, target));
        self.in_place.pop();
        done
    }

    /// The branches of `anyOf`. Where nothing beside them says more of the members, references stay.
    fn branches(&mut self, list: &'a [Value], outer: &Evaluated) -> Result<Vec<Value>, ConstraintError> {
        let branch = |p: &mut Self, schema| {
            if outer.is_empty() { p.deeper(|p| p.at_value(schema)) } else { p.schema(schema, outer, false) }
        };
        list.iter().map(|schema| branch(self, schema)).collect()
    }

    /// A schema that refers to itself without a value in between says nothing.
    fn no_reference_leads_to_itself(&self) -> Result<(), ConstraintError> {
        // Whatever leads nowhere is taken out, until nothing or a circle is left.
        let mut edges = self.leads_to.clone();
        loop {
            let before = edges.len();
            let from: Vec<Option<usize>> = edges.iter().map(|(from, _)| *from).collect();
            edges.retain(|(_, to)| from.contains(to));
            if edges.is_empty() {
                return Ok(());
            }
            if edges.len() == before {
                return Err(ConstraintError::Rejected("a `$ref` leads back to itself".into()));
            }
        }
    }
}

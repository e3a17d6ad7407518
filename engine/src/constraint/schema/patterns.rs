//! Patterns of strings, as the library holds them.

use regex_syntax::hir::{Capture, Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Repetition};

/// Patterns with look-around, which the library does not know, and the same without. They are those that
/// the schema libraries themselves write.
const SAME: [(&str, &str); 3] = [
    // zod 4: `z.email()`.
    (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    ),
    // zod: `z.iso.duration()`.
    (
        r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$",
        concat!(
            r"^P(?:\d+W|(?:\d+Y(?:\d+M)?(?:\d+D)?|\d+M(?:\d+D)?|\d+D)?",
            r"(?:T(?:\d+H(?:\d+M)?(?:\d+(?:[.,]\d+)?S)?|\d+M(?:\d+(?:[.,]\d+)?S)?|\d+(?:[.,]\d+)?S))",
            r"|\d+Y(?:\d+M)?(?:\d+D)?|\d+M(?:\d+D)?|\d+D)$",
        ),
    ),
    // pydantic: `Decimal`.
    (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", r"^[+-]?(?:\d+\.?\d*|\.\d+)$"),
];

/// A pattern that the library holds in place of one that it does not.
pub(super) fn held(pattern: &str) -> String {
    let pattern = SAME.iter().find(|(given, _)| *given == pattern).map_or(pattern, |(_, same)| same);
    // As the library reads it: `\d` and `\w` are of ASCII, after ECMA-262.
    match regex_syntax::parse(&llguidance::regex_to_lark(pattern, "dw")) {
        Ok(hir) if has_class_with_controls(&hir) => without_nul(hir).to_string(),
        _ => pattern.to_owned(),
    }
}

/// Inside a JSON string the library (derivre 0.3.13) takes a class with all control characters for one of
/// all characters that need a backslash: `[^"]` would have `\"` in it. Without one of them it reads it rightly.
fn is_misread(class: &ClassUnicode) -> bool {
    let has = |c: char| class.ranges().iter().any(|range| (range.start()..=range.end()).contains(&c));
    has('\0') && has('\x1f') && !(has('"') && has('\\'))
}

fn has_class_with_controls(hir: &Hir) -> bool {
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => is_misread(class),
        kind => kind.subs().iter().any(has_class_with_controls),
    }
}

/// The same pattern whose misread classes have no NUL.
fn without_nul(hir: Hir) -> Hir {
    let all = |subs: Vec<Hir>| subs.into_iter().map(without_nul).collect();
    match hir.into_kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Literal(literal) => Hir::literal(literal.0),
        HirKind::Look(look) => Hir::look(look),
        HirKind::Class(Class::Unicode(mut class)) if is_misread(&class) => {
            class.difference(&ClassUnicode::new([ClassUnicodeRange::new('\0', '\0')]));
            Hir::class(Class::Unicode(class))
        }
        HirKind::Class(class) => Hir::class(class),
        HirKind::Repetition(r) => Hir::repetition(Repetition { sub: Box::new(without_nul(*r.sub)), ..r }),
        HirKind::Capture(c) => Hir::capture(Capture { sub: Box::new(without_nul(*c.sub)), ..c }),
        HirKind::Concat(subs) => Hir::concat(all(subs)),
        HirKind::Alternation(subs) => Hir::alternation(all(subs)),
    }
}

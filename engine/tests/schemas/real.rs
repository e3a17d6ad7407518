//! Schemas as the schema libraries write them: pydantic 1 and 2, openai's strict form, zod 3 and 4 (which the
//! AI SDK sends), schemars, OpenAPI, TypeScript generators.

use super::*;

#[test]
fn schemas_of_schema_libraries_are_held() {
    let all: Map<String, Value> = serde_json::from_str(include_str!("real.json")).expect("JSON");
    for (name, schema) in &all {
        let compiled = compiled(schema).unwrap_or_else(|e| panic!("{name}: {e}"));
        let ended = check_written(name, schema, &compiled);
        assert!(ended > 6, "{name}: only {ended} ended");
    }
}

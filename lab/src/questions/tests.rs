use super::*;

/// Rows of public layouts; where they come from is said in `data/SOURCES.md`.
const PUBLIC: &str = include_str!("../../data/public.jsonl");

fn one(line: &str) -> Result<Row, RowError> {
    row(line, &ReadOptions::default())
}

#[test]
fn rows_of_public_layouts() {
    let command = Some(Arc::new(CommandScorer::new("true")));
    let options = ReadOptions { command, ..ReadOptions::default() };
    let rows: Vec<Row> = PUBLIC.lines().map(|line| row(line, &options).unwrap()).collect();
    // Scorer, right answer, part of the prompt.
    let table = [
        (ScorerName::Number, "18", "vacuum cleaners"),
        (ScorerName::Choice, "", "Which blood type"),
        (ScorerName::Choice, "", "How does this go on?"),
    ];
    assert_eq!(rows.len(), table.len());
    for (row, (scorer, answer, prompt)) in rows.iter().zip(table) {
        assert_eq!(row.scorer.name(), scorer, "{}", row.prompt);
        assert!(row.has_answer() && row.prompt.contains(prompt), "{}", row.prompt);
        assert!(answer.is_empty() || row.answer == answer, "{}", row.answer);
    }
}

/// Each public layout, by the fields that its files have.
#[test]
fn layouts_are_told_by_their_fields() {
    // Line, answer, a line of the prompt, category.
    let table = [
        (
            r#"{"prompt":"Capital of Peru?","answer":"Lima","category":"capital"}"#,
            "Lima",
            "Capital of Peru?",
            "capital",
        ),
        (r#"{"prompt":"Add 1 and 2.","answer":3}"#, "3", "Add 1 and 2.", "other"),
        (
            r#"{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi?"}],"expected":"Hello"}"#,
            "Hello",
            "Hi?",
            "other",
        ),
        (r#"{"question":"How many?","answer":"2*3=<<2*3=6>>6\n#### 1,006"}"#, "1,006", "How many?", "gsm8k"),
        (r#"{"question":"Which?","choices":["x","y","z","w"],"answer":2,"subject":"physics"}"#, "C", "C. z", "physics"),
        (
            r#"{"id":"1","question":"Which?","choices":{"text":["x","y","z"],"label":["1","2","3"]},"answerKey":"2"}"#,
            "B",
            "B. y",
            "choice",
        ),
        (
            r#"{"question":{"stem":"Which?","choices":[{"text":"x","label":"A"},{"text":"y","label":"B"}]},"answerKey":"B"}"#,
            "B",
            "B. y",
            "choice",
        ),
        (r#"{"ctx":"He ran and","endings":["x","y","z","w"],"label":"3"}"#, "D", "He ran and", "choice"),
        (r#"{"question":"Which?","options":{"A":"x","B":"y"},"answer":"B"}"#, "B", "A. x", "choice"),
        (r#"{"question":"Which?","choices":["x","y"],"answer":"y"}"#, "B", "B. y", "choice"),
        (r#"{"question":"Which?","choices":["1","2","3"],"answer":"2"}"#, "B", "B. 2", "choice"),
        (r#"{"question":"Which?","choices":["1","2","3"],"label":"2"}"#, "C", "C. 3", "choice"),
        (r#"{"question":"Which?","choices":["x","y"],"answer":"B"}"#, "B", "B. y", "choice"),
    ];
    for (line, answer, prompt, category) in table {
        let row = one(line).unwrap();
        assert_eq!((row.answer.as_str(), row.category.as_str()), (answer, category), "{line}");
        assert!(row.prompt.lines().any(|line| line == prompt), "{line}: {}", row.prompt);
    }
    let talk = one(table[2].0).unwrap();
    assert_eq!(talk.conversation().len(), 2);
}

#[test]
fn the_right_choice_of_truthfulqa_is_not_always_the_first() {
    let letters: std::collections::BTreeSet<String> = (0..40)
        .map(|at| {
            let line = format!(r#"{{"question":"Question {at}?","mc1_targets":{{"choices":["right","x","y","z"],"labels":[1,0,0,0]}}}}"#);
            let row = one(&line).unwrap();
            assert!(row.prompt.contains(&format!("{}. right", row.answer)), "{}", row.prompt);
            assert_eq!(row.answer, one(&line).unwrap().answer);
            row.answer
        })
        .collect();
    assert_eq!(letters.len(), 4, "{letters:?}");
}

#[test]
fn scorers_of_file_and_row() {
    let text = ReadOptions { scorer: Some(ScorerName::Text), ..ReadOptions::default() };
    let right = |line: &str, options: &ReadOptions, reply: &str| row(line, options).unwrap().is_right(reply).unwrap();
    let plain = r#"{"prompt":"?","answer":"It is Lima."}"#;
    assert!(right(plain, &text, "it is lima") && !right(plain, &ReadOptions::default(), "it is lima"));
    let own = r#"{"prompt":"?","answer":"\\d+","scorer":"regex"}"#;
    assert!(right(own, &text, "about 12 of them") && !right(own, &text, "none"));
    let json = r#"{"prompt":"?","answer":{"a":[1]},"scorer":"json"}"#;
    assert!(right(json, &text, "{\"a\": [1.0]}"));
    let code = r#"{"task_id":"t/0","prompt":"def f():","entry_point":"f","test":"def check(f): pass"}"#;
    assert!(one(code).unwrap_err().to_string().contains("--score-command"));
}

#[test]
fn what_is_wrong_is_named() {
    let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(LINE_BYTES_MAX));
    let many = format!(
        r#"{{"messages":[{}{{"role":"user","content":"x"}}]}}"#,
        r#"{"role":"user","content":"x"},"#.repeat(MESSAGES_MAX)
    );
    let table = [
        ("[1]", "no JSON object"),
        ("{\"prompt\"", "no JSON object"),
        (r#"{"text":"?"}"#, "no known layout"),
        (r#"{"prompt":1}"#, "`prompt` must be text"),
        (r#"{"prompt":" "}"#, "`prompt` is empty"),
        (r#"{"messages":[]}"#, "`messages` has 0"),
        (r#"{"messages":[{"role":"user"}]}"#, "`messages` must be"),
        (r#"{"messages":[{"role":"assistant","content":"x"}]}"#, "nothing to answer"),
        (r#"{"question":"?","choices":["x","y"],"answer":2}"#, "none of the 2 choices"),
        (r#"{"question":"?","choices":["x"],"answer":0}"#, "`choices` has 1"),
        (r#"{"question":"?","mc1_targets":{"choices":["x","y"],"labels":[0,0,1]}}"#, "`mc1_targets` calls"),
        (r#"{"question":"?","choices":[1,2],"answer":0}"#, "`choices` must hold texts"),
        (r#"{"prompt":"?","answer":"x","scorer":"number"}"#, "no number"),
        (r#"{"prompt":"?","answer":"x","scorer":"best"}"#, "`scorer`"),
        (r#"{"prompt":"?","answer":"(","scorer":"regex"}"#, "no regular expression"),
        (long.as_str(), "at most"),
        (many.as_str(), "`messages` has 257"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    for (line, why) in table {
        std::fs::write(&path, format!("{{\"prompt\":\"?\"}}\n\n{line}\n")).unwrap();
        let error = read(&path, &ReadOptions::default()).unwrap_err();
        assert!(matches!(error, LabError::Row { line: 3, .. }), "{error}");
        assert!(error.to_string().contains(why) && error.to_string().contains("rows.jsonl:3"), "{why}: {error}");
    }
    std::fs::write(&path, "\n").unwrap();
    assert!(matches!(read(&path, &ReadOptions::default()), Err(LabError::Empty(_))));
    assert!(matches!(read(&dir.path().join("none"), &ReadOptions::default()), Err(LabError::Io { .. })));
}

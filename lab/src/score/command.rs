//! An external command as a scorer: JSON on its standard input, a number on its standard output.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_proto::ids::Digest;

/// Longest time that a command may take for one reply.
const SECONDS_MAX: u64 = 60;
/// Most bytes of its output that are read.
const OUTPUT_BYTES_MAX: u64 = 64 << 10;
/// Most scores that are kept: the same reply comes up under many rules.
const KEPT_MAX: usize = 1 << 18;
/// Between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(5);

/// Why a command gave no score.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the score command `{command}` {problem}; it reads one JSON object with `prompt`, `answer`, `reply` and `row`, and prints a number from 0 to 1"
)]
pub struct CommandError {
    command: String,
    problem: String,
}

/// A command line of the system's shell, and the scores it has given.
#[derive(Debug)]
pub struct CommandScorer {
    line: String,
    time_max: Duration,
    kept: Mutex<HashMap<Digest, f64>>,
}

impl CommandScorer {
    /// The command `line`.
    #[must_use]
    pub fn new(line: impl Into<String>) -> Self {
        Self { line: line.into(), time_max: Duration::from_secs(SECONDS_MAX), kept: Mutex::default() }
    }

    /// Its score for a reply, 0 … 1; each different reply is asked about once.
    ///
    /// # Errors
    /// It does not start, takes too long, fails, or prints no such number.
    pub fn score(&self, prompt: &str, answer: &str, reply: &str, row: &Value) -> Result<f64, CommandError> {
        let input = json!({ "prompt": prompt, "answer": answer, "reply": reply, "row": row }).to_string();
        let key = Digest::of(input.as_bytes());
        if let Some(score) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(*score);
        }
        let score =
            self.run(input.as_bytes()).map_err(|problem| CommandError { command: self.line.clone(), problem })?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.insert(key, score);
        }
        Ok(score)
    }

    fn run(&self, input: &[u8]) -> Result<f64, String> {
        let (shell, option) = if cfg!(windows) { ("cmd", "/C") } else { ("sh", "-c") };
        let mut child = Command::new(shell)
            .args([option, &self.line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("does not start: {e}"))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let input = input.to_vec();
        // A command that reads nothing closes its input: its number counts all the same.
        std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
        let (tell, output) = mpsc::channel();
        // Not waited for: a process that the command leaves behind may hold its output open.
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = stdout.map(|stdout| stdout.take(OUTPUT_BYTES_MAX).read_to_string(&mut text)).transpose();
            let _ = tell.send(read.map(|_| text));
        });
        let begun = Instant::now();
        let late = || format!("took longer than {} s", self.time_max.as_secs_f32());
        let status = loop {
            match child.try_wait().map_err(|e| format!("is lost: {e}"))? {
                Some(status) => break status,
                None if begun.elapsed() < self.time_max => std::thread::sleep(POLL),
                None => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(late());
                }
            }
        };
        let text = output.recv_timeout(self.time_max.saturating_sub(begun.elapsed()).max(POLL)).map_err(|_| late())?;
        let text = text.map_err(|e| format!("printed no text: {e}"))?;
        if !status.success() {
            return Err(format!("ended with {status}"));
        }
        let score = text.trim().parse::<f64>().ok().filter(|score| (0.0..=1.0).contains(score));
        score.ok_or_else(|| format!("printed {:?}", text.chars().take(80).collect::<String>()))
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn run(line: &str, reply: &str) -> Result<f64, String> {
        let mut scorer = CommandScorer::new(line);
        scorer.time_max = Duration::from_millis(500);
        scorer.score("?", "right", reply, &json!({ "test": 1 })).map_err(|e| e.to_string())
    }

    #[test]
    fn commands_and_scores() {
        let right = r#"grep -q '"reply":"right"' && echo 1 || echo 0.25"#;
        assert_eq!(run(right, "right"), Ok(1.0));
        assert_eq!(run(right, "wrong"), Ok(0.25));
        assert_eq!(run(r#"grep -q '"row":{"test":1}' && echo 1"#, "x"), Ok(1.0));
        assert_eq!(run("echo 0", &"x".repeat(1 << 20)), Ok(0.0));
        for (line, why) in
            [("exit 3", "exit status: 3"), ("echo two", "two"), ("echo 1.5", "1.5"), ("sleep 9", "longer than")]
        {
            let failed = run(line, "x").expect_err(line);
            assert!(failed.contains(why) && failed.contains(line), "{failed}");
        }
    }

    #[test]
    fn a_reply_is_scored_once() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        let scorer = CommandScorer::new(format!("echo >> {}; echo 1", runs.display()));
        for reply in ["a", "b", "a", "a"] {
            assert_eq!(scorer.score("?", "", reply, &Value::Null), Ok(1.0));
        }
        assert_eq!(std::fs::read_to_string(runs).unwrap().lines().count(), 2);
    }
}

//! Another engine's program: `PROGRAM FILE --threads N` loads the file and says who it is; then each
//! job, a line of JSON on its standard input, is answered by a line. [`BenchOptions`] ask for a round
//! of measurements; `{"score": [[ids], ..]}` for the `negative_log_likelihood` of pieces of text. It
//! ends when its standard input closes, so none outlives this process.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tandem_engine::bench::{BenchOptions, BenchRound};

use crate::failure::{Code, Failure};
use crate::ready::to_line;

/// Longest line of a peer.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// A loaded peer.
pub(super) struct Peer {
    /// Its name and version, in its own words.
    pub(super) engine: String,
    program: PathBuf,
    child: Child,
    /// Taken when the peer is dropped.
    jobs: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// What a peer says when it has loaded.
#[derive(Debug, Deserialize)]
struct Hello {
    engine: String,
    threads: usize,
}

impl Peer {
    /// Starts `program` on `model` and waits until it has loaded.
    pub(super) fn start(program: &Path, model: &Path, threads: usize) -> Result<Self, Failure> {
        let mut child = Command::new(program)
            .arg(model)
            .args(["--threads", &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failure(program, format!("cannot be started: {e}")))?;
        let (Some(jobs), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failure(program, "has no pipes"));
        };
        let (program, answers) = (program.to_owned(), BufReader::new(answers));
        let mut peer = Self { engine: String::new(), program, child, jobs: Some(jobs), answers };
        let hello: Hello = peer.answer()?;
        if hello.threads != threads {
            return Err(failure(&peer.program, format!("runs {} threads instead of {threads}", hello.threads)));
        }
        peer.engine = hello.engine;
        Ok(peer)
    }

    /// Measures one round.
    pub(super) fn round(&mut self, options: &BenchOptions) -> Result<BenchRound, Failure> {
        let round: BenchRound = self.ask(options)?;
        let verify = round.verify.iter().map(|v| &v.tokens);
        let batch = round.batch.iter().map(|b| &b.sequences);
        if !round.verify.is_empty() && !verify.eq(&options.verify_tokens) {
            return Err(failure(&self.program, "answered with other verification sizes than it was asked for"));
        }
        if !round.batch.is_empty() && !batch.eq(&options.batch_sequences) {
            return Err(failure(&self.program, "answered with other batches than it was asked for"));
        }
        Ok(round)
    }

    /// Sends a job and reads the answer.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, job: &impl Serialize) -> Result<T, Failure> {
        let line = to_line(job)? + "\n";
        if let Some(jobs) = &mut self.jobs {
            jobs.write_all(line.as_bytes()).map_err(|e| failure(&self.program, format!("takes no job: {e}")))?;
        }
        self.answer()
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        let mut line = String::new();
        (&mut self.answers)
            .take(LINE_BYTES_MAX)
            .read_line(&mut line)
            .map_err(|e| failure(&self.program, format!("cannot be read: {e}")))?;
        if line.is_empty() {
            let status = self.child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            return Err(failure(&self.program, format!("ended ({status}) before it answered")));
        }
        serde_json::from_str(&line).map_err(|e| failure(&self.program, format!("answered no such JSON line: {e}")))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.jobs = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failure(program: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Failed, format!("the peer {}: {what}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that is a shell script with this body.
    fn peer(dir: &Path, body: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.join("peer");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
        path
    }

    #[test]
    fn a_peer_answers_rounds_until_its_input_closes() {
        let dir = tempfile::tempdir().expect("a folder");
        let body = r#"
            echo '{"engine":"sh on '"$1"'","threads":'"$3"'}'
            while read -r job; do
                echo '{"prefill_tokens_per_s":8,"decode_tokens_per_s":2,"verify":[{"tokens":4,"tokens_per_s":3}]}'
            done"#;
        let mut peer = Peer::start(&peer(dir.path(), body), Path::new("a.gguf"), 2).expect("starts");
        assert_eq!(peer.engine, "sh on a.gguf");
        let options = BenchOptions { verify_tokens: vec![4], ..BenchOptions::default() };
        for _ in 0..2 {
            assert!((peer.round(&options).expect("answers").verify[0].tokens_per_s - 3.0).abs() < 1e-9);
        }
        let other = BenchOptions { verify_tokens: vec![8], ..options };
        assert!(peer.round(&other).is_err_and(|e| e.to_string().contains("verification sizes")));
    }

    #[test]
    fn a_bad_peer_is_an_error_that_says_what_it_did() {
        let dir = tempfile::tempdir().expect("a folder");
        for (body, said) in [
            ("exit 3", "exit status: 3"),
            ("echo hello", "no such JSON line"),
            (r#"echo '{"engine":"e","threads":7}'"#, "7 threads instead of 2"),
            ("head -c 100000 /dev/zero", "no such JSON line"),
        ] {
            let started = Peer::start(&peer(dir.path(), body), Path::new("a.gguf"), 2).map(|_| ());
            assert!(started.as_ref().is_err_and(|e| e.to_string().contains(said)), "{body}: {started:?}");
        }
        let started = Peer::start(Path::new("/nowhere/peer"), Path::new("a.gguf"), 2).map(|_| ());
        assert!(started.is_err_and(|e| e.to_string().contains("cannot be started")));
    }
}

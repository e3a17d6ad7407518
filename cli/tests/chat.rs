//! `tandem chat` as a process, against a node that answers by hand: what is asked, what reaches the terminal,
//! and what the keys do (on a pseudo-terminal that `script` of util-linux gives).

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for something that takes its time; it only ends hung tests.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// An answer that would colour the terminal, rename its window and clear it.
const HOSTILE: &str = "red\u{1b}[31m title\u{1b}]0;owned\u{7} clear\u{9b}2J end";

/// A node that gives one answer to everything; to a question with "slow" in it, it never ends.
struct Node {
    url: String,
    asked: Receiver<Value>,
}

impl Node {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (tx, asked) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let tx = tx.clone();
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
                    while let Some((path, body)) = request(&mut reader) {
                        if !path.contains("completions") {
                            reply(&stream, "application/json", "{\"status\":\"ok\"}");
                            continue;
                        }
                        let asked: Value = serde_json::from_slice(&body).expect("JSON");
                        let slow = asked["messages"].to_string().contains("slow");
                        let _ = tx.send(asked);
                        answer(&stream, slow);
                        return;
                    }
                });
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Value {
        self.asked.recv_timeout(WAIT_MAX).expect("a question")
    }
}

fn request(reader: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
    let (mut path, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim();
        if line.is_empty() {
            break;
        }
        if path.is_empty() {
            path = line.split(' ').nth(1)?.to_owned();
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((path, body))
}

fn reply(mut stream: &TcpStream, kind: &str, body: &str) {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
    let _ = stream.write_all((head + body).as_bytes());
}

fn answer(mut stream: &TcpStream, slow: bool) {
    let piece = |text: &str| {
        let choice = json!({ "index": 0, "delta": { "content": text }, "finish_reason": null });
        format!("data: {}\n\n", json!({ "choices": [choice], "usage": null }))
    };
    let mut body = String::from("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n");
    if slow {
        body.push_str(&piece("and so on"));
        let _ = stream.write_all(body.as_bytes());
        // Until the client goes.
        let _ = stream.read(&mut [0; 1]);
        return;
    }
    // In pieces of one character: a sequence that is cut up must not pass either.
    HOSTILE.chars().for_each(|c| body.push_str(&piece(&c.to_string())));
    let usage = json!({ "completion_tokens": 4, "tandem": { "edge_tokens": 4, "degraded": false } });
    body.push_str(&format!("data: {}\n\ndata: [DONE]\n\n", json!({ "choices": [], "usage": usage })));
    let _ = stream.write_all(body.as_bytes());
}

fn command(state: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TANDEM_")) {
        command.env_remove(name);
    }
    command.env("TANDEM_STATE", state).env("TERM", "xterm");
    command
}

/// `… | tandem ARGS`.
fn piped(args: &[&str], input: &[u8]) -> Output {
    let state = tempfile::tempdir().expect("a folder");
    let mut command = command(state.path(), env!("CARGO_BIN_EXE_tandem"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary runs");
    child.stdin.take().expect("a pipe").write_all(input).expect("taken");
    child.wait_with_output().expect("it ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn what_is_piped_in_is_text_of_the_prompt() {
    let node = Node::start();
    let table: [(&[&str], &str, &str); 4] = [
        (&[], "hi\n", "hi"),
        (&[], "line one\nline two\n", "line one\nline two"),
        (&["summarise"], "line one\nline two\n", "summarise\n\nline one\nline two"),
        (&["hello"], "", "hello"),
    ];
    for (prompt, input, expected) in table {
        let args: Vec<&str> = ["chat", "--url", &node.url].iter().chain(prompt).copied().collect();
        let ended = piped(&args, input.as_bytes());
        assert!(ended.status.success(), "{}", text(&ended.stderr));
        let asked = node.asked();
        assert_eq!(asked["messages"], json!([{ "role": "user", "content": expected }]), "{prompt:?} {input:?}");
    }
    let empty = piped(&["chat", "--url", &node.url], b"\n");
    assert_eq!(empty.status.code(), Some(2), "{}", text(&empty.stderr));
    let bytes = piped(&["chat", "--url", &node.url], b"\xff\xfe");
    assert!(bytes.status.code() == Some(2) && text(&bytes.stderr).contains("UTF-8"), "{}", text(&bytes.stderr));
}

#[test]
fn an_open_pipe_that_says_nothing_holds_no_prompt_up() {
    let node = Node::start();
    let state = tempfile::tempdir().expect("a folder");
    let mut command = command(state.path(), env!("CARGO_BIN_EXE_tandem"));
    command.args(["chat", "hello", "--url", &node.url]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary runs");
    // Held open until the end.
    let _silent = child.stdin.take();
    assert_eq!(node.asked()["messages"][0]["content"], "hello");
    let ended = child.wait_with_output().expect("it ends");
    assert!(
        ended.status.success() && text(&ended.stderr).contains("standard input is open"),
        "{}",
        text(&ended.stderr)
    );
}

#[test]
fn an_answer_cannot_command_the_terminal() {
    let node = Node::start();
    let shown = piped(&["chat", "hello", "--url", &node.url], b"");
    let printed = text(&shown.stdout);
    assert!(printed.starts_with("red[31m title]0;owned clear2J end"), "{printed:?}");
    assert!(!printed.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{printed:?}");
    let json = piped(&["chat", "hello", "--json", "--url", &node.url], b"");
    let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(value["text"], HOSTILE, "programs get the text as it is");
    assert!(!text(&json.stdout).contains(|c: char| c.is_control() && c != '\n'), "escaped");
}

/// `tandem chat` on a pseudo-terminal.
#[cfg(target_os = "linux")]
struct Terminal {
    child: Child,
    seen: Arc<Mutex<String>>,
    /// What was seen before the last wait.
    from: usize,
}

#[cfg(target_os = "linux")]
impl Terminal {
    fn start(state: &Path, url: &str) -> Self {
        // `script` runs a shell. One that waits for the program (dash does) ends with 130 after a Ctrl-C that was the
        // program's; with `exec` the program takes its place.
        let chat = format!("exec '{}' chat --url {url}", env!("CARGO_BIN_EXE_tandem"));
        let mut command = command(state, "script");
        command.args(["--quiet", "--return", "--flush", "--command", &chat, "/dev/null"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("`script` of util-linux");
        let mut output = child.stdout.take().expect("a pipe");
        let seen = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut piece) {
                kept.lock().expect("unharmed").push_str(&String::from_utf8_lossy(&piece[..read]));
            }
        });
        let mut terminal = Self { child, seen, from: 0 };
        terminal.sees("> ");
        terminal
    }

    fn types(&mut self, keys: &str) {
        self.child.stdin.as_mut().expect("a pipe").write_all(keys.as_bytes()).expect("taken");
    }

    /// Waits until the program has ended. Standard input stays open meanwhile (`Child::wait` closes it): at its end
    /// `script` would hang up on a program that is still reading its last line.
    fn ends(&mut self) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(begun.elapsed() < WAIT_MAX, "it goes on: {:?}", self.seen.lock().expect("unharmed"));
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "{status}: {:?}", self.seen.lock().expect("unharmed"));
    }

    /// Waits until `text` is shown after what was waited for before.
    fn sees(&mut self, text: &str) {
        let begun = Instant::now();
        loop {
            let seen = self.seen.lock().expect("unharmed").clone();
            if let Some(at) = seen.get(self.from..).and_then(|new| new.find(text)) {
                self.from += at + text.len();
                return;
            }
            assert!(begun.elapsed() < WAIT_MAX, "{text:?} is not in {:?}", seen.get(self.from..));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn keys_edit_recall_paste_and_stop() {
    let node = Node::start();
    let state = tempfile::tempdir().expect("a folder");
    let mut terminal = Terminal::start(state.path(), &node.url);
    let last = |asked: &Value| {
        asked["messages"].as_array().and_then(|all| all.last().cloned()).expect("a message")["content"].clone()
    };

    // Typed, with a correction in the middle of the line.
    terminal.types(&format!("fist question{}r\r", "\x1b[D".repeat(11)));
    assert_eq!(last(&node.asked()), "first question");
    terminal.sees("4 tokens edge");
    terminal.sees("> ");
    // Recalled by the arrow key; the conversation goes along.
    terminal.types("\x1b[A\r");
    let asked = node.asked();
    assert_eq!(last(&asked), "first question");
    assert_eq!(asked["messages"].as_array().map(Vec::len), Some(3));
    terminal.sees("4 tokens edge");
    terminal.sees("> ");
    // Pasted lines are one question.
    terminal.types("\x1b[200~pasted one\npasted two\x1b[201~\r");
    assert_eq!(last(&node.asked()), "pasted one\npasted two");
    terminal.sees("4 tokens edge");
    terminal.sees("> ");
    // Ctrl-C stops the answer, not the program.
    terminal.types("a slow one\r");
    assert_eq!(last(&node.asked()), "a slow one");
    terminal.sees("and so on");
    terminal.types("\x03");
    terminal.sees("[stopped]");
    terminal.sees("> ");
    // Commands.
    for (keys, shown) in [("/help\r", "/system [TEXT]"), ("/mode fast\r", "is no mode"), ("/clear\r", "forgotten")] {
        terminal.types(keys);
        terminal.sees(shown);
        terminal.sees("> ");
    }
    terminal.types("/mode exact\r");
    terminal.sees("> ");
    terminal.types("/system Be brief.\r");
    terminal.sees("> ");
    terminal.types("once more\r");
    let asked = node.asked();
    let messages = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "once more" }]);
    assert_eq!((&asked["messages"], &asked["tandem"]["mode"]), (&messages, &json!("exact")));
    terminal.sees("4 tokens edge");
    terminal.sees("> ");
    terminal.types("/exit\r");
    terminal.ends();

    // The next conversation remembers what was asked.
    let mut terminal = Terminal::start(state.path(), &node.url);
    terminal.types("\x1b[A\x1b[A\r");
    assert_eq!(last(&node.asked()), "once more");
    terminal.sees("4 tokens edge");
    terminal.sees("> ");
    terminal.types("\x04");
    terminal.ends();
}

//! `tandem chat`: one question or a conversation with a running node.

mod answer;
mod command;
mod input;

use std::io::IsTerminal as _;
use std::time::Duration;

use serde_json::{Value, json};

use self::answer::{Answer, ask, summary};
use self::command::{Command, HELP};
use self::input::{Lines, Typed};
use crate::args::{ChatArgs, Global, ModeArg};
use crate::failure::{Code, Failure};
use crate::node_client::NodeClient;
use crate::ready::{print_json, print_line};
use crate::state;

/// Most messages of a conversation that are sent along; older ones are dropped.
const MESSAGES_MAX: usize = 64;

/// How a question is asked.
struct Asking<'a> {
    args: &'a ChatArgs,
    /// Who may write; none for the node's default.
    mode: Option<ModeArg>,
}

/// Asks once, or talks until the input ends.
pub(crate) async fn run(global: &Global, args: &ChatArgs) -> Result<(), Failure> {
    let client = NodeClient::new(global, &args.node)?;
    let terminal = std::io::stdin().is_terminal();
    if args.prompt.is_none() && terminal && std::io::stdout().is_terminal() && !global.json {
        return converse(global, args, &client).await;
    }
    tokio::select! {
        ended = once(global, args, &client) => ended,
        _ = tokio::signal::ctrl_c() => {
            // The half-written line stays; the node stops when the connection goes.
            print_line("");
            Err(Failure::reported(Code::Interrupted))
        }
    }
}

async fn once(global: &Global, args: &ChatArgs, client: &NodeClient) -> Result<(), Failure> {
    if args.prompt.is_none() {
        // Fails at once where no node runs, not after the text was read.
        client.send(client.get("/ready")).await?;
    }
    let piped = input::piped(args.prompt.is_some()).await?;
    let prompt = input::prompt(args.prompt.as_deref(), &piped).ok_or_else(|| {
        Failure::new(Code::Usage, "there is no question: standard input is empty; try tandem chat \"…\"")
    })?;
    let messages = [json!({ "role": "user", "content": prompt })];
    let mut answer = Answer::default();
    ask(&Asking { args, mode: args.mode }, client, &messages, !global.json, &mut answer).await?;
    if global.json {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        print_json(&json!({
            "text": answer.text,
            "finish_reason": answer.finish,
            "ttft_ms": answer.ttft.map(ms),
            "total_ms": ms(answer.took),
            "usage": answer.usage,
        }));
    } else {
        print_line(&format!("     [{}]", summary(&answer)));
    }
    Ok(())
}

async fn converse(global: &Global, args: &ChatArgs, client: &NodeClient) -> Result<(), Failure> {
    // Fails at once where no node runs, not after the first question was typed.
    client.send(client.get("/ready")).await?;
    let mut lines = Lines::new(&state::path(global)?)?;
    print_line("Ask something; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.");
    let mut asking = Asking { args, mode: args.mode };
    let mut system: Option<String> = None;
    let mut messages: Vec<Value> = Vec::new();
    loop {
        let text = match lines.next().await? {
            Typed::Text(text) => text,
            Typed::Interrupt => {
                print_line("Ctrl-D or /exit ends, /help lists commands.");
                continue;
            }
            Typed::End => return Ok(()),
        };
        match Command::parse(&text) {
            Command::Nothing => {}
            Command::Help => print_line(HELP),
            Command::Clear => {
                messages.clear();
                print_line("what was said is forgotten");
            }
            Command::ShowMode => {
                print_line(&format!("mode: {}", asking.mode.map_or("default (the node's)", ModeArg::name)));
            }
            Command::Mode(mode) => asking.mode = mode,
            Command::ShowSystem => {
                print_line(&format!("system prompt: {}", system.as_deref().unwrap_or("none")));
            }
            Command::System(text) => system = text,
            Command::Exit => return Ok(()),
            Command::Wrong(why) => print_line(&why),
            Command::Ask(question) => {
                messages.push(json!({ "role": "user", "content": question }));
                if !answer(&asking, client, system.as_deref(), &mut messages).await? {
                    messages.pop();
                }
            }
        }
    }
}

/// Asks what `messages` end with, and adds what was answered. False if nothing was.
async fn answer(
    asking: &Asking<'_>,
    client: &NodeClient,
    system: Option<&str>,
    messages: &mut Vec<Value>,
) -> Result<bool, Failure> {
    let said = system.map(|text| json!({ "role": "system", "content": text }));
    let sent: Vec<Value> = said.into_iter().chain(messages.iter().cloned()).collect();
    let mut answer = Answer::default();
    let ended = tokio::select! {
        ended = ask(asking, client, &sent, true, &mut answer) => Some(ended),
        _ = tokio::signal::ctrl_c() => None,
    };
    match ended {
        Some(Ok(())) => print_line(&format!("     [{}]", summary(&answer))),
        // The node stops when the connection goes.
        None => print_line("     [stopped]"),
        // The node said no (too long, busy), or is gone and may come back: the conversation can go on.
        Some(Err(failure)) if matches!(failure.code(), Code::Refused | Code::NoNode) => {
            if !answer.text.is_empty() {
                print_line("");
            }
            failure.report(false);
        }
        Some(Err(failure)) => return Err(failure),
    }
    if answer.text.is_empty() {
        return Ok(false);
    }
    messages.push(json!({ "role": "assistant", "content": answer.text }));
    let surplus = messages.len().saturating_sub(MESSAGES_MAX);
    messages.drain(..surplus);
    Ok(true)
}

//! The `tandem` command line: the parts of a fleet as processes (`up`, `edge`, `cloud`, `router`),
//! and what a person asks of them (`chat`, `explain`, `doctor`, `config`, `model`, `bench`, `lab`).
//!
//! Start with [`args`] (what can be typed) and [`failure`] (how it can end). [`up`] is the way from
//! nothing to a chat: it runs an edge in its own process and a router and a cloud node as children.
//!
//! Non-goals: no inference and no protocol here, only wiring, words and supervision.

mod address;
pub mod args;
mod bench;
mod chat;
mod cloud;
mod completions;
pub mod config;
mod config_command;
mod doctor;
mod edge;
mod explain;
pub mod failure;
mod lab;
mod lifeline;
mod logging;
mod metrics_endpoint;
mod model;
mod node_client;
mod pair;
mod ready;
mod renewal;
mod router;
mod signals;
mod state;
mod terminal;
mod up;
mod uplink;
mod upstream;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command};
use failure::{Code, Failure};

/// Parses the command line, does what it says, and gives the exit code (see [`Code`]).
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misread(&error),
    };
    let json = cli.global.json;
    let child = cli.command.has_parent();
    let checks = matches!(&cli.command, Command::Config(args) if args.command == args::ConfigCommand::Check);
    if !child && !checks {
        config::warn_of_strays(json);
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if child {
                // The parent reads it in place of the ready line, and words it for people.
                ready::print_line(&failure.to_json());
            } else {
                failure.report(json);
            }
            // A reader that went away (`tandem … | head`) needs no message.
            let _ = std::io::stdout().flush();
            failure.code().into()
        }
    }
}

/// A command line that cannot be understood, or asks for help: in clap's words, or as JSON if that was asked
/// for.
fn misread(error: &clap::Error) -> ExitCode {
    let asked = std::env::args_os().skip(1).take_while(|arg| arg != "--").any(|arg| arg == "--json");
    if !asked || !error.use_stderr() {
        error.exit();
    }
    let words = error.to_string();
    let words = words.trim().strip_prefix("error: ").unwrap_or(words.trim());
    let failure = Failure::new(Code::Usage, words.split_whitespace().collect::<Vec<_>>().join(" "));
    failure.report(true);
    failure.code().into()
}

fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Completions(args) => completions::run(&args),
        Command::Config(args) => config_command::run(&global, &args),
        Command::Bench(args) => bench::run(&args),
        Command::Model(args) => in_runtime(model::run(&global, &args)),
        Command::Lab(args) => in_runtime(lab::run(&global, &args)),
        Command::Up(args) => in_runtime(up::run(&global, &args)),
        Command::Edge(args) => in_runtime(edge::run(&global, &args)),
        Command::Cloud(args) => in_runtime(cloud::run(&global, &args)),
        Command::Router(args) => in_runtime(router::run(&global, &args)),
        Command::Chat(args) => in_runtime(chat::run(&global, &args)),
        Command::Explain(args) => in_runtime(explain::run(&global, &args)),
        Command::Doctor(args) => in_runtime(doctor::run(&global, &args)),
    }
}

/// Runs a command that waits for the network.
fn in_runtime(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Code::Failed, format!("the runtime cannot start: {e}")))?;
    let ended = runtime.block_on(work);
    // A thread that reads a terminal would hold the process up.
    runtime.shutdown_background();
    ended
}

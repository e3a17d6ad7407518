//! What can be typed.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::address;

mod lab;

pub use lab::{
    FormatArg, LabArgs, LabCalibrateArgs, LabCommand, LabEvalArgs, LabLinkArgs, LabModelArgs, LabReadArgs, LabelArg,
    ScorerArg,
};

/// Words after the list of commands.
pub(crate) const AFTER: &str = "\
Exit codes: 0 success, 1 failed, 2 bad command line, 3 configuration refused, 4 cannot listen,
5 state folder unusable, 6 no node answers, 7 the node refused, 8 doctor found a fault,
130 interrupted.

Settings: flag > environment (TANDEM_*) > file (tandem.toml) > default; see `tandem config show`.";

/// An edge model and a cloud model that answer as one.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, after_help = AFTER, max_term_width = 100)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// Folder for the CA, the router's log and tandem.toml [default: the system's data folder].
    #[arg(long, global = true, env = "TANDEM_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Configuration file [default: tandem.toml in the state folder, if there].
    #[arg(long, global = true, env = "TANDEM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Overrides one setting, e.g. `--set edge.requests_max=4`; may be repeated.
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// What to log to standard error, e.g. `info,tandem_router=debug` [env: TANDEM_LOG].
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
    /// Output for programs: JSON on standard output.
    #[arg(long, global = true)]
    pub json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs an edge, a router and a cloud node on this machine, with the embedded pair or your models.
    Up(UpArgs),
    /// Asks a running node; without a prompt, a conversation.
    Chat(ChatArgs),
    /// Runs an edge node: the OpenAI-compatible API and the page.
    Edge(EdgeArgs),
    /// Runs a cloud node.
    Cloud(CloudArgs),
    /// Runs a router: edges ask it which cloud node to use.
    Router(RouterArgs),
    /// Shows why each token of an answer stayed on the edge or went to the cloud.
    Explain(ExplainArgs),
    /// Checks this machine and says what to do about what is wrong.
    Doctor(NodeArgs),
    /// Checks or shows the settings.
    Config(ConfigArgs),
    /// Downloads, lists, shows and removes models.
    Model(ModelArgs),
    /// Measures.
    Bench(BenchArgs),
    /// Experiments: evaluation, calibration, links.
    Lab(LabArgs),
    /// Prints a completion script for a shell.
    Completions(CompletionsArgs),
}

impl Command {
    /// True for a process that another one started and listens to.
    #[must_use]
    pub fn has_parent(&self) -> bool {
        match self {
            Self::Edge(args) => args.identity.lifeline,
            Self::Cloud(args) => args.identity.lifeline,
            Self::Router(args) => args.identity.lifeline,
            _ => false,
        }
    }
}

/// How the API may be reached.
#[derive(Clone, Debug, Default, Args)]
pub struct ApiArgs {
    /// Address of the API and the page; port 0 for any [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub listen: Option<SocketAddr>,
    /// Bearer key that requests must carry [env: TANDEM_API_KEY].
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Serve the network without a key.
    #[arg(long)]
    pub insecure: bool,
    /// Model that unknown model names stand for, e.g. `tandem` [default: none, they are a 404].
    #[arg(long, value_name = "NAME")]
    pub default_model: Option<String>,
}

/// Options of `up`.
#[derive(Clone, Debug, Default, Args)]
pub struct UpArgs {
    /// How the API may be reached.
    #[command(flatten)]
    pub api: ApiArgs,
    /// UDP address of the cloud node [default: 127.0.0.1:4433, or any port if it is taken].
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub cloud_listen: Option<SocketAddr>,
    /// TCP address of the router [default: 127.0.0.1:7433, or any port if it is taken].
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub router_listen: Option<SocketAddr>,
    /// The edge alone: no router, no cloud.
    #[arg(long)]
    pub no_cloud: bool,
    /// Model of the edge: a GGUF file, a folder in Hugging Face layout, org/name or
    /// org/name:file.gguf from the local store, or `demo-edge` [default: demo-edge].
    #[arg(long, value_name = "MODEL")]
    pub edge_model: Option<String>,
    /// Model of the cloud node, named in the same way [default: demo-cloud].
    #[arg(long, value_name = "MODEL", conflicts_with = "no_cloud")]
    pub cloud_model: Option<String>,
    /// What runs the cloud's model instead of a process of ours.
    #[command(flatten)]
    pub upstream: UpstreamArgs,
}

/// Who a process is.
#[derive(Clone, Debug, Default, Args)]
pub struct IdentityArgs {
    /// Name of this node, unique in the fleet.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Folder with cert.pem, key.pem and trust.pem; without it, the CA in the state folder issues a
    /// certificate.
    #[arg(long, value_name = "DIR")]
    pub identity: Option<PathBuf>,
    /// Ends when standard input does, so that it never outlives the process that started it.
    #[arg(long, hide = true)]
    pub lifeline: bool,
}

/// Options of `edge`.
#[derive(Clone, Debug, Default, Args)]
pub struct EdgeArgs {
    /// How the API may be reached.
    #[command(flatten)]
    pub api: ApiArgs,
    /// Who this is.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// A cloud node to use, without a router: host:port, or server-name@host:port.
    #[arg(long, value_name = "ADDR", conflicts_with = "router")]
    pub cloud: Option<String>,
    /// Routers to ask for a cloud node: host:port, or server-name@host:port; may be repeated.
    #[arg(long, value_name = "ADDR")]
    pub router: Vec<String>,
    /// Model to run: a GGUF file, a folder in Hugging Face layout, org/name or org/name:file.gguf
    /// from the local store, or `demo-edge` [default: demo-edge].
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Name of the cloud's model to ask for, as the cloud node serves it [default: demo-cloud].
    #[arg(long, value_name = "NAME")]
    pub cloud_model: Option<String>,
}

/// Options of `cloud`.
#[derive(Clone, Debug, Default, Args)]
pub struct CloudArgs {
    /// UDP address to listen on; port 0 for any [default: 127.0.0.1:4433].
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub listen: Option<SocketAddr>,
    /// Address that the router tells edges [default: the address it listens on].
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Routers to register with; may be repeated.
    #[arg(long, value_name = "ADDR")]
    pub router: Vec<String>,
    /// Model to run: a GGUF file, a folder in Hugging Face layout, org/name or org/name:file.gguf
    /// from the local store, or `demo-cloud` [default: demo-cloud]. With --upstream, the name that edges
    /// ask for.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// What runs the model instead of this process.
    #[command(flatten)]
    pub upstream: UpstreamArgs,
    /// Who this is.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// Plain HTTP address for /metrics and /health.
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub metrics: Option<SocketAddr>,
    /// Serve /metrics to the network without a key.
    #[arg(long)]
    pub insecure: bool,
}

/// An engine behind a URL.
#[derive(Clone, Debug, Default, Args)]
pub struct UpstreamArgs {
    /// URL of an engine that runs the large model (llama-server): http://host:port; may be repeated
    /// for several that serve the same model.
    #[arg(long, value_name = "URL")]
    pub upstream: Vec<String>,
    /// Whose tokenizer the upstream has: a GGUF file, a folder with tokenizer.json, or a name in the
    /// local store.
    #[arg(long, value_name = "MODEL", requires = "upstream")]
    pub upstream_tokenizer: Option<String>,
    /// File with the bearer key that the upstream wants [env: TANDEM_UPSTREAM_KEY].
    #[arg(long, value_name = "FILE", requires = "upstream")]
    pub upstream_key_file: Option<PathBuf>,
}

/// Options of `router`.
#[derive(Clone, Debug, Default, Args)]
pub struct RouterArgs {
    /// TCP address to listen on; port 0 for any [default: 127.0.0.1:7433].
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub listen: Option<SocketAddr>,
    /// Who this is.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// Plain HTTP address for /metrics and /health.
    #[arg(long, value_name = "ADDR", value_parser = address::listen)]
    pub metrics: Option<SocketAddr>,
    /// Serve /metrics to the network without a key.
    #[arg(long)]
    pub insecure: bool,
}

/// Who may write an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// The edge model alone; nothing leaves the device.
    Local,
    /// Edge tokens where the edge is sure, cloud tokens where it is not.
    Auto,
    /// Token for token what the cloud model alone would write.
    Exact,
    /// The cloud writes.
    Cloud,
}

impl ModeArg {
    /// Name as in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Auto => "auto",
            Self::Exact => "exact",
            Self::Cloud => "cloud",
        }
    }
}

/// Where a running node is.
#[derive(Clone, Debug, Default, Args)]
pub struct NodeArgs {
    /// Address of the node [default: the `up` of this state folder, else http://127.0.0.1:8080].
    #[arg(long, env = "TANDEM_URL", value_name = "URL")]
    pub url: Option<String>,
    /// Bearer key of the node [env: TANDEM_API_KEY].
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
}

/// Options of `chat`.
#[derive(Clone, Debug, Default, Args)]
pub struct ChatArgs {
    /// What to ask; text on standard input is added to it. Without both, a conversation.
    pub prompt: Option<String>,
    /// Who may write the answer [default: the node's].
    #[arg(long)]
    pub mode: Option<ModeArg>,
    /// Model name.
    #[arg(long, default_value = "tandem")]
    pub model: String,
    /// Most tokens of an answer.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// 0 is greedy [default: the model's own].
    #[arg(long, value_parser = finite::<f32>)]
    pub temperature: Option<f32>,
    /// Seed of the sampling.
    #[arg(long)]
    pub seed: Option<i64>,
    /// Where the node is.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Options of `explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// Id of an answer or of its request; `last` for the newest.
    #[arg(default_value = "last")]
    pub id: String,
    /// Where the node is.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Options of `config`.
#[derive(Clone, Debug, Args)]
pub struct ConfigArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ConfigCommand,
}

/// What `config` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum ConfigCommand {
    /// Refuses unknown keys and values that cannot be.
    Check,
    /// Prints every setting with its value and where it came from.
    Show,
}

/// Options of `model`.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ModelCommand,
}

/// What `model` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum ModelCommand {
    /// Downloads a model into the local store, checks it, and resumes what broke off.
    Pull(ModelPullArgs),
    /// Lists the models on this machine.
    Ls,
    /// Prints what a model is, and what of it fits into this machine's memory.
    Show(ModelShowArgs),
    /// Removes a model from the local store.
    Rm(ModelRmArgs),
}

/// Options of `model pull`.
#[derive(Clone, Debug, Args)]
pub struct ModelPullArgs {
    /// org/name, org/name:file.gguf or org/name:Q4_K_M.
    pub name: String,
    /// Branch, tag or commit [default: main].
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// Options of `model show`.
#[derive(Clone, Debug, Args)]
pub struct ModelShowArgs {
    /// A GGUF file, a folder in Hugging Face layout, org/name or org/name:file.gguf from the local
    /// store, `demo-edge` or `demo-cloud`.
    pub name: String,
}

/// Options of `model rm`.
#[derive(Clone, Debug, Args)]
pub struct ModelRmArgs {
    /// org/name for all of it, org/name@REVISION for one revision.
    pub name: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Options of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What `bench` can measure.
#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// Prefill, decode and verification speed of one model, also against other engines; prints JSON.
    Engine(BenchEngineArgs),
    /// How well a model predicts a text, also according to other engines; prints JSON.
    Perplexity(BenchPerplexityArgs),
}

/// Options of `bench engine`.
#[derive(Clone, Debug, Args)]
pub struct BenchEngineArgs {
    /// A GGUF file, a folder in Hugging Face layout, org/name or org/name:file.gguf from the local
    /// store, `demo-edge` or `demo-cloud`.
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// Threads; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Whose operators compute.
    #[arg(long, value_enum, default_value_t = OperatorsArg::Own)]
    pub operators: OperatorsArg,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    pub prompt: usize,
    /// Tokens to decode.
    #[arg(long, default_value_t = 64)]
    pub decode: usize,
    /// Tokens of the verification passes.
    #[arg(long, default_values_t = [4, 8], value_delimiter = ',', value_name = "N")]
    pub verify: Vec<usize>,
    /// Sequences decoded side by side, such as 1,4,16.
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub batch: Vec<usize>,
    /// Rounds; the medians count.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// A program that measures another engine on the same GGUF file (bench/llama-peer,
    /// bench/candle-peer); its rounds take turns with ours. May be given more than once.
    #[arg(long, value_name = "PROGRAM")]
    pub peer: Vec<PathBuf>,
}

/// Whose operators compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OperatorsArg {
    /// Own kernels.
    Own,
    /// candle's in f32: the slow reference, to see what the kernels bring. Its threads are those of
    /// RAYON_NUM_THREADS.
    Candle,
}

/// Options of `bench perplexity`.
#[derive(Clone, Debug, Args)]
pub struct BenchPerplexityArgs {
    /// A GGUF file, a folder in Hugging Face layout, org/name or org/name:file.gguf from the local
    /// store, `demo-edge` or `demo-cloud`.
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// Threads; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// The text.
    #[arg(long, default_value = "bench/text/alice.txt", value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens of a piece; each piece is predicted by itself, from its second token on.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub context: usize,
    /// Put the model's beginning-of-text token before each piece.
    #[arg(long)]
    pub bos: bool,
    /// A program that scores the same token ids with another engine (bench/llama-peer). May be given
    /// more than once.
    #[arg(long, value_name = "PROGRAM")]
    pub peer: Vec<PathBuf>,
}

/// Options of `completions`.
#[derive(Clone, Copy, Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: clap_complete::Shell,
}

/// Reads a number; neither infinity nor NaN, with which no comparison means anything.
fn finite<F: std::str::FromStr + Into<f64> + Copy>(text: &str) -> Result<F, String> {
    let number = text.parse::<F>().ok().filter(|number| (*number).into().is_finite());
    number.ok_or_else(|| format!("`{text}` is no number; write one like 0.5"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn names_that_scripts_rely_on() {
        for line in [
            "tandem up --listen 127.0.0.1:0 --state /tmp/x --json",
            "tandem chat --mode local hello",
            "tandem edge --router a:1 --router b:2",
            "tandem edge --cloud a:1",
            "tandem up --edge-model a.gguf --cloud-model org/b:Q4_K_M",
            "tandem up --edge-model a.gguf --no-cloud",
            "tandem edge --model a.gguf --router a:1 --cloud-model b",
            "tandem cloud --model dir/",
            "tandem cloud --listen 0.0.0.0:4433 --router a:1 --advertise c:4433",
            "tandem router --listen 127.0.0.1:0 --metrics 127.0.0.1:0",
            "tandem explain last",
            "tandem doctor --json",
            "tandem doctor --url http://h:1 --api-key k",
            "tandem config show --set edge.requests_max=1",
            "tandem model pull org/name:Q4_K_M --revision main",
            "tandem model ls --json",
            "tandem model show org/name",
            "tandem model rm org/name --yes",
            "tandem bench engine --model demo-edge --threads 1",
            "tandem bench perplexity --model demo-edge --context 128",
            "tandem completions bash",
            "tandem up --listen localhost:8080 --cloud-listen localhost:0",
            "tandem chat --temperature 0.5 hello",
            "tandem lab eval --edge-model a.gguf --cloud-model org/b --policy p.json",
            "tandem lab eval --data a.jsonl --data b.jsonl --scorer text --answer-tokens 200",
            "tandem lab calibrate --data a.jsonl --out p.json --format gsm8k",
            "tandem lab link --edge-model a.gguf --cloud-model b.gguf",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        assert!(Cli::try_parse_from("tandem edge --cloud a:1 --router b:2".split(' ')).is_err());
        for number in ["nan", "inf", "-inf", "1e39", "warm"] {
            assert!(Cli::try_parse_from(["tandem", "chat", &format!("--temperature={number}")]).is_err(), "{number}");
            let share = format!("--share={number}");
            let fits = number == "1e39";
            assert_eq!(
                Cli::try_parse_from(["tandem", "lab", "calibrate", "--out=x", &share]).is_ok(),
                fits,
                "{number}"
            );
        }
    }
}

//! `tandem up`: an edge in this process, a router and a cloud node as its children.
//!
//! The edge answers as soon as its own model is loaded and whatever happens to the children, a cloud
//! that takes minutes to load included; they are started again when they die, and end with this process
//! however it ends ([`crate::lifeline`]).

mod child;
mod hint;

use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tandem_edge_node::api::Backend as _;
use tandem_transport::link::Link;
use tandem_transport::{CloseCode, Role};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::args::{Global, UpArgs};
use crate::config::{self, Flags, Settings};
use crate::edge::{self, Edge};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::{Ready, print_json, print_line};
use crate::state::{self, Running, StateDir};
use crate::terminal::visible;
use crate::{logging, pair, signals, upstream};
use child::{Change, ChildSpec, State, Supervised, supervise};

/// How long the ready line waits for the cloud link.
const LINK_GRACE: Duration = Duration::from_secs(5);

type Links = watch::Receiver<Option<Arc<Link>>>;

fn flags(args: &UpArgs) -> Flags {
    let mut flags = edge::api_flags(&args.api);
    flags.extend(args.cloud_listen.map(|addr| ("listen.cloud", addr.to_string().into(), "--cloud-listen")));
    flags.extend(args.edge_model.as_deref().map(|model| ("edge.model", model.into(), "--edge-model")));
    flags.extend(args.cloud_model.as_deref().map(|model| ("cloud.model", model.into(), "--cloud-model")));
    flags.extend(upstream::flags(&args.upstream));
    flags.extend(args.router_listen.map(|addr| ("listen.router", addr.to_string().into(), "--router-listen")));
    flags
}

/// Runs everything until told to end.
pub(crate) async fn run(global: &Global, args: &UpArgs) -> Result<(), Failure> {
    let path = state::path(global)?;
    let mut layers = config::layers(global, &path, flags(args))?;
    // All parts are on one machine: a dead one should be noticed soon.
    layers.prefer("link.profile", "near".into());
    if args.no_cloud {
        layers.prefer("edge.default_mode", "local".into());
    } else {
        // A wrong name is said at once, not by a child that dies; and the edge asks for the model by
        // the name under which the cloud will serve it.
        let name = if upstream::is_set(&layers) {
            layers.prefer("cloud.model", upstream::MODEL_NAME.into());
            let edge = layers.text("edge.model").unwrap_or_default().to_owned();
            layers.prefer("cloud.upstream_tokenizer", edge.into());
            layers.text("cloud.model").unwrap_or_default().to_owned()
        } else {
            pair::find_set(&layers, "cloud.model")?.name
        };
        layers.prefer("edge.cloud_model", name.into());
    }
    pair::find_set(&layers, "edge.model")?;
    pair::prefer(&mut layers);
    let mut settings = layers.settings().or_fail(Code::Config)?;
    logging::start(&settings.log)?;
    let shutdown = signals::shutdown(false)?;
    let listener = edge::listen(settings.listen.api, &settings.api).await?;
    let state = StateDir::open(&path)?;
    let lock = state.lock()?;
    // Made before the children start, so that all of them find the same CA.
    let issuer = state.issuer(None, Role::Edge, &settings.edge.name);
    let identity = issuer.issue()?;
    settings.peers = config::PeerSettings::default();
    let key = settings.api.key.clone();
    settings.cloud.name = config::Settings::default().cloud.name;

    let children_shutdown = CancellationToken::new();
    let end = children_shutdown.clone();
    // Before that, a failure ends this process and is said once.
    let announced = Arc::new(AtomicBool::new(false));
    let begin = async {
        let fleet = if args.no_cloud {
            None
        } else {
            let upstream = upstream::child_args(&settings.cloud, &args.upstream);
            Some(Fleet::start(global, &path, &settings, &layers, upstream, &announced, &children_shutdown).await?)
        };
        if let Some(fleet) = &fleet {
            settings.peers.routers = vec![fleet.router_address.clone()];
        }
        let answering = async {
            let edge = edge::start(settings, (&identity, issuer), &state, listener, shutdown.clone()).await?;
            if let Some(fleet) = &fleet {
                fleet.watch(edge.links.clone());
                wait_for_link(edge.links.clone()).await;
            }
            Ok::<_, Failure>(edge)
        };
        let edge = tokio::select! {
            edge = answering => edge?,
            failure = failed(fleet.as_ref()) => return Err(failure),
        };
        Ok((fleet, edge))
    };
    let begun = tokio::select! {
        begun = begin => Some(begun),
        () = shutdown.cancelled() => None,
    };
    let (fleet, edge) = match begun {
        Some(Ok(begun)) => begun,
        // Children that had begun die with their handles.
        Some(Err(failure)) => return Err(failure),
        None => return Ok(()),
    };
    announced.store(true, Ordering::Relaxed);
    let _note = lock.note(&Running { api: edge.api(), pid: std::process::id(), key });
    announce(global, &path, &edge, fleet.as_ref());
    let ended = edge.end(&shutdown).await;
    end.cancel();
    if let Some(fleet) = fleet {
        let _ = tokio::join!(fleet.cloud.task, fleet.router.task);
    }
    ended
}

/// The children.
struct Fleet {
    router: Supervised,
    cloud: Supervised,
    router_address: String,
}

impl Fleet {
    /// Starts the router, and the cloud once the router's address is known; that one loads its model
    /// while others go on.
    async fn start(
        global: &Global,
        state: &Path,
        settings: &Settings,
        layers: &config::Layers,
        upstream: Vec<OsString>,
        announced: &Arc<AtomicBool>,
        shutdown: &CancellationToken,
    ) -> Result<Self, Failure> {
        let program = std::env::current_exe().or_fail(Code::Failed)?;
        let begin = |role, key: &str, wanted: SocketAddr, free: bool, args: Vec<OsString>| {
            // Nobody asked for the usual port: any will do if it is taken.
            let listen = if layers.is_default(key) && !free { SocketAddr::new(wanted.ip(), 0) } else { wanted };
            let announced = Arc::clone(announced);
            let changed = move |role, change| report(role, &change, announced.load(Ordering::Relaxed));
            supervise(ChildSpec { program: program.clone(), role, listen, args }, changed, shutdown.clone())
        };
        let mut args = shared_args(global, state);
        let wanted = settings.listen.router;
        let router = begin("router", "listen.router", wanted, TcpListener::bind(wanted).is_ok(), args.clone());
        let router_address = router.serving().await?.listen;
        args.extend(["--router".into(), OsString::from(&router_address)]);
        args.extend(["--name".into(), OsString::from(&settings.cloud.name)]);
        args.extend(["--model".into(), OsString::from(&settings.cloud.model)]);
        args.extend(upstream);
        let wanted = settings.listen.cloud;
        let cloud = begin("cloud", "listen.cloud", wanted, UdpSocket::bind(wanted).is_ok(), args);
        Ok(Self { router, cloud, router_address })
    }

    /// Closes the link the moment the cloud's process ends: the system tells that sooner than the
    /// silence on the link does.
    fn watch(&self, links: Links) {
        let mut cloud = self.cloud.state.clone();
        tokio::spawn(async move {
            while cloud.changed().await.is_ok() {
                let gone = matches!(*cloud.borrow_and_update(), State::Away(_));
                let link = links.borrow().clone();
                if let Some(link) = link.filter(|_| gone) {
                    link.close(CloseCode::Done, "the cloud's process has ended");
                }
            }
        });
    }
}

/// Waits until a child cannot be started, or dies; for ever without children.
async fn failed(fleet: Option<&Fleet>) -> Failure {
    let Some(fleet) = fleet else { return std::future::pending().await };
    tokio::select! {
        failure = fleet.router.failure() => failure,
        failure = fleet.cloud.failure() => failure,
    }
}

/// Arguments that the children take over.
fn shared_args(global: &Global, state: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--state".into(), state.into()];
    if let Some(config) = &global.config {
        args.extend(["--config".into(), config.into()]);
    }
    if let Some(filter) = &global.log {
        args.extend(["--log".into(), filter.into()]);
    }
    for assignment in &global.set {
        args.extend(["--set".into(), assignment.into()]);
    }
    args
}

/// Tells the person at the terminal what happens to a child. What happens before the summary is in it,
/// or ends this process.
fn report(role: &'static str, change: &Change, announced: bool) {
    let meanwhile = if role == "cloud" { "the edge goes on alone" } else { "placed edges go on" };
    let words = match change {
        Change::Loading(since) => format!("is loading, for {} s so far; {meanwhile}", since.as_secs()),
        _ if !announced => return,
        Change::Serves { again: true, .. } => "is back".to_owned(),
        Change::Serves { url, .. } => format!("has loaded and serves at {url}"),
        Change::Ended { how, again_in } => {
            format!("ended ({how}); {meanwhile}; starts again in {} s", again_in.as_secs())
        }
    };
    eprintln!(" {role:6} {}", visible(&words));
}

/// Waits until the cloud link is up, but not long: the edge answers without it.
async fn wait_for_link(mut links: Links) {
    let up = links.wait_for(Option::is_some);
    if !matches!(tokio::time::timeout(LINK_GRACE, up).await, Ok(Ok(_))) {
        tracing::warn!("the cloud is not connected yet; the edge answers alone until it is");
    }
}

/// What a child said, while it serves.
fn serving(child: Option<&State>) -> Option<&Ready> {
    if let Some(State::Serving(ready)) = child { Some(ready) } else { None }
}

fn announce(global: &Global, state: &Path, edge: &Edge, fleet: Option<&Fleet>) {
    let state_of = |child: &Supervised| child.state.borrow().clone();
    let (router, cloud) = (fleet.map(|f| state_of(&f.router)), fleet.map(|f| state_of(&f.cloud)));
    let connected = edge.links.borrow().is_some();
    let status = edge.backend.status();
    if global.json {
        let pid = |child: &State| match child {
            State::Begun { pid } => *pid,
            State::Serving(ready) => Some(ready.pid),
            State::Away(_) => None,
        };
        let mut pids = json!({ "edge": std::process::id() });
        for (role, child) in [("router", &router), ("cloud", &cloud)] {
            if let Some(pid) = child.as_ref().and_then(pid) {
                pids[role] = json!(pid);
            }
        }
        let url = |child: &Option<State>| serving(child.as_ref()).map_or(Value::Null, |ready| json!(ready.url));
        let line = json!({
            "ready": true,
            "api": edge.api(),
            "page": edge.page(),
            "cloud": url(&cloud),
            "router": url(&router),
            "cloud_connected": connected,
            "cloud_state": status.cloud,
            "cloud_problem": status.cloud_problem,
            "state": state,
            "pids": pids,
        });
        print_json(&line);
        return;
    }
    print_line(&format!(" edge   {:<28} page   {}", edge.api(), edge.page()));
    if fleet.is_some() {
        let url = |child: &Option<State>| serving(child.as_ref()).map_or("is loading", |ready| &ready.url).to_owned();
        let away = if connected { "" } else { "  (not connected yet)" };
        print_line(&format!(" cloud  {:<28} router {}{away}", url(&cloud), url(&router)));
    } else {
        print_line(" cloud  none (--no-cloud)");
    }
    if let Some(problem) = &status.cloud_problem {
        print_line(&format!(" note   the edge answers alone: {problem}"));
    } else if fleet.is_some() && status.policy == "entropy" {
        print_line(
            " note   no rule was fitted to this pair: tokens go to the cloud by their entropy (setting `policy`)",
        );
    }
    print_line(&format!(" state  {} (with its own development CA)", state.display()));
    print_line(&format!(" Ask it:  {}     Ctrl-C ends it.", hint::command(state)));
}

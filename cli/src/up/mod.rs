//! `tandem up`: an edge in this process, a router and a cloud node as its children.
//!
//! The edge answers from the first moment on and whatever happens to the children; they are started
//! again when they die, and end with this process however it ends ([`crate::lifeline`]).

mod child;

use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
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
use crate::ready::print_line;
use crate::state::{self, Running, StateDir};
use crate::{logging, pair, signals};
use child::{Change, ChildSpec, Supervised, supervise};

/// How long the ready line waits for the cloud link.
const LINK_GRACE: Duration = Duration::from_secs(15);

type Links = watch::Receiver<Option<Arc<Link>>>;

fn flags(args: &UpArgs) -> Flags {
    let mut flags = edge::api_flags(&args.api);
    flags.extend(args.cloud_listen.map(|addr| ("listen.cloud", addr.to_string().into(), "--cloud-listen")));
    flags.extend(args.edge_model.as_deref().map(|model| ("edge.model", model.into(), "--edge-model")));
    flags.extend(args.cloud_model.as_deref().map(|model| ("cloud.model", model.into(), "--cloud-model")));
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
        let cloud = pair::find(layers.text("cloud.model").unwrap_or_default(), Code::Config)?;
        layers.prefer("edge.cloud_model", cloud.name.into());
    }
    pair::find(layers.text("edge.model").unwrap_or_default(), Code::Config)?;
    pair::prefer(&mut layers);
    let mut settings = layers.settings().or_fail(Code::Config)?;
    logging::start(&settings.log)?;
    let shutdown = signals::shutdown(false)?;
    let listener = edge::listen(settings.listen.api, &settings.api).await?;
    let state = StateDir::open(&path)?;
    let lock = state.lock()?;
    // Made before the children start, so that all of them find the same CA.
    let identity = state.identity(None, Role::Edge, &settings.edge.name)?;
    settings.peers = config::PeerSettings::default();
    settings.cloud.name = config::Settings::default().cloud.name;

    let children_shutdown = CancellationToken::new();
    let end = children_shutdown.clone();
    let begin = async {
        let fleet = if args.no_cloud {
            None
        } else {
            Some(Fleet::start(global, &path, &settings, &layers, &children_shutdown).await?)
        };
        if let Some(fleet) = &fleet {
            settings.peers.routers = vec![fleet.router_address.clone()];
        }
        let edge = edge::start(settings, &identity, listener, shutdown.clone()).await?;
        if let Some(fleet) = &fleet {
            fleet.watch(edge.links.clone());
            wait_for_link(edge.links.clone()).await;
        }
        Ok::<_, Failure>((fleet, edge))
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
    lock.note(&Running { api: edge.api(), pid: std::process::id() });
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
    async fn start(
        global: &Global,
        state: &Path,
        settings: &Settings,
        layers: &config::Layers,
        shutdown: &CancellationToken,
    ) -> Result<Self, Failure> {
        let shared = shared_args(global, state);
        let listen = |key: &str, wanted: SocketAddr, free: fn(SocketAddr) -> bool| {
            // Nobody asked for the usual port: any will do if it is taken.
            if layers.is_default(key) && !free(wanted) { SocketAddr::new(wanted.ip(), 0) } else { wanted }
        };
        let router = ChildSpec {
            role: "router",
            listen: listen("listen.router", settings.listen.router, |addr| TcpListener::bind(addr).is_ok()),
            args: shared.clone(),
        };
        let router = supervise(router, report, shutdown.clone()).await?;
        let router_address = ready_address(&router)?;
        let mut args = shared;
        args.extend(["--router".into(), OsString::from(&router_address)]);
        args.extend(["--name".into(), OsString::from(&settings.cloud.name)]);
        args.extend(["--model".into(), OsString::from(&settings.cloud.model)]);
        let cloud = ChildSpec {
            role: "cloud",
            listen: listen("listen.cloud", settings.listen.cloud, |addr| UdpSocket::bind(addr).is_ok()),
            args,
        };
        let cloud = supervise(cloud, report, shutdown.clone()).await?;
        Ok(Self { router, cloud, router_address })
    }

    /// Closes the link the moment the cloud's process ends: the system tells that sooner than the
    /// silence on the link does.
    fn watch(&self, links: Links) {
        let mut cloud = self.cloud.state.clone();
        tokio::spawn(async move {
            while cloud.changed().await.is_ok() {
                let gone = cloud.borrow_and_update().is_none();
                let link = links.borrow().clone();
                if let Some(link) = link.filter(|_| gone) {
                    link.close(CloseCode::Done, "the cloud's process has ended");
                }
            }
        });
    }
}

fn ready_address(child: &Supervised) -> Result<String, Failure> {
    let ready = child.state.borrow().clone();
    ready
        .map(|ready| ready.listen)
        .ok_or_else(|| Failure::new(Code::Failed, "the router ended as soon as it had begun"))
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

/// Tells the person at the terminal what happens to a child.
fn report(role: &'static str, change: Change) {
    match change {
        Change::Ended { how, again_in } => {
            let meanwhile = if role == "cloud" { "the edge goes on alone" } else { "placed edges go on" };
            eprintln!(" {role:6} ended ({how}); {meanwhile}; starts again in {} s", again_in.as_secs());
        }
        Change::Back => eprintln!(" {role:6} is back"),
    }
}

/// Waits until the cloud link is up, but not long: the edge answers without it.
async fn wait_for_link(mut links: Links) {
    let up = links.wait_for(Option::is_some);
    if !matches!(tokio::time::timeout(LINK_GRACE, up).await, Ok(Ok(_))) {
        tracing::warn!("the cloud is not connected yet; the edge answers alone until it is");
    }
}

fn announce(global: &Global, state: &Path, edge: &Edge, fleet: Option<&Fleet>) {
    let child = |child: &Supervised| child.state.borrow().clone();
    let (router, cloud) = (fleet.and_then(|f| child(&f.router)), fleet.and_then(|f| child(&f.cloud)));
    let connected = edge.links.borrow().is_some();
    let status = edge.backend.status();
    if global.json {
        let mut pids = json!({ "edge": std::process::id() });
        for ready in router.iter().chain(&cloud) {
            pids[ready.role.as_str()] = json!(ready.pid);
        }
        let url = |ready: &Option<crate::ready::Ready>| ready.as_ref().map_or(Value::Null, |r| json!(r.url));
        let line = json!({
            "ready": true,
            "api": edge.api(),
            "page": edge.page(),
            "cloud": url(&cloud),
            "router": url(&router),
            "cloud_connected": connected,
            "cloud_problem": status.cloud_problem,
            "state": state,
            "pids": pids,
        });
        print_line(&line.to_string());
        return;
    }
    print_line(&format!(" edge   {:<28} page   {}", edge.api(), edge.page()));
    match (cloud, router) {
        (Some(cloud), Some(router)) => {
            let away = if connected { "" } else { "  (not connected yet)" };
            print_line(&format!(" cloud  {:<28} router {}{away}", cloud.url, router.url));
        }
        _ => print_line(" cloud  none (--no-cloud)"),
    }
    if let Some(problem) = &status.cloud_problem {
        print_line(&format!(" note   the edge answers alone: {problem}"));
    } else if fleet.is_some() && status.policy == "entropy" {
        print_line(
            " note   no rule was fitted to this pair: tokens go to the cloud by their entropy (setting `policy`)",
        );
    }
    print_line(&format!(" state  {} (with its own development CA)", state.display()));
    print_line(" Ask it:  tandem chat \"What is the capital of Peru?\"     Ctrl-C ends it.");
}

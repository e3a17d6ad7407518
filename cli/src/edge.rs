//! An edge node: as the process `tandem edge`, and inside `tandem up`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tandem_edge_node::api::{ApiOptions, Hosts, Origins, check_bind, router_with};
use tandem_edge_node::http;
use tandem_edge_node::node::{EdgeNode, EdgeParts};
use tandem_edge_node::request::Mode;
use tandem_edge_node::serve::NodeBackend;
use tandem_engine::trunk::announced;
use tandem_proto::message::Hello;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::link::Link;
use tandem_transport::{Identity, Role};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::address::reachable;
use crate::args::{ApiArgs, EdgeArgs, Global};
use crate::config::{self, ApiSettings, Flags, Settings};
use crate::failure::{Code, Failure, OrFail as _};
use crate::metrics_endpoint::{self, bind};
use crate::ready::Ready;
use crate::renewal::Issuer;
use crate::state::{self, Running, StateDir};
use crate::{logging, pair, signals, uplink};

/// Time that answers under way may take to end by themselves after the shutdown was asked for.
const GRACE: Duration = Duration::from_secs(5);
/// Time that clients may take after that to read why their answers ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// The flags that `edge` and `up` share.
pub(crate) fn api_flags(args: &ApiArgs) -> Flags {
    let mut flags = Flags::new();
    flags.extend(args.listen.map(|addr| ("listen.api", addr.to_string().into(), "--listen")));
    flags.extend(args.api_key.as_deref().map(|key| ("api.key", key.into(), "--api-key")));
    flags.extend(args.insecure.then(|| ("api.insecure", true.into(), "--insecure")));
    flags.extend(args.default_model.as_deref().map(|name| ("api.default_model", name.into(), "--default-model")));
    flags
}

fn flags(args: &EdgeArgs) -> Flags {
    let mut flags = api_flags(&args.api);
    flags.extend(args.cloud.as_deref().map(|addr| ("peers.cloud", addr.into(), "--cloud")));
    flags.extend((!args.router.is_empty()).then(|| ("peers.routers", args.router.clone().into(), "--router")));
    flags.extend(args.identity.name.as_deref().map(|name| ("edge.name", name.into(), "--name")));
    let identity = args.identity.identity.as_ref().and_then(|dir| dir.to_str());
    flags.extend(identity.map(|dir| ("peers.identity", dir.into(), "--identity")));
    flags.extend(args.model.as_deref().map(|model| ("edge.model", model.into(), "--model")));
    flags.extend(args.cloud_model.as_deref().map(|name| ("edge.cloud_model", name.into(), "--cloud-model")));
    flags
}

/// Runs an edge node until it is told to end.
pub(crate) async fn run(global: &Global, args: &EdgeArgs) -> Result<(), Failure> {
    let path = state::path(global)?;
    let mut layers = config::layers(global, &path, flags(args))?;
    pair::find_set(&layers, "edge.model")?;
    pair::prefer(&mut layers);
    let mut settings = layers.settings().or_fail(Code::Config)?;
    if settings.peers.cloud.is_none() && settings.peers.routers.is_empty() && layers.is_default("edge.default_mode") {
        // No router and no cloud is configured.
        settings.edge.default_mode = Mode::Local;
    }
    logging::start(&settings.log)?;
    let shutdown = signals::shutdown(args.identity.lifeline)?;
    let listener = listen(settings.listen.api, &settings.api).await?;
    let state = StateDir::open(&path)?;
    let key = settings.api.key.clone();
    let issuer = state.issuer(settings.peers.identity.as_deref(), Role::Edge, &settings.edge.name);
    let identity = issuer.issue()?;
    let edge = tokio::select! {
        edge = start(settings, (&identity, issuer), &state, listener, shutdown.clone()) => edge?,
        // Loading cannot be stopped, but it ends with the process.
        () = shutdown.cancelled() => return Ok(()),
    };
    let _note = state.note_edge(&Running { api: edge.api(), pid: std::process::id(), key });
    Ready {
        ready: true,
        role: "edge".into(),
        node: identity.id().name.clone(),
        listen: edge.address.to_string(),
        url: edge.api(),
        page: Some(edge.page()),
        metrics: None,
        pid: std::process::id(),
    }
    .print(global.json)?;
    edge.end(&shutdown).await
}

/// Listens for the API, if the rule for open addresses lets it.
pub(crate) async fn listen(address: SocketAddr, api: &ApiSettings) -> Result<TcpListener, Failure> {
    check_bind(address, api.key.as_deref(), api.insecure).or_fail(Code::Listen)?;
    bind(address, "--listen").await
}

/// A serving edge node.
pub(crate) struct Edge {
    pub(crate) backend: Arc<NodeBackend>,
    pub(crate) address: SocketAddr,
    /// The link to the cloud as it comes and goes.
    pub(crate) links: watch::Receiver<Option<Arc<Link>>>,
    /// Ends after the shutdown.
    pub(crate) serving: JoinHandle<Result<(), Failure>>,
}

impl Edge {
    /// Serves until `shutdown` is asked for and what was under way has ended.
    pub(crate) async fn end(self, shutdown: &CancellationToken) -> Result<(), Failure> {
        let drain = async {
            shutdown.cancelled().await;
            self.backend.drain();
        };
        let (served, ()) = tokio::join!(self.serving, drain);
        self.backend.save().await;
        served.or_fail(Code::Failed)?
    }

    /// Base address for OpenAI clients.
    pub(crate) fn api(&self) -> String {
        format!("http://{}/v1", reachable(self.address))
    }

    /// Address of the chat page.
    pub(crate) fn page(&self) -> String {
        format!("http://{}/", reachable(self.address))
    }
}

/// Loads the model and serves on `listener` until `shutdown`.
pub(crate) async fn start(
    mut settings: Settings,
    (identity, issuer): (&Identity, Issuer),
    state: &StateDir,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<Edge, Failure> {
    let address = listener.local_addr().or_fail(Code::Listen)?;
    let metrics = metrics_endpoint::install(shutdown.clone())?;
    tandem_edge_node::metric_definitions::describe();
    let policy_file = pair::policy_file()?;
    let policy = settings.policy.build(policy_file.as_ref()).or_fail(Code::Config)?;
    let backend = NodeBackend::loading(Some(metrics));
    let options = ApiOptions {
        api_key: settings.api.key,
        any_host: settings.api.insecure,
        hosts: Hosts::parse(&settings.api.hosts).or_fail(Code::Config)?,
        origins: Origins::parse(&settings.api.cors_origins).or_fail(Code::Config)?,
        default_alias: settings.api.default_model,
    };
    // Up at once, so that clients hear "loading" and not "connection refused".
    let routes = router_with(backend.clone(), options);
    let serving = tokio::spawn(serve(listener, routes, settings.api.connections_max, backend.clone(), shutdown));
    let loaded = pair::load_aside(&settings.edge.model, settings.engine.edge_threads).await?;
    settings.edge.model.clone_from(&loaded.card.name);
    // Routers and cloud nodes know the node by its certificate.
    settings.edge.name.clone_from(&identity.id().name);
    let hello =
        Hello::new(&settings.edge.name, pair::now_ms(), vec![announced(loaded.card, settings.edge.trunk_layers)]);
    let bulk = BulkInbox::default();
    let tenant_key = identity.tenant_key();
    let uplinks = uplink::start(
        &settings.peers,
        &settings.edge.cloud_model,
        (identity, issuer),
        &settings.link.quic(),
        &hello,
        &bulk,
    )?;
    let links = uplinks.links();
    let parts = EdgeParts {
        model: loaded.model,
        tokenizer: loaded.tokenizer,
        chat: loaded.chat,
        stop_tokens: loaded.stop_tokens,
        sampling: loaded.sampling,
        short_json: settings.api.short_json,
        policy,
        uplinks,
        bulk,
        tenant_key,
        kv_folder: Some(state.kv()),
    };
    backend.loaded(EdgeNode::start(settings.edge, parts).or_fail(Code::Config)?);
    Ok(Edge { backend, address, links, serving })
}

/// Serves until `shutdown`, and longer for what is under way: answers end by themselves, or with an error
/// that says why.
async fn serve(
    listener: TcpListener,
    routes: axum::Router,
    connections_max: usize,
    backend: Arc<NodeBackend>,
    shutdown: CancellationToken,
) -> Result<(), Failure> {
    let serving = http::serve(listener, routes, connections_max, shutdown.clone());
    let too_late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(GRACE).await;
        backend.close();
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        () = serving => Ok(()),
        () = too_late => Ok(()),
    }
}

//! `tandem cloud`: a cloud node as a process.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tandem_cloud_node::node::{CloudNode, NodeLoad};
use tandem_cloud_node::target::Target;
use tandem_cloud_node::target::own::OwnEngine;
use tandem_engine::tokenizer::Tokenizer;
use tandem_engine::trunk::announced;
use tandem_proto::message::{Hello, ModelCard};
use tandem_router::client::{Registration, RouterClient};
use tandem_router::node::{LoadReport, ModelCard as RoutedModel, NodeCard};
use tandem_transport::{Identity, Role, Server, Settings as QuicSettings};
use tokio_util::sync::CancellationToken;

use crate::args::{CloudArgs, Global};
use crate::config::{self, Flags, PeerSettings, Settings};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::Ready;
use crate::renewal::keep_fresh;
use crate::state::{self, StateDir};
use crate::uplink::tls_pem;
use crate::{logging, metrics_endpoint, pair, signals, upstream};

fn flags(args: &CloudArgs) -> Flags {
    let mut flags = Flags::new();
    flags.extend(args.listen.map(|addr| ("listen.cloud", addr.to_string().into(), "--listen")));
    flags.extend(args.metrics.map(|addr| ("listen.metrics", addr.to_string().into(), "--metrics")));
    flags.extend(args.insecure.then(|| ("api.insecure", true.into(), "--insecure")));
    flags.extend(args.advertise.as_deref().map(|addr| ("peers.advertise", addr.into(), "--advertise")));
    flags.extend((!args.router.is_empty()).then(|| ("peers.routers", args.router.clone().into(), "--router")));
    flags.extend(args.identity.name.as_deref().map(|name| ("cloud.name", name.into(), "--name")));
    let identity = args.identity.identity.as_ref().and_then(|dir| dir.to_str());
    flags.extend(identity.map(|dir| ("peers.identity", dir.into(), "--identity")));
    flags.extend(args.model.as_deref().map(|model| ("cloud.model", model.into(), "--model")));
    flags.extend(upstream::flags(&args.upstream));
    flags
}

/// Runs a cloud node until it is told to end.
pub(crate) async fn run(global: &Global, args: &CloudArgs) -> Result<(), Failure> {
    let path = state::path(global)?;
    let mut layers = config::layers(global, &path, flags(args))?;
    pair::prefer(&mut layers);
    let mut settings = layers.settings().or_fail(Code::Config)?;
    if settings.cloud.upstream.is_empty() {
        pair::find_set(&layers, "cloud.model")?;
    } else if layers.is_default("cloud.model") {
        settings.cloud.model.clear();
    }
    logging::start(&settings.log)?;
    if let Some(key) = upstream::key_of_file(&args.upstream)? {
        settings.cloud.upstream_key = Some(key);
    }
    let shutdown = signals::shutdown(args.identity.lifeline)?;
    let state = StateDir::open(&path)?;
    let issuer = state.issuer(settings.peers.identity.as_deref(), Role::Cloud, &settings.cloud.name);
    let identity = issuer.issue()?;
    // Edges and routers know the node by its certificate.
    settings.cloud.name.clone_from(&identity.id().name);
    // The metrics are served before there is a node: loading takes a while.
    let started: Arc<OnceLock<CloudNode>> = Arc::default();
    let metrics = match settings.listen.metrics {
        // Parts of an `up` share its settings, and would all want the one address.
        Some(addr) if !args.identity.lifeline => {
            let handle = metrics_endpoint::install(shutdown.clone())?;
            tandem_cloud_node::metric_definitions::describe();
            let node = started.clone();
            let refresh = move || node.get().into_iter().for_each(|node| node.publish_gauges());
            Some(metrics_endpoint::serve(addr, settings.api.insecure, handle, shutdown.clone(), refresh).await?)
        }
        _ => None,
    };
    let served = tokio::select! {
        served = serve(&settings) => served?,
        // Loading cannot be stopped, but it ends with the process.
        () = shutdown.cancelled() => return Ok(()),
    };
    let Served { target, tokenizer, card } = served;
    settings.cloud.model.clone_from(&card.name);
    let boot_epoch = pair::now_ms();
    let announced = announced(card.clone(), settings.cloud.trunk_layers);
    let hello = Hello::new(&settings.cloud.name, boot_epoch, vec![announced]);
    let node = CloudNode::with_target(target, tokenizer, settings.cloud.clone());
    let _ = started.set(node.clone());
    let quic = quic(&settings);
    let server =
        Server::bind_for(settings.listen.cloud, &identity, quic, hello, &[Role::Edge]).or_fail(Code::Listen)?;
    let listen = server.local_addr().or_fail(Code::Listen)?;
    let renewal = server.renewal();
    let registering = if settings.peers.routers.is_empty() {
        keep_fresh(issuer, identity.clone(), move |next| renewal.set_identity(next));
        None
    } else {
        let card = node_card(&identity, &settings.peers, &listen, &card, boot_epoch)?;
        let client = RouterClient::connect(&settings.peers.routers, &tls_pem(&identity)).or_fail(Code::Config)?;
        let calls = client.clone();
        keep_fresh(issuer, identity.clone(), move |next| {
            renewal.set_identity(next).or_fail(Code::State)?;
            calls.set_tls(&tls_pem(next)).or_fail(Code::State)
        });
        Some(tokio::spawn(register(Registration::new(client, card), node.clone(), shutdown.clone())))
    };
    Ready {
        ready: true,
        role: "cloud".into(),
        node: settings.cloud.name.clone(),
        listen: listen.to_string(),
        url: format!("quic://{listen}"),
        page: None,
        metrics,
        pid: std::process::id(),
    }
    .print(global.json)?;
    node.serve(server, shutdown).await;
    match registering {
        Some(task) => task.await.or_fail(Code::Failed)?,
        None => Ok(()),
    }
}

/// What a node serves.
pub(crate) struct Served {
    pub(crate) target: Arc<dyn Target>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) card: ModelCard,
}

/// Loads the model, or finds the engines that run it elsewhere.
async fn serve(settings: &Settings) -> Result<Served, Failure> {
    if !settings.cloud.upstream.is_empty() {
        return upstream::connect(&settings.cloud).await;
    }
    let loaded = pair::load_aside(&settings.cloud.model, settings.engine.cloud_threads).await?;
    let engine = OwnEngine::start(loaded.model, &settings.cloud).or_fail(Code::Config)?;
    Ok(Served { target: Arc::new(engine), tokenizer: loaded.tokenizer, card: loaded.card })
}

/// The links' settings: a device may open as many streams as the node has sessions for it.
fn quic(settings: &Settings) -> QuicSettings {
    let sessions = u32::try_from(settings.cloud.bounds.sessions_per_device_max).unwrap_or(u32::MAX);
    QuicSettings { sessions, ..settings.link.quic() }
}

/// Keeps the node registered. What no retry can mend ends the whole process: no edge would find it.
async fn register(registration: Registration, node: CloudNode, shutdown: CancellationToken) -> Result<(), Failure> {
    let reports = Reports::default();
    let ended = registration.run(|| reports.next(node.load()), shutdown.clone()).await;
    shutdown.cancel();
    ended.map_err(|e| Failure::new(Code::Config, format!("the router does not take this node: {e}")))
}

/// The card under which edges find the node.
fn node_card(
    identity: &Identity,
    peers: &PeerSettings,
    listen: &std::net::SocketAddr,
    model: &ModelCard,
    boot_epoch: u64,
) -> Result<NodeCard, Failure> {
    let address = match &peers.advertise {
        Some(address) => address.clone(),
        None if listen.ip().is_unspecified() => {
            let message = format!("{listen} is no address that edges could dial; say which with --advertise HOST:PORT");
            return Err(Failure::new(Code::Config, message));
        }
        None => listen.to_string(),
    };
    let card = NodeCard {
        name: identity.id().name.clone(),
        address,
        server_name: identity.id().dns_name(),
        region: peers.region.clone(),
        models: vec![RoutedModel { name: model.name.clone(), digest: model.digest }],
        boot_epoch,
    };
    card.check().or_fail(Code::Config)?;
    Ok(card)
}

/// Turns the node's counters into reports.
#[derive(Debug, Default)]
struct Reports {
    last: Mutex<Option<NodeLoad>>,
}

impl Reports {
    fn next(&self, load: NodeLoad) -> LoadReport {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // By the time in the model: by the clock, a node that has just got work would seem slow.
        let rate = last.map_or(0, |last| {
            let busy_us = load.busy_us.saturating_sub(last.busy_us).max(1);
            load.rows.saturating_sub(last.rows).saturating_mul(1_000_000) / busy_us
        });
        *last = Some(load);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        LoadReport {
            sessions: count(load.sessions),
            sessions_max: count(load.sessions_max),
            queued_tokens: load.rows_waiting as u64,
            tokens_per_second: u32::try_from(rate).unwrap_or(u32::MAX),
            kv_blocks_used: count(load.kv_blocks.saturating_sub(load.kv_blocks_free)),
            kv_blocks_max: count(load.kv_blocks),
            stalled_ms: load.stalled_ms,
            prefixes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_listens_everywhere_must_say_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let identity = state.identity(None, Role::Cloud, "cloud-7").unwrap();
        let card = ModelCard {
            name: "m".into(),
            digest: tandem_proto::ids::Digest::default(),
            tokenizer: tandem_proto::ids::Digest::default(),
            tokenizer_marks: Vec::new(),
            layers: Vec::new(),
            numerics: String::new(),
            hidden_size: 1,
            context_tokens: 1,
            exactness: tandem_proto::message::Exactness::Bitwise,
        };
        let mut peers = PeerSettings::default();
        let everywhere = "0.0.0.0:4433".parse().unwrap();
        let failure = node_card(&identity, &peers, &everywhere, &card, 1).unwrap_err();
        assert!(failure.to_string().contains("--advertise"), "{failure}");
        peers.advertise = Some("cloud.example:4433".into());
        let card = node_card(&identity, &peers, &everywhere, &card, 1).unwrap();
        assert_eq!((card.address.as_str(), card.server_name.as_str()), ("cloud.example:4433", "cloud-7.tandem"));
    }

    /// With fewer streams than sessions, answers of a device that has its share waited for a stream until
    /// they gave the cloud up.
    #[test]
    fn a_device_has_a_stream_for_each_of_its_sessions() {
        let mut settings = Settings::default();
        settings.cloud.bounds.sessions_per_device_max = 77;
        assert_eq!(quic(&settings).sessions, 77);
        let default = Settings::default();
        assert!(quic(&default).sessions as usize >= default.edge.requests_max);
    }

    #[test]
    fn reports_count_rows_and_how_fast_they_are_fed() {
        let reports = Reports::default();
        let load = NodeLoad { sessions: 3, sessions_max: 9, kv_blocks: 10, kv_blocks_free: 4, ..NodeLoad::default() };
        assert_eq!(reports.next(load).tokens_per_second, 0);
        // Two jobs with 900 rows to go; 1000 rows took half a second.
        let second = reports.next(NodeLoad { jobs: 2, rows_waiting: 900, rows: 1000, busy_us: 500_000, ..load });
        assert_eq!((second.queued_tokens, second.tokens_per_second), (900, 2000));
        assert_eq!((second.sessions, second.kv_blocks_used, second.kv_blocks_max), (3, 6, 10));
        assert_eq!(reports.next(NodeLoad { rows: 1000, busy_us: 500_000, ..load }).tokens_per_second, 0, "idle since");
    }
}

//! A router: the control plane behind gRPC with mutual TLS.
//!
//! [`serve`] takes a bound listener and runs until its token is cancelled; what it answered is on
//! disk by then. Who may call what is decided by the role and name in the peer's certificate.

mod accept;
mod service;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tandem_proto::rpc::control_server::ControlServer;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig, server::Router};

use self::service::Service;
use crate::{
    control::{
        Command, Request, RequestId,
        log::{CommandLog, LogError, SingleNode},
    },
    metric_definitions as names,
    placement::PlacementConfig,
    tls::TlsPem,
};

/// Largest message in either direction, bytes.
pub const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// Most open connections; more wait in the system's backlog.
pub const CONNECTIONS_MAX: usize = 4096;
/// Most requests under way on one connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 64;
/// Most requests under way on all connections; more are told to come back.
pub const REQUESTS_MAX: usize = 1024;
/// Longest time for one request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for a TLS handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often old nodes and tickets are forgotten and the gauges are set.
const EXPIRE_EVERY: Duration = Duration::from_secs(5);
/// How long open connections may take to end after the shutdown was asked for.
const GRACE: Duration = Duration::from_secs(2);
/// A silent peer is asked for a sign of life so often, and given half as long to answer.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// What a router needs.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Certificate, key and CA.
    pub tls: TlsPem,
    /// Where the state is kept; in memory only if `None`.
    pub state_dir: Option<PathBuf>,
    /// The numbers behind placement.
    pub placement: PlacementConfig,
}

/// Why a router did not start or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The state cannot be read or written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The listener is unusable.
    #[error("router listener: {0}")]
    Listen(#[from] io::Error),
    /// The key material is unusable, or the transport failed.
    #[error("router transport: {0}; check the certificate, key and CA")]
    Transport(#[from] tonic::transport::Error),
    /// The serving task has died.
    #[error("the router's task has stopped unexpectedly")]
    Stopped,
}

/// A running router.
#[derive(Debug)]
pub struct Serving {
    address: SocketAddr,
    tls: watch::Sender<TlsPem>,
    task: JoinHandle<Result<(), ServerError>>,
}

impl Serving {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the certificate of the running router.
    #[must_use]
    pub fn renewal(&self) -> Renewal {
        Renewal(self.tls.clone())
    }

    /// Waits for its end: after the shutdown token was cancelled, or an error.
    pub async fn join(self) -> Result<(), ServerError> {
        self.task.await.map_err(|_| ServerError::Stopped)?
    }
}

/// Changes the certificate of a running router.
#[derive(Debug, Clone)]
pub struct Renewal(watch::Sender<TlsPem>);

impl Renewal {
    /// Uses `tls` from now on: later connections get it, earlier ones are asked to end (HTTP/2 GOAWAY) and have
    /// a moment for what is under way.
    ///
    /// # Errors
    /// [`ServerError::Transport`]; the earlier certificate stays in use.
    pub fn set_tls(&self, tls: TlsPem) -> Result<(), ServerError> {
        builder(&tls)?;
        self.0.send_replace(tls);
        Ok(())
    }
}

/// The router's time: the wall clock at its start, and from then on what has passed. A wall clock that is set
/// while it runs makes nothing older or younger.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start_ms: u64,
    since: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        let start_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        Self { start_ms, since: Instant::now() }
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn now_ms(self) -> u64 {
        self.start_ms.saturating_add(self.since.elapsed().as_millis() as u64)
    }
}

/// Starts a router on `listener`. It has its state and answers as soon as this returns.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    shutdown: CancellationToken,
) -> Result<Serving, ServerError> {
    let clock = Clock::start();
    let now_ms = clock.now_ms();
    let log = Arc::new(match &config.state_dir {
        Some(folder) => SingleNode::open(folder, config.placement, now_ms).await?,
        None => SingleNode::in_memory(config.placement, now_ms),
    });
    let address = listener.local_addr()?;
    let service = ControlServer::new(Service::new(Arc::clone(&log), clock, REQUESTS_MAX))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    // What is wrong with the key material shows now.
    let first = builder(&config.tls)?.add_service(service.clone());
    tracing::info!(%address, "router listens");
    let acceptor = accept::bounded(listener, CONNECTIONS_MAX, shutdown.clone());
    let (tls, renewed) = watch::channel(config.tls);
    let task = tokio::spawn(async move {
        let ticks = expire_until(Arc::clone(&log), clock, shutdown.clone());
        let serving = serve_renewed(first, service, acceptor, renewed, shutdown);
        let (served, ()) = tokio::join!(serving, ticks);
        log.flush().await?;
        Ok(served?)
    });
    Ok(Serving { address, tls, task })
}

/// A server with this key material.
fn builder(tls: &TlsPem) -> Result<Server, tonic::transport::Error> {
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&tls.certificate, &tls.key))
        .client_ca_root(Certificate::from_pem(&tls.ca))
        .timeout(HANDSHAKE_TIMEOUT);
    Ok(Server::builder()
        .tls_config(tls)?
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE / 2)))
}

/// Serves until `shutdown`. A certificate is part of tonic's server, so each one has its own, which takes over
/// the listener from the one before.
async fn serve_renewed<L: CommandLog>(
    mut router: Router,
    service: ControlServer<Service<L>>,
    acceptor: accept::Acceptor,
    mut renewed: watch::Receiver<TlsPem>,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    loop {
        let replaced = shutdown.child_token();
        let serving = router.serve_with_incoming_shutdown(acceptor.incoming(), replaced.clone().cancelled_owned());
        let mut serving = tokio::spawn(within_grace(serving, replaced.clone()));
        router = loop {
            tokio::select! {
                served = &mut serving => {
                    // A transport that ends by itself ends the router.
                    shutdown.cancel();
                    return served.unwrap_or(Ok(()));
                }
                Ok(()) = renewed.changed() => match builder(&renewed.borrow_and_update()) {
                    Ok(mut server) => break server.add_service(service.clone()),
                    Err(error) => tracing::error!(%error, "the new certificate is not used"),
                },
            }
        };
        // It ends by itself, within its grace, while the next one serves.
        replaced.cancel();
    }
}

/// Runs `serving`, but not longer than [`GRACE`] past the shutdown.
async fn within_grace<E>(serving: impl Future<Output = Result<(), E>>, shutdown: CancellationToken) -> Result<(), E> {
    let too_late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = serving => served,
        () = too_late => Ok(()),
    }
}

async fn expire_until(log: Arc<SingleNode>, clock: Clock, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EXPIRE_EVERY) => {}
        }
        let now_ms = clock.now_ms();
        let request = Request { id: RequestId::default(), now_ms, command: Command::Expire };
        let expired = log.propose(request).await;
        // Keeps owners over a restart; epochs are safe without it.
        if let Err(error) = async {
            expired?;
            log.flush().await
        }
        .await
        {
            tracing::error!(%error, "router state is not kept");
        }
        if let Ok(status) = log.read(|state| state.status(now_ms)).await {
            let alive = status.nodes.iter().filter(|node| node.alive).count();
            metrics::gauge!(names::NODES_ALIVE).set(alive as f64);
            metrics::gauge!(names::TICKETS).set(f64::from(status.devices));
        }
    }
}

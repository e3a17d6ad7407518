//! Metrics: the recorder of the process, and a plain HTTP endpoint for processes without an API.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tandem_edge_node::api::check_bind;
use tandem_edge_node::http;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::failure::{Code, Failure, OrFail as _};

/// How often histograms are folded up.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Installs the recorder of this process.
pub(crate) fn install(shutdown: CancellationToken) -> Result<PrometheusHandle, Failure> {
    let exporter = tandem_edge_node::metric_definitions::exporter().or_fail(Code::Failed)?;
    let handle = exporter.install_recorder().or_fail(Code::Failed)?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        let mut every = tokio::time::interval(UPKEEP_EVERY);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = every.tick() => upkeep.run_upkeep(),
            }
        }
    });
    Ok(handle)
}

/// Serves `/metrics` and `/health` on `address` until `shutdown`; gives the URL of the metrics. `refresh` sets
/// gauges that are computed on demand, each time before they are read.
pub(crate) async fn serve(
    address: SocketAddr,
    insecure: bool,
    handle: PrometheusHandle,
    shutdown: CancellationToken,
    refresh: impl Fn() + Clone + Send + Sync + 'static,
) -> Result<String, Failure> {
    check_bind(address, None, insecure).map_err(|_| {
        let message = format!(
            "--metrics {address} can be reached from other machines; listen on 127.0.0.1, or accept the risk with --insecure"
        );
        Failure::new(Code::Listen, message)
    })?;
    let listener = bind(address, "--metrics").await?;
    let bound = listener.local_addr().or_fail(Code::Listen)?;
    let routes = Router::new()
        .route(
            "/metrics",
            get(move || async move {
                refresh();
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render()).into_response()
            }),
        )
        .route("/health", get(|| async { axum::Json(serde_json::json!({ "status": "ok" })) }));
    tokio::spawn(http::serve(listener, routes, http::CONNECTIONS_MAX, shutdown));
    Ok(format!("http://{bound}/metrics"))
}

/// Listens on a TCP address; `flag` is what changes it.
pub(crate) async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|e| {
        let what = if e.kind() == std::io::ErrorKind::AddrInUse {
            format!("{address} is in use by another process; choose another with {flag} (port 0 for any), or stop that process")
        } else {
            format!("cannot listen on {address}: {e}; choose another address with {flag}")
        };
        Failure::new(Code::Listen, what)
    })
}

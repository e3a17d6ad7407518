//! `tandem router`: the control plane as a process.

use tandem_router::placement::PlacementConfig;
use tandem_router::server::{ServerConfig, serve};
use tandem_transport::Role;

use crate::args::{Global, RouterArgs};
use crate::config::{self, Flags};
use crate::failure::{Code, Failure, OrFail as _};
use crate::metrics_endpoint::{self, bind};
use crate::ready::Ready;
use crate::renewal::keep_fresh;
use crate::state::{self, StateDir};
use crate::uplink::tls_pem;
use crate::{logging, signals};

/// Name of a router that is given none.
const NAME: &str = "router-1";

fn flags(args: &RouterArgs) -> Flags {
    let mut flags = Flags::new();
    flags.extend(args.listen.map(|addr| ("listen.router", addr.to_string().into(), "--listen")));
    flags.extend(args.metrics.map(|addr| ("listen.metrics", addr.to_string().into(), "--metrics")));
    flags.extend(args.insecure.then(|| ("api.insecure", true.into(), "--insecure")));
    let identity = args.identity.identity.as_ref().and_then(|dir| dir.to_str());
    flags.extend(identity.map(|dir| ("peers.identity", dir.into(), "--identity")));
    flags
}

/// Runs a router until it is told to end.
pub(crate) async fn run(global: &Global, args: &RouterArgs) -> Result<(), Failure> {
    let path = state::path(global)?;
    let settings = config::load(global, &path, flags(args))?;
    logging::start(&settings.log)?;
    let shutdown = signals::shutdown(args.identity.lifeline)?;
    let state = StateDir::open(&path)?;
    let name = args.identity.name.as_deref().unwrap_or(NAME);
    let issuer = state.issuer(settings.peers.identity.as_deref(), Role::Router, name);
    let identity = issuer.issue()?;
    let metrics = match settings.listen.metrics {
        // Parts of an `up` share its settings, and would all want the one address.
        Some(addr) if !args.identity.lifeline => {
            let handle = metrics_endpoint::install(shutdown.clone())?;
            tandem_router::metric_definitions::describe();
            Some(metrics_endpoint::serve(addr, settings.api.insecure, handle, shutdown.clone(), || ()).await?)
        }
        _ => None,
    };
    let listener = bind(settings.listen.router, "--listen (--router-listen with `up`)").await?;
    let config = ServerConfig {
        tls: tls_pem(&identity),
        state_dir: Some(state.router()),
        placement: PlacementConfig::default(),
    };
    let serving = serve(listener, config, shutdown).await.or_fail(Code::State)?;
    let renewal = serving.renewal();
    keep_fresh(issuer, identity.clone(), move |next| renewal.set_tls(tls_pem(next)));
    let listen = serving.address().to_string();
    Ready {
        ready: true,
        role: "router".into(),
        node: identity.id().name.clone(),
        url: format!("grpcs://{listen}"),
        listen,
        page: None,
        metrics,
        pid: std::process::id(),
    }
    .print(global.json)?;
    serving.join().await.or_fail(Code::Failed)
}

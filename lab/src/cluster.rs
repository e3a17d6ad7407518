//! An edge and a cloud node in this process, over real QUIC on the loopback: for evaluation,
//! experiments and whole-system tests.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tandem_cloud_node::node::CloudNode;
use tandem_cloud_node::settings::CloudSettings;
use tandem_cloud_node::target::own::CloudError;
use tandem_edge_node::node::{EdgeError, EdgeNode, EdgeParts};
use tandem_edge_node::settings::EdgeSettings;
use tandem_edge_node::uplinks::{TicketEpoch, Uplinks};
use tandem_engine::EngineError;
use tandem_engine::trunk::announced;
use tandem_proto::ids::Epoch;
use tandem_proto::message::{Hello, ModelCard};
use tandem_router::policy::{Policy, PolicyError, PolicyFile, PolicySpec};
use tandem_transport::bulk::BulkInbox;
use tandem_transport::identity::IdentityError;
use tandem_transport::proxy::{Faults, ProxyHandle, UdpProxy};
use tandem_transport::{
    Backoff, Connector, DevCa, Redial, Role, Server, Settings as QuicSettings, Target, TransportError,
};
use tokio_util::sync::CancellationToken;

use crate::pair::{PairFiles, TwoTokenizers, check_tokenizers};

/// Why a cluster cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A model cannot be loaded.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Their token ids do not mean the same text.
    #[error(transparent)]
    TwoTokenizers(#[from] TwoTokenizers),
    /// The edge node cannot start.
    #[error(transparent)]
    Edge(#[from] EdgeError),
    /// The cloud node cannot start.
    #[error(transparent)]
    Cloud(#[from] CloudError),
    /// Certificates cannot be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Sockets cannot be made.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The policy cannot be built.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// No folder for the certificates.
    #[error("no temporary folder: {0}")]
    Folder(#[from] std::io::Error),
    /// The edge did not reach the cloud.
    #[error("the edge did not reach the cloud within {0:?}")]
    NoLink(Duration),
}

/// What a cluster is made of.
#[derive(Clone)]
pub struct ClusterOptions {
    /// The models.
    pub models: PairFiles,
    /// Settings of the edge.
    pub edge: EdgeSettings,
    /// Settings of the cloud.
    pub cloud: CloudSettings,
    /// When the edge asks the cloud.
    pub policy: PolicySpec,
    /// Parameters of the calibrated rule.
    pub policy_file: Option<Arc<PolicyFile>>,
    /// Faults of the link; none for the bare loopback.
    pub link: Option<Faults>,
    /// Seed of the link's faults.
    pub seed: u64,
    /// Threads of each model.
    pub threads: usize,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            models: PairFiles::default(),
            edge: EdgeSettings::default(),
            cloud: CloudSettings::default(),
            policy: PolicySpec::Top1 { probability: 0.9 },
            policy_file: None,
            link: None,
            seed: 0,
            threads: 1,
        }
    }
}

/// A running pair of nodes. Dropping it stops both.
pub struct Cluster {
    /// The edge node.
    pub edge: EdgeNode,
    /// The cloud node.
    pub cloud: CloudNode,
    /// What the edge's model is.
    pub edge_card: ModelCard,
    /// What the cloud's model is.
    pub cloud_card: ModelCard,
    /// The link's faults, if it goes through the proxy.
    pub proxy: Option<ProxyHandle>,
    _proxy: Option<UdpProxy>,
    shutdown: CancellationToken,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// How long the edge may take to reach the cloud.
const LINK_TIMEOUT: Duration = Duration::from_secs(20);

impl Cluster {
    /// Starts both nodes and waits for the link. Needs a multi-thread tokio runtime.
    ///
    /// # Errors
    /// A [`ClusterError`] that says which part failed.
    pub async fn start(mut options: ClusterOptions) -> Result<Self, ClusterError> {
        let policy: Arc<dyn Policy> = options.policy.build(options.policy_file.as_ref())?;
        let folder = tempfile::tempdir()?;
        let ca = DevCa::open_or_create(folder.path())?;
        let cloud_identity = ca.issue(Role::Cloud, &options.cloud.name)?;
        let edge_identity = ca.issue(Role::Edge, &options.edge.name)?;
        let shutdown = CancellationToken::new();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));

        let small = options.models.edge.load(options.threads)?;
        let big = options.models.cloud.load(options.threads)?;
        let (edge_card, cloud_card) = (small.card, big.card);
        check_tokenizers((&edge_card, &small.tokenizer), &cloud_card)?;
        options.edge.model.clone_from(&edge_card.name);
        options.edge.cloud_model.clone_from(&cloud_card.name);
        options.cloud.model.clone_from(&cloud_card.name);
        let cloud = CloudNode::start(big.model, big.tokenizer, options.cloud.clone())?;
        let greeting =
            Hello::new(&options.cloud.name, 1, vec![announced(cloud_card.clone(), options.cloud.trunk_layers)]);
        let server = Server::bind_for(any, &cloud_identity, QuicSettings::dev(), greeting, &[Role::Edge])?;
        let mut address = server.local_addr()?;
        tokio::spawn(cloud.clone().serve(server, shutdown.clone()));
        let proxy = options.link.map(|faults| UdpProxy::start(any, address, faults, options.seed)).transpose()?;
        if let Some(proxy) = &proxy {
            address = proxy.local_addr();
        }

        let greeting = Hello::new(&options.edge.name, 1, vec![announced(edge_card.clone(), options.edge.trunk_layers)]);
        let connector = Arc::new(Connector::new_for(&edge_identity, QuicSettings::dev(), greeting, &[Role::Cloud])?);
        let server_name = cloud_identity.id().dns_name();
        let redial = Redial::start(connector, Backoff::default(), move |_| {
            let target = Target::at(address, &server_name);
            async move { Ok(target) }
        });
        let epoch = TicketEpoch::default();
        epoch.saw(Epoch(1));
        let bulk = BulkInbox::default();
        let uplinks = Uplinks::new(redial, epoch, bulk.clone());
        let mut links = uplinks.links();
        let edge = EdgeNode::start(
            options.edge.clone(),
            EdgeParts {
                model: small.model,
                tokenizer: small.tokenizer,
                chat: small.chat,
                stop_tokens: small.stop_tokens,
                sampling: small.sampling,
                short_json: None,
                policy,
                uplinks,
                bulk,
                tenant_key: edge_identity.tenant_key(),
                kv_folder: None,
            },
        )?;
        let linked = tokio::time::timeout(LINK_TIMEOUT, links.wait_for(Option::is_some)).await;
        if !matches!(linked, Ok(Ok(_))) {
            return Err(ClusterError::NoLink(LINK_TIMEOUT));
        }
        let handle = proxy.as_ref().map(UdpProxy::handle);
        Ok(Self { edge, cloud, edge_card, cloud_card, proxy: handle, _proxy: proxy, shutdown })
    }
}

#[cfg(test)]
mod tests;

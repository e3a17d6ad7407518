//! Every setting of every part, with its default.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tandem_cloud_node::settings::CloudSettings;
use tandem_edge_node::http::CONNECTIONS_MAX;
use tandem_edge_node::settings::EdgeSettings;
use tandem_router::policy::PolicySpec;
use tandem_transport::{Congestion, Settings as QuicSettings};

use crate::address;

/// Address that a part listens on by default: loopback, with its own port.
const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// All settings; a TOML table per part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Log filter; empty for `warn,tandem=info`.
    pub log: String,
    /// Where the parts listen.
    pub listen: ListenSettings,
    /// The HTTP API.
    pub api: ApiSettings,
    /// Whom this process talks to.
    pub peers: PeerSettings,
    /// The QUIC link between edge and cloud.
    pub link: LinkSettings,
    /// The engine.
    pub engine: EngineSettings,
    /// When the edge asks the cloud; a whole table, e.g. `{ policy = "entropy", nats = 1.0 }`.
    pub policy: PolicySpec,
    /// The edge node.
    pub edge: EdgeSettings,
    /// The cloud node.
    pub cloud: CloudSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log: String::new(),
            listen: ListenSettings::default(),
            api: ApiSettings::default(),
            peers: PeerSettings::default(),
            link: LinkSettings::default(),
            engine: EngineSettings::default(),
            policy: match tandem_models::POLICY {
                Some(_) => PolicySpec::Calibrated { threshold: None },
                None => PolicySpec::Top1 { probability: 0.9 },
            },
            edge: EdgeSettings::default(),
            cloud: CloudSettings::default(),
        }
    }
}

/// Where the parts listen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ListenSettings {
    /// The edge's API and page, TCP.
    #[serde(deserialize_with = "address::deserialize")]
    #[schemars(with = "String")]
    pub api: SocketAddr,
    /// The cloud node, UDP.
    #[serde(deserialize_with = "address::deserialize")]
    #[schemars(with = "String")]
    pub cloud: SocketAddr,
    /// The router, TCP.
    #[serde(deserialize_with = "address::deserialize")]
    #[schemars(with = "String")]
    pub router: SocketAddr,
    /// Plain HTTP for `/metrics` and `/health` of a `cloud` or `router` process; none if absent.
    #[serde(deserialize_with = "address::deserialize_some")]
    #[schemars(with = "Option<String>")]
    pub metrics: Option<SocketAddr>,
}

impl Default for ListenSettings {
    fn default() -> Self {
        Self { api: loopback(8080), cloud: loopback(4433), router: loopback(7433), metrics: None }
    }
}

/// The HTTP API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ApiSettings {
    /// Bearer key that requests must carry.
    pub key: Option<String>,
    /// Serve the network without a key.
    pub insecure: bool,
    /// Model that unknown model names stand for, and requests without one; none makes unknown names a 404.
    pub default_model: Option<String>,
    /// Bound the strings, lists and integers that a request's schema leaves open, for a model that goes on in them
    /// until its context is full; unset means for models whose context is under 2048 tokens.
    pub short_json: Option<bool>,
    /// Origins whose web pages may use the API, such as `["https://app.example"]`; `["*"]` for all. With none,
    /// only the node's own page may.
    pub cors_origins: Vec<String>,
    /// Names that the node may be called by in URLs where no key is set, beside its IP addresses and
    /// `localhost`, such as `["tandem.lan"]`.
    pub hosts: Vec<String>,
    /// Most connections at once. For a new one, the one that has waited for a request for longest is closed.
    pub connections_max: usize,
}

impl Default for ApiSettings {
    fn default() -> Self {
        Self {
            key: None,
            insecure: false,
            default_model: None,
            short_json: None,
            cors_origins: Vec::new(),
            hosts: Vec::new(),
            connections_max: CONNECTIONS_MAX,
        }
    }
}

/// Whom this process talks to, and what it tells them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PeerSettings {
    /// A cloud node to use without a router: `host:port`, or `server-name@host:port`.
    pub cloud: Option<String>,
    /// Routers: `host:port`, or `server-name@host:port`.
    pub routers: Vec<String>,
    /// `host:port` under which edges reach this cloud node; what it listens on if absent.
    pub advertise: Option<String>,
    /// Region of this node: edges are placed on cloud nodes of theirs first.
    pub region: String,
    /// Folder with `cert.pem`, `key.pem` and `trust.pem`; the CA of the state folder if absent.
    pub identity: Option<PathBuf>,
}

/// What kind of network the link crosses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LinkProfile {
    /// One machine or one room: a dead peer is noticed within 5 s.
    Near,
    /// The internet: 30 s, and radios may sleep.
    #[default]
    Far,
}

/// Congestion controller of the sending side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CongestionName {
    /// What the transport recommends.
    #[default]
    Default,
    /// RFC 9438.
    Cubic,
    /// Model-based; experimental in quinn.
    Bbr,
}

/// The QUIC link between edge and cloud.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LinkSettings {
    /// Kind of network.
    pub profile: LinkProfile,
    /// Congestion controller.
    pub congestion: CongestionName,
    /// Silence after which the peer counts as dead, milliseconds; the profile's if absent. The
    /// smaller value of the two sides holds.
    pub idle_ms: Option<u64>,
    /// How often to break the silence, milliseconds; the profile's if absent.
    pub keep_alive_ms: Option<u64>,
}

impl LinkSettings {
    /// The transport's settings.
    #[must_use]
    pub fn quic(&self) -> QuicSettings {
        let mut quic = match self.profile {
            LinkProfile::Near => QuicSettings::dev(),
            LinkProfile::Far => QuicSettings::edge(),
        };
        quic.idle = self.idle_ms.map_or(quic.idle, Duration::from_millis);
        quic.keep_alive = self.keep_alive_ms.map_or(quic.keep_alive, Duration::from_millis);
        match self.congestion {
            CongestionName::Default => {}
            CongestionName::Cubic => quic.congestion = Congestion::Cubic,
            CongestionName::Bbr => quic.congestion = Congestion::Bbr,
        }
        quic
    }
}

/// The engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSettings {
    /// Threads of the edge's model; 0 for one per core.
    pub edge_threads: usize,
    /// Threads of the cloud's model; 0 for one per core.
    pub cloud_threads: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        // The embedded edge model is too small to gain from a second thread.
        Self { edge_threads: 1, cloud_threads: 0 }
    }
}

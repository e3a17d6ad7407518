//! QUIC settings of a link, and the caps of a server.

use std::{sync::Arc, time::Duration};

use quinn::{TransportConfig, VarInt, congestion};
use tandem_proto::limits::{FRAME_PROGRESS_MS_MAX, HANDSHAKE_MS_MAX};

/// Priority of the control stream; higher goes first.
pub const CONTROL_PRIORITY: i32 = 10;
/// Priority of a session's stream.
pub const SESSION_PRIORITY: i32 = 5;
/// Priority of the first KV block; later ones follow below.
pub const BULK_PRIORITY: i32 = -5;

/// KV blocks after which their priorities start again from [`BULK_PRIORITY`].
const BULK_ORDER_CYCLE: u32 = 1 << 20;

/// Priority of the `n`th KV block of a link: each below the one before. Of equal ones, QUIC would
/// send a packet of each in turn: every packet wakes another reader, and all blocks end late.
/// (quinn's `send_fairness(false)` also stops the turns, but finishes a started block before it
/// looks at a token: measured, a token then waits for a whole block.)
pub(crate) fn bulk_priority(n: u32) -> i32 {
    // The cycle fits an i32 many times over.
    BULK_PRIORITY - (n % BULK_ORDER_CYCLE) as i32
}

/// Congestion controller of the sending side.
///
/// Measured with `benches/congestion.rs` (8 MiB of KV blocks, drop-tail queue of 200 ms, one token
/// round trip after the other beside it) on a shared two-core machine, one to four runs each; rows
/// whose timers were late by more than 10 ms are left out for both. Share of the path's rate and
/// median token round trip:
///
/// | path | CUBIC | BBR |
/// |---|---|---|
/// | 80 ms, 20 Mbit/s, 1 % loss | 9–10 % (5.5 of 8 MiB after 25 s), 102 ms | 86–88 %, 168 ms |
/// | 80 ms, 20 Mbit/s, 0.1 % | 51 %, 87 ms | 95 %, 210 ms |
/// | 80 ms, 20 Mbit/s, 0 % | 61–90 %, 219 ms | 89–93 %, 222 ms |
/// | 20 ms, 50 Mbit/s, 1 % | 12 %, 33 ms | 83–94 %, 62 ms |
/// | 20 ms, 50 Mbit/s, 0 % | 90–91 %, 126 ms | 87–96 %, 101 ms |
/// | 10 ms, 200 Mbit/s, 0 % | 73 %, 26 ms | 55–73 %, 20 ms |
///
/// Devices sit on radio links, where loss is not congestion: there BBR moves a prompt's state up to
/// nine times as fast, so [`Settings::edge`] uses it although quinn marks its BBR experimental. The
/// price: it fills the queue that CUBIC leaves empty, so tokens take up to 2.4 times as long while
/// blocks are under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Congestion {
    /// RFC 9438; halves on loss, so it starves on lossy long paths.
    Cubic,
    /// Model-based; keeps its rate under random loss.
    Bbr,
}

/// How a link behaves. Start from [`Settings::edge`] or [`Settings::dev`] and change single fields.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes a peer may have in flight on one stream.
    pub stream_receive_window: u32,
    /// Bytes a peer may have in flight on the whole link.
    pub receive_window: u32,
    /// Bytes of ours that may wait for acknowledgement.
    pub send_window: u32,
    /// Sessions a peer may have open at once (the control stream comes on top).
    pub sessions: u32,
    /// Bulk transfers a peer may have under way.
    pub bulk_streams: u32,
    /// Silence after which the peer counts as dead. The smaller value of the two sides holds.
    pub idle: Duration,
    /// How often to break the silence.
    pub keep_alive: Duration,
    /// Congestion controller.
    pub congestion: Congestion,
    /// UDP segmentation offload. A switch, because some drivers mangle it.
    pub gso: bool,
    /// Bytes of unread datagrams kept.
    pub datagram_bytes: usize,
    /// Time from connect to both HELLOs.
    pub handshake: Duration,
    /// Time in which a started frame must move on.
    pub frame_progress: Duration,
    /// Server: links at once.
    pub connections_max: usize,
    /// Server: links at once of one identity.
    pub connections_per_device_max: usize,
    /// Server: above this many links, a client must prove its address first (QUIC Retry).
    pub retry_above: usize,
}

impl Settings {
    /// Between an edge and a cloud node over the open internet.
    #[must_use]
    pub fn edge() -> Self {
        Self {
            stream_receive_window: 2 << 20,
            receive_window: 8 << 20,
            send_window: 8 << 20,
            sessions: 32,
            bulk_streams: 8,
            idle: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            congestion: Congestion::Bbr,
            gso: true,
            datagram_bytes: 64 << 10,
            handshake: Duration::from_millis(HANDSHAKE_MS_MAX),
            frame_progress: Duration::from_millis(FRAME_PROGRESS_MS_MAX),
            connections_max: 4096,
            connections_per_device_max: 8,
            retry_above: 1024,
        }
    }

    /// As [`Settings::edge`], but a dead peer is noticed within 5 s instead of 30 s. On a phone the
    /// keep-alive of 1 s would wake the radio all the time; on one machine it costs nothing.
    #[must_use]
    pub fn dev() -> Self {
        Self { idle: Duration::from_secs(5), keep_alive: Duration::from_secs(1), ..Self::edge() }
    }

    pub(crate) fn transport_config(&self) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
        config
            .stream_receive_window(VarInt::from_u32(self.stream_receive_window))
            .receive_window(VarInt::from_u32(self.receive_window))
            .send_window(self.send_window.into())
            .max_concurrent_bidi_streams(VarInt::from_u32(self.sessions.saturating_add(1)))
            .max_concurrent_uni_streams(VarInt::from_u32(self.bulk_streams))
            .keep_alive_interval(Some(self.keep_alive))
            .datagram_receive_buffer_size(Some(self.datagram_bytes))
            .datagram_send_buffer_size(self.datagram_bytes)
            .enable_segmentation_offload(self.gso);
        // Past the range of a VarInt (2^62 ms) the idle timeout is as good as none.
        config.max_idle_timeout(self.idle.try_into().ok());
        match self.congestion {
            Congestion::Cubic => config.congestion_controller_factory(Arc::new(congestion::CubicConfig::default())),
            Congestion::Bbr => config.congestion_controller_factory(Arc::new(congestion::BbrConfig::default())),
        };
        Arc::new(config)
    }
}

//! Names and labels of the cloud node's metrics, in one place.

/// Counter: sessions opened; label `resumed` = `true` | `false`.
pub const SESSIONS_OPENED: &str = "tandem_cloud_sessions_opened_total";
/// Counter: sessions refused; label `code` (the refusal's name).
pub const SESSIONS_REFUSED: &str = "tandem_cloud_sessions_refused_total";
/// Gauge: open sessions.
pub const SESSIONS: &str = "tandem_cloud_sessions";
/// Counter: draft tokens judged.
pub const DRAFTS_JUDGED: &str = "tandem_cloud_drafts_judged_total";
/// Counter: draft tokens accepted.
pub const DRAFTS_ACCEPTED: &str = "tandem_cloud_drafts_accepted_total";
/// Counter: tokens decoded for edges that stream.
pub const TOKENS_STREAMED: &str = "tandem_cloud_tokens_streamed_total";
/// Counter: rows fed; label `trunk` = `here` | `edge` (hidden states came from the edge).
pub const ROWS: &str = "tandem_cloud_rows_total";
/// Histogram: seconds a job waited for the model.
pub const QUEUE_SECONDS: &str = "tandem_cloud_queue_seconds";
/// Histogram: seconds a job took in the model.
pub const COMPUTE_SECONDS: &str = "tandem_cloud_compute_seconds";
/// Counter: KV blocks; labels `direction` = `sent` | `received`, `result` = `published` | `refused`.
pub const KV_BLOCKS: &str = "tandem_cloud_kv_blocks_total";
/// Counter: bytes of KV payload; label `direction`.
pub const KV_BYTES: &str = "tandem_cloud_kv_bytes_total";
/// Counter: trunk state brought in; label `source` = `edge` | `recomputed`.
pub const TRUNK_FETCHED: &str = "tandem_cloud_trunk_fetched_total";

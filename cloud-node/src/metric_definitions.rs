//! Names and labels of the cloud node's metrics, in one place.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Label: `true` if the session came back, else `false`.
pub const LABEL_RESUMED: &str = "resumed";
/// Label: name of the refusal.
pub const LABEL_CODE: &str = "code";
/// Label: whose trunk numbers a row has: `here` | `edge`.
pub const LABEL_TRUNK: &str = "trunk";
/// Label: `sent` | `received`.
pub const LABEL_DIRECTION: &str = "direction";
/// Label: what became of a KV block: `published` | `refused`.
pub const LABEL_RESULT: &str = "result";
/// Label: where state came from: a trunk's `edge` | `recomputed`, an upstream's prompt `cache` | `computed`.
pub const LABEL_SOURCE: &str = "source";

/// Counter: sessions opened; label `resumed`.
pub const SESSIONS_OPENED: &str = "tandem_cloud_sessions_opened_total";
/// Counter: sessions refused; label `code`.
pub const SESSIONS_REFUSED: &str = "tandem_cloud_sessions_refused_total";
/// Gauge: open sessions.
pub const SESSIONS: &str = "tandem_cloud_sessions";
/// Gauge: jobs waiting for the model or running.
pub const QUEUE_JOBS: &str = "tandem_cloud_queue_jobs";
/// Gauge: rows that these jobs have still to feed.
pub const QUEUE_ROWS: &str = "tandem_cloud_queue_rows";
/// Gauge: KV blocks of the node.
pub const KV_POOL_BLOCKS: &str = "tandem_cloud_kv_pool_blocks";
/// Gauge: KV blocks that are free.
pub const KV_POOL_FREE_BLOCKS: &str = "tandem_cloud_kv_pool_free_blocks";
/// Counter: draft tokens judged.
pub const DRAFTS_JUDGED: &str = "tandem_cloud_drafts_judged_total";
/// Counter: draft tokens accepted.
pub const DRAFTS_ACCEPTED: &str = "tandem_cloud_drafts_accepted_total";
/// Counter: tokens decoded for edges that stream.
pub const TOKENS_STREAMED: &str = "tandem_cloud_tokens_streamed_total";
/// Counter: rows fed; label `trunk`.
pub const ROWS: &str = "tandem_cloud_rows_total";
/// Counter: sessions that began with rows of earlier ones of their tenant.
pub const PREFIX_HITS: &str = "tandem_cloud_prefix_cache_hits_total";
/// Counter: rows that were reused instead of computed.
pub const PREFIX_ROWS: &str = "tandem_cloud_prefix_cache_rows_total";
/// Gauge: KV blocks held for reuse.
pub const PREFIX_BLOCKS: &str = "tandem_cloud_prefix_cache_blocks";
/// Counter: KV blocks held for reuse that were given up.
pub const PREFIX_EVICTED: &str = "tandem_cloud_prefix_cache_evicted_blocks_total";
/// Histogram: seconds a job waited for the model.
pub const QUEUE_SECONDS: &str = "tandem_cloud_queue_seconds";
/// Histogram: seconds a job took in the model.
pub const COMPUTE_SECONDS: &str = "tandem_cloud_compute_seconds";
/// Counter: KV blocks; labels `direction`, `result`.
pub const KV_BLOCKS: &str = "tandem_cloud_kv_blocks_total";
/// Counter: bytes of KV payload; label `direction`.
pub const KV_BYTES: &str = "tandem_cloud_kv_bytes_total";
/// Counter: trunk state brought in; label `source`.
pub const TRUNK_FETCHED: &str = "tandem_cloud_trunk_fetched_total";
/// Counter: calls of engines behind URLs.
pub const UPSTREAM_CALLS: &str = "tandem_cloud_upstream_calls_total";
/// Counter: calls that failed.
pub const UPSTREAM_FAULTS: &str = "tandem_cloud_upstream_faults_total";
/// Counter: distributions that engines behind URLs returned.
pub const UPSTREAM_ROWS: &str = "tandem_cloud_upstream_rows_total";
/// Counter: tokens of prompts of these calls, as the engines count them; label `source`.
pub const UPSTREAM_PROMPT_TOKENS: &str = "tandem_cloud_upstream_prompt_tokens_total";

/// Tells the installed recorder what each metric means. Call once after installing it.
pub fn describe() {
    describe_counter!(SESSIONS_OPENED, "Sessions opened, by whether they came back");
    describe_counter!(SESSIONS_REFUSED, "Sessions refused, by code");
    describe_gauge!(SESSIONS, "Open sessions");
    describe_gauge!(QUEUE_JOBS, "Jobs waiting for the model or running");
    describe_gauge!(QUEUE_ROWS, "Rows that waiting and running jobs have still to feed");
    describe_gauge!(KV_POOL_BLOCKS, "KV blocks of the node");
    describe_gauge!(KV_POOL_FREE_BLOCKS, "KV blocks that are free, or held for reuse only");
    describe_counter!(DRAFTS_JUDGED, "Draft tokens judged");
    describe_counter!(DRAFTS_ACCEPTED, "Draft tokens accepted");
    describe_counter!(TOKENS_STREAMED, "Tokens decoded for edges that stream");
    describe_counter!(ROWS, "Rows fed, by whose trunk numbers they have");
    describe_counter!(PREFIX_HITS, "Sessions that began with rows of earlier ones of their tenant");
    describe_counter!(PREFIX_ROWS, "Rows reused instead of computed");
    describe_gauge!(PREFIX_BLOCKS, "KV blocks held for reuse");
    describe_counter!(PREFIX_EVICTED, "KV blocks held for reuse that were given up");
    describe_histogram!(QUEUE_SECONDS, Unit::Seconds, "Time a job waited for the model");
    describe_histogram!(COMPUTE_SECONDS, Unit::Seconds, "Time a job took in the model");
    describe_counter!(KV_BLOCKS, "KV blocks exchanged, by direction and result");
    describe_counter!(KV_BYTES, Unit::Bytes, "KV payload exchanged, by direction");
    describe_counter!(TRUNK_FETCHED, "Trunk state brought in, by source");
    describe_counter!(UPSTREAM_CALLS, "Calls of engines behind URLs");
    describe_counter!(UPSTREAM_FAULTS, "Calls of engines behind URLs that failed");
    describe_counter!(UPSTREAM_ROWS, "Distributions that engines behind URLs returned");
    describe_counter!(UPSTREAM_PROMPT_TOKENS, "Tokens of prompts in calls of engines behind URLs, by source");
}

//! Names and labels of the edge's metrics, each in one place with its meaning. Names do not
//! change once a release has them; dashboards and alerts rely on them.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// Label: path of the API, one of [`ROUTES`] or [`ROUTE_OTHER`].
pub const LABEL_ROUTE: &str = "route";
/// Label: `local`, `auto`, `exact`, `cloud`, or [`MODE_NONE`] for requests without an answer.
pub const LABEL_MODE: &str = "mode";
/// Label: HTTP status of the response, e.g. `200`, or [`STATUS_LEFT`]. A stream that fails later stays 200
/// here and counts as `error` in [`ANSWERS_TOTAL`].
pub const LABEL_STATUS: &str = "status";
/// Label: how an answer ended: `stop`, `length`, `error`, `gone` (the client went away).
pub const LABEL_OUTCOME: &str = "outcome";
/// Label: whose decision a token is: `edge`, `verified`, `cloud`.
pub const LABEL_ORIGIN: &str = "origin";
/// Label: `up` (to the cloud) or `down`; of KV payload `sent` or `received`.
pub const LABEL_DIRECTION: &str = "direction";

/// Values of [`LABEL_ROUTE`] that are spelled out.
pub const ROUTES: [&str; 17] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
    "/tandem/status",
    "/tandem/controls",
    "/tandem/explain",
    "/",
];
/// Value of [`LABEL_ROUTE`] for every other path, so that callers cannot make up series.
pub const ROUTE_OTHER: &str = "other";
/// Value of [`LABEL_STATUS`] where the client left before the response began.
pub const STATUS_LEFT: &str = "left";
/// Value of [`LABEL_MODE`] where no mode applies.
pub const MODE_NONE: &str = "none";

/// Counter {route, mode, status}: responses begun.
pub const REQUESTS_TOTAL: &str = "tandem_edge_requests_total";
/// Counter {route, mode, outcome}: answers (choices) ended.
pub const ANSWERS_TOTAL: &str = "tandem_edge_answers_total";
/// Gauge: requests for an answer under way.
pub const ACTIVE_REQUESTS: &str = "tandem_edge_active_requests";
/// Histogram {route, mode}, seconds: request received to first token of a choice.
pub const TTFT_SECONDS: &str = "tandem_edge_ttft_seconds";
/// Histogram {route, mode}, seconds: token to next token of a choice.
pub const ITL_SECONDS: &str = "tandem_edge_itl_seconds";
/// Counter {mode, origin}: tokens of answers by whose decision they are.
pub const TOKENS_TOTAL: &str = "tandem_edge_tokens_total";
/// Counter {mode}: tokens of prompts.
pub const PROMPT_TOKENS_TOTAL: &str = "tandem_edge_prompt_tokens_total";
/// Counter {mode}: tokens of prompts that were not computed, as their state was held, see
/// `RouteSummary::cached_tokens`.
pub const PROMPT_TOKENS_CACHED_TOTAL: &str = "tandem_edge_prompt_tokens_cached_total";
/// Counter: rows that the edge's model computed.
pub const ROWS_TOTAL: &str = "tandem_edge_rows_total";
/// Counter: sequences of the edge's model that began with rows of earlier ones.
pub const PREFIX_HITS_TOTAL: &str = "tandem_edge_prefix_cache_hits_total";
/// Counter: rows of the edge's model that were reused instead of computed.
pub const PREFIX_ROWS_TOTAL: &str = "tandem_edge_prefix_cache_rows_total";
/// Gauge: KV blocks held for reuse.
pub const PREFIX_BLOCKS: &str = "tandem_edge_prefix_cache_blocks";
/// Counter: KV blocks held for reuse that were given up.
pub const PREFIX_EVICTED_TOTAL: &str = "tandem_edge_prefix_cache_evicted_blocks_total";
/// Gauge: KV blocks on disk, for the next start.
pub const PREFIX_DISK_BLOCKS: &str = "tandem_edge_prefix_disk_blocks";
/// Gauge: bytes of their files.
pub const PREFIX_DISK_BYTES: &str = "tandem_edge_prefix_disk_bytes";
/// Counter: KV blocks that were read back from disk instead of computed.
pub const PREFIX_RESTORED_TOTAL: &str = "tandem_edge_prefix_disk_restored_blocks_total";
/// Counter: KV blocks on disk that were damaged or gone, and computed.
pub const PREFIX_REFUSED_TOTAL: &str = "tandem_edge_prefix_disk_refused_blocks_total";
/// Counter {mode, direction}: bytes exchanged with the cloud, frames with headers.
pub const BYTES_TOTAL: &str = "tandem_edge_bytes_total";
/// Counter {mode}: times an answer asked the cloud and got something back.
pub const ROUND_TRIPS_TOTAL: &str = "tandem_edge_round_trips_total";
/// Counter {direction = `sent` | `received`}: bytes of KV payload.
pub const KV_BYTES: &str = "tandem_edge_kv_bytes_total";
/// Counter: KV blocks that failed a check and were not used.
pub const KV_BLOCKS_REFUSED: &str = "tandem_edge_kv_blocks_refused_total";
/// Counter: prompts whose trunk state came from the cloud.
pub const PROMPTS_FETCHED: &str = "tandem_edge_prompts_fetched_total";
/// Counter {mode}: answers that wanted the cloud and did without it for a part.
pub const DEGRADED_TOTAL: &str = "tandem_edge_degraded_answers_total";

/// Counter {mode}: tokens that became final and were not read, see `RouteSummary::discarded`.
pub const DISCARDED_TOTAL: &str = "tandem_edge_discarded_tokens_total";

/// Upper bounds of the latency histograms' buckets, seconds.
pub const LATENCY_BUCKETS_S: [f64; 15] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// An exporter with this file's buckets.
///
/// # Errors
/// None in practice: the bucket list is not empty.
pub fn exporter() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &LATENCY_BUCKETS_S)
}

/// Tells the installed recorder what each metric means. Call once after installing it.
pub fn describe() {
    describe_counter!(REQUESTS_TOTAL, "Responses begun");
    describe_counter!(ANSWERS_TOTAL, "Answers (choices) ended, by outcome");
    describe_gauge!(ACTIVE_REQUESTS, "Requests for an answer under way");
    describe_histogram!(TTFT_SECONDS, Unit::Seconds, "Request received to first token of a choice");
    describe_histogram!(ITL_SECONDS, Unit::Seconds, "Token to next token of a choice");
    describe_counter!(TOKENS_TOTAL, "Tokens of answers by whose decision they are");
    describe_counter!(PROMPT_TOKENS_TOTAL, "Tokens of prompts");
    describe_counter!(PROMPT_TOKENS_CACHED_TOTAL, "Tokens of prompts whose state was held from earlier answers");
    describe_counter!(ROWS_TOTAL, "Rows computed");
    describe_counter!(PREFIX_HITS_TOTAL, "Sequences that began with rows of earlier ones");
    describe_counter!(PREFIX_ROWS_TOTAL, "Rows reused instead of computed");
    describe_gauge!(PREFIX_BLOCKS, "KV blocks held for reuse");
    describe_counter!(PREFIX_EVICTED_TOTAL, "KV blocks held for reuse that were given up");
    describe_gauge!(PREFIX_DISK_BLOCKS, "KV blocks on disk, for the next start");
    describe_gauge!(PREFIX_DISK_BYTES, Unit::Bytes, "Bytes of KV blocks on disk");
    describe_counter!(PREFIX_RESTORED_TOTAL, "KV blocks read back from disk instead of computed");
    describe_counter!(PREFIX_REFUSED_TOTAL, "KV blocks on disk that were damaged or gone, and computed");
    describe_counter!(BYTES_TOTAL, Unit::Bytes, "Bytes exchanged with the cloud");
    describe_counter!(ROUND_TRIPS_TOTAL, "Times an answer asked the cloud and got something back");
    describe_counter!(DISCARDED_TOTAL, "Final tokens that were not read: past a stop string, or of a client that left");
    describe_counter!(DEGRADED_TOTAL, "Answers that did without the cloud for a part");
}

/// The value of [`LABEL_ROUTE`] for a path.
#[must_use]
pub fn route_label(path: &str) -> &'static str {
    let begins = |route: &&&str| {
        path == **route || (**route != "/" && path.strip_prefix(**route).is_some_and(|rest| rest.starts_with('/')))
    };
    ROUTES.iter().find(begins).copied().unwrap_or(ROUTE_OTHER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn route_labels_are_bounded() {
        let table = [
            ("/", "/"),
            ("/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/models/tandem:local", "/v1/models"),
            ("/tandem/explain/last", "/tandem/explain"),
            ("/v1/modelsx", "other"),
            ("/assets/app.js", "other"),
            ("//", "other"),
        ];
        for (path, label) in table {
            assert_eq!(route_label(path), label, "{path}");
        }
    }

    #[test]
    fn the_exporter_can_be_built() {
        assert!(exporter().is_ok());
    }
}

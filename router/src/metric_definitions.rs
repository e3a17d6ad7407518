//! Names and labels of the router's metrics.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Label: `register`, `heartbeat`, `drain`, `place`, `status`.
pub const LABEL_METHOD: &str = "method";
/// Label: `ok`, `refused`, `denied`, `invalid`, `busy`, `failed`.
pub const LABEL_OUTCOME: &str = "outcome";

/// Counter {method, outcome}: requests answered.
pub const REQUESTS: &str = "tandem_router_requests_total";
/// Histogram {method}, seconds: time to answer.
pub const REQUEST_SECONDS: &str = "tandem_router_request_seconds";
/// Gauge: registered nodes with a fresh heartbeat.
pub const NODES_ALIVE: &str = "tandem_router_nodes_alive";
/// Gauge: unexpired tickets.
pub const TICKETS: &str = "tandem_router_tickets";
/// Gauge: open connections.
pub const CONNECTIONS: &str = "tandem_router_connections";

/// Tells the recorder what the metrics mean. Call it once, after a recorder is installed.
pub fn describe() {
    describe_counter!(REQUESTS, "requests answered by the router, by method and outcome");
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "time to answer a request, by method");
    describe_gauge!(NODES_ALIVE, "registered nodes with a fresh heartbeat");
    describe_gauge!(TICKETS, "tickets that have not expired");
    describe_gauge!(CONNECTIONS, "open connections to the router");
}

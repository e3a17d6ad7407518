//! Sums over the answers of a node, and the metrics beside them.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use metrics::{counter, gauge};

use super::NodeContext;
use crate::explained::Answered;
use crate::metric_definitions as names;
use crate::request::{GenerateRequest, RouteSummary, TokenEvent};

/// Sums over the answers of a node.
#[derive(Default)]
pub(crate) struct Totals {
    pub(crate) route: RouteSummary,
    pub(crate) answers: u64,
    /// Of the newest answer.
    pub(crate) tokens_per_s: Option<f64>,
}

impl NodeContext {
    /// Records what the engine has counted.
    pub(crate) fn record_engine(&self) {
        let load = self.runner.load();
        counter!(names::ROWS_TOTAL).absolute(load.rows.load(Ordering::Relaxed));
        gauge!(names::PREFIX_BLOCKS).set(load.prefix_blocks.load(Ordering::Relaxed) as f64);
        counter!(names::PREFIX_HITS_TOTAL).absolute(load.prefix_hits.load(Ordering::Relaxed));
        counter!(names::PREFIX_ROWS_TOTAL).absolute(load.prefix_rows.load(Ordering::Relaxed));
        counter!(names::PREFIX_EVICTED_TOTAL).absolute(load.prefix_evicted.load(Ordering::Relaxed));
        gauge!(names::PREFIX_DISK_BLOCKS).set(load.saved_blocks.load(Ordering::Relaxed) as f64);
        gauge!(names::PREFIX_DISK_BYTES).set(load.saved_bytes.load(Ordering::Relaxed) as f64);
        counter!(names::PREFIX_RESTORED_TOTAL).absolute(load.restored_blocks.load(Ordering::Relaxed));
        counter!(names::PREFIX_REFUSED_TOTAL).absolute(load.refused_blocks.load(Ordering::Relaxed));
    }

    /// Books an answer.
    pub(crate) fn book(
        &self,
        request: &GenerateRequest,
        route: &RouteSummary,
        trace: Vec<TokenEvent>,
        final_tokens: usize,
        took: Duration,
    ) {
        let mode = request.mode.name();
        for (direction, bytes) in [("up", route.bytes_up), ("down", route.bytes_down)] {
            counter!(names::BYTES_TOTAL, names::LABEL_MODE => mode, names::LABEL_DIRECTION => direction)
                .increment(bytes);
        }
        counter!(names::ROUND_TRIPS_TOTAL, names::LABEL_MODE => mode).increment(u64::from(route.round_trips));
        counter!(names::DEGRADED_TOTAL, names::LABEL_MODE => mode).increment(u64::from(route.degraded));
        counter!(names::PROMPT_TOKENS_CACHED_TOTAL, names::LABEL_MODE => mode)
            .increment(u64::from(route.cached_tokens));
        counter!(names::DISCARDED_TOTAL, names::LABEL_MODE => mode).increment(u64::from(route.discarded));
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).push(Answered {
            request_id: request.request_id.clone(),
            mode: request.mode,
            prompt_tokens: request.prompt.len(),
            route: route.clone(),
            took,
            tokens: trace,
        });
        // Last: who sees the count of answers grow finds the answer everywhere else.
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.answers += 1;
        totals.route.add(route);
        if final_tokens > 0 {
            totals.tokens_per_s = Some(final_tokens as f64 / took.as_secs_f64().max(1e-9));
        }
    }
}

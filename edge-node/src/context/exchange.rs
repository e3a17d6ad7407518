//! Which state crosses the link instead of being computed: decided by what either costs.

use tandem_proto::exchange::{CostInputs, StateRun, bytes_per_token};
use tandem_transport::link::Link;

use super::NodeContext;
use tandem_router::exchange::Exchange;

impl NodeContext {
    /// True if the peer's trunk has our numbers.
    pub(crate) fn shares_trunk(&self, link: &Link) -> bool {
        self.trunk.as_ref().is_some_and(|t| t.is_shared_with(link.peer_hello()))
    }

    /// Whether sending a token's hidden state takes less time than the cloud's trunk would.
    pub(crate) fn hidden_pays(&self, link: &Link) -> bool {
        let Some(trunk) = &self.trunk else { return false };
        match self.settings.send_hidden {
            Exchange::Always => true,
            Exchange::Never => false,
            Exchange::Auto => {
                let wire_s = (trunk.hidden_size * 4) as f64 / link.stats().expected_send_bytes_per_s();
                let trunk_s = self.estimates().draft_s() * trunk.layers as f64 / self.model.spec().layers as f64;
                wire_s < tandem_proto::exchange::TRANSFER_MARGIN * trunk_s
            }
        }
    }

    /// Whether the prompt's state comes sooner from the cloud than from this device's own trunk, which has
    /// `held` of its tokens.
    pub(crate) fn prompt_fetch_pays(&self, link: &Link, tokens: usize, held: usize) -> bool {
        let Some(trunk) = &self.trunk else { return false };
        self.settings.fetch_prompt.moves(|| {
            let row_s = self.estimates().prefill_row_s();
            let share = trunk.layers as f64 / self.model.spec().layers as f64;
            let stats = link.stats();
            CostInputs {
                tokens,
                bytes_per_token: bytes_per_token(&trunk.shape(true)),
                rtt_s: stats.rtt_us as f64 / 1e6,
                goodput: stats.expected_receive_bytes_per_s(),
                holder_delay_s: tokens as f64 * self.estimates().cloud_row_s(),
                recompute_rate: tokens as f64 / (row_s * share * tokens.saturating_sub(held) as f64).max(1e-9),
            }
        })
    }

    /// The run of trunk state of `tokens`; none without a trunk or past the wire's bounds.
    pub(crate) fn trunk_run(&self, tokens: &[u32], with_hidden: bool) -> Option<StateRun> {
        self.trunk.as_ref()?.run(self.tenant_key, tokens, with_hidden).ok()
    }
}

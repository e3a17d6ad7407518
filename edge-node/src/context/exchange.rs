//! Which state crosses the link instead of being computed: decided by what either costs.

use tandem_engine::trunk::{NoTrunk, Trunk};
use tandem_proto::exchange::{CostInputs, StateRun, bytes_per_token};
use tandem_transport::link::Link;

use super::NodeContext;
use tandem_router::exchange::Exchange;

impl NodeContext {
    /// The leading layers that the edge's model and the one at the other end of the link have in common.
    pub(crate) fn trunk(&self, link: &Link) -> Result<Trunk, NoTrunk> {
        let card = self.cloud_card(link).ok_or(NoTrunk::OffThere)?;
        self.shared_layers.with(card)
    }

    /// Whether state may come from a cloud that this node is set up to reach.
    pub(crate) fn may_share_layers(&self) -> bool {
        !self.shared_layers.is_empty() && self.uplinks.configured()
    }

    /// Whether sending a token's hidden state takes less time than the cloud's trunk would.
    pub(crate) fn hidden_pays(&self, link: &Link, trunk: &Trunk) -> bool {
        match self.settings.send_hidden {
            Exchange::Always => true,
            Exchange::Never => false,
            Exchange::Auto => {
                let wire_s = (trunk.hidden_size * 4) as f64 / link.stats().expected_send_bytes_per_s();
                let trunk_s = self.estimates().draft_s() * trunk.share;
                wire_s < tandem_proto::exchange::TRANSFER_MARGIN * trunk_s
            }
        }
    }

    /// Whether the prompt's state comes sooner from the cloud than from this device's own trunk, which has
    /// `held` of its tokens.
    pub(crate) fn prompt_fetch_pays(&self, link: &Link, trunk: &Trunk, tokens: usize, held: usize) -> bool {
        let pays = self.settings.fetch_prompt.moves(|| {
            let row_s = self.estimates().prefill_row_s();
            let stats = link.stats();
            CostInputs {
                tokens,
                bytes_per_token: bytes_per_token(&trunk.shape(true)),
                rtt_s: stats.rtt_us as f64 / 1e6,
                goodput: stats.expected_receive_bytes_per_s(),
                holder_delay_s: tokens as f64 * self.estimates().cloud_row_s(),
                recompute_rate: tokens as f64 / (row_s * trunk.share * tokens.saturating_sub(held) as f64).max(1e-9),
            }
        });
        pays && trunk.fits(tokens, true)
    }

    /// The run of trunk state of `tokens`; none past the wire's bounds.
    pub(crate) fn trunk_run(&self, trunk: &Trunk, tokens: &[u32], with_hidden: bool) -> Option<StateRun> {
        trunk.run(self.tenant_key, tokens, with_hidden).ok()
    }
}

//! A link experiment as Markdown.

use std::fmt::Write as _;

use super::LinkReport;

impl LinkReport {
    /// Speeds, then exchanges.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = self.pair.markdown() + &self.policy.markdown() + &self.data.markdown();
        out.push_str(
            "\n| way | RTT | tokens/s | first token | round trips | bytes up + down | drafts thrown away | round trips hidden | equals `cloud` |\n|---|---|---|---|---|---|---|---|---|\n",
        );
        let yes_no = |x: bool| if x { "yes" } else { "no" };
        for r in &self.speeds {
            let hidden = r.hidden_share.map_or_else(|| "–".into(), |h| format!("{:.0} %", 100.0 * h));
            let equal = r.equals_cloud.map_or("–", yes_no);
            let _ = writeln!(
                out,
                "| {} | {} ms | {:.0} | {:.1} ms | {:.2} | {:.0} + {:.0} | {:.1} | {hidden} | {equal} |",
                r.way.name(),
                r.rtt_ms,
                r.tokens_per_s,
                r.first_token_ms,
                r.round_trips,
                r.bytes[0],
                r.bytes[1],
                r.rolled_back
            );
        }
        if self.exchanges.is_empty() {
            out.push_str("\nThe nodes share no trunk: nothing is exchanged.\n");
            return out;
        }
        let _ = writeln!(out, "\nThe long prompts have about {} tokens.\n", self.long_prompt_tokens);
        out.push_str("| exchange | | RTT | tokens/s | first token | bytes up + down | cloud rows | cloud model time | same text |\n|---|---|---|---|---|---|---|---|---|\n");
        for r in &self.exchanges {
            let _ = writeln!(
                out,
                "| {} | {} | {} ms | {:.0} | {:.1} ms | {:.0} + {:.0} | {:.1} | {:.1} ms | {} |",
                r.exchange,
                if r.on { "on" } else { "off" },
                r.rtt_ms,
                r.tokens_per_s,
                r.first_token_ms,
                r.bytes[0],
                r.bytes[1],
                r.cloud_rows,
                r.cloud_ms,
                yes_no(r.same_text)
            );
        }
        out
    }
}

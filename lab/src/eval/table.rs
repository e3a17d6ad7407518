//! An evaluation as Markdown.

use std::fmt::Write as _;

use tandem_edge_node::request::Mode;

use super::{CategoryReport, EvalReport, Interval, ModeReport, SplitReport};

fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

impl EvalReport {
    /// The sums of every split, then each split's categories.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = self.pair.markdown() + &self.policy.markdown();
        for split in &self.splits {
            out.push_str(&split.data.markdown());
        }
        for split in &self.splits {
            let _ = writeln!(out, "\n### {} ({} prompts)\n", split.split, split.prompts);
            totals(&mut out, split);
            baselines(&mut out, split);
            categories(&mut out, split);
        }
        out
    }
}

fn totals(out: &mut String, split: &SplitReport) {
    let measure = split.measure.title();
    let _ = writeln!(
        out,
        "| mode | {measure} | 95 % interval | tokens decided by the cloud | written by the cloud | round trips | bytes up | bytes down | tokens/s |"
    );
    out.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for mode in &split.modes {
        if let Some(t) = mode.total() {
            let (low, high) = (percent(t.interval.low), percent(t.interval.high));
            let _ = writeln!(
                out,
                "| {} | {} | {low} – {high} | {} | {} | {:.2} | {:.0} | {:.0} | {} |",
                mode.mode.name(),
                percent(t.exact_match),
                percent(t.cloud_share),
                percent(t.written_by_cloud),
                t.round_trips,
                t.bytes_up,
                t.bytes_down,
                speed(t)
            );
        }
    }
    out.push('\n');
    if let Some(recovered) = split.recovered {
        let _ = writeln!(out, "`auto` recovers {} of the distance from `local` to `cloud`.", percent(recovered));
    }
    if let Some(equal) = split.exact_equals_cloud {
        let _ = writeln!(out, "`exact` equals `cloud` token for token on {} of the prompts.", percent(equal));
    }
    let degraded: usize = split.modes.iter().map(|m| m.degraded).sum();
    if degraded > 0 {
        let _ = writeln!(out, "{degraded} answers fell back to the edge: the cloud was away, this run is not sound.");
    }
    out.push('\n');
}

fn speed(t: &CategoryReport) -> String {
    if t.tokens_per_s > 0.0 { format!("{:.0}", t.tokens_per_s) } else { "–".into() }
}

fn baselines(out: &mut String, split: &SplitReport) {
    let Some(own) = split.baselines.first() else { return };
    let _ = writeln!(
        out,
        "| rule at equal share | threshold | tokens decided by the cloud | {} | 95 % interval | {} is ahead by | answers equal to the cloud's | share for 90 % of the distance |\n|---|---|---|---|---|---|---|---|",
        split.measure.title(),
        own.rule
    );
    for b in &split.baselines {
        let (share, hit) = (percent(b.share), percent(b.exact_match));
        let (low, high) = (percent(b.interval.low), percent(b.interval.high));
        let _ = writeln!(
            out,
            "| {} | {:.4} | {share} | {hit} | {low} – {high} | {} | {} | {} |",
            b.rule,
            b.threshold,
            b.behind.map_or_else(|| "–".into(), |(by, i)| in_points(by, i)),
            percent(b.equals_cloud),
            b.share_needed.map_or_else(|| "not in the curve".into(), percent)
        );
    }
    out.push('\n');
}

/// A difference in points, with its interval.
fn in_points(by: f64, interval: Interval) -> String {
    format!("{:+.1} ({:+.1} … {:+.1})", 100.0 * by, 100.0 * interval.low, 100.0 * interval.high)
}

/// Exact match per mode, and for `auto` what it took.
fn categories(out: &mut String, split: &SplitReport) {
    let Some(first) = split.modes.first() else { return };
    out.push_str("| category | n |");
    for mode in &split.modes {
        let _ = write!(out, " {} |", mode.mode.name());
    }
    out.push_str(" `auto`: decided by the cloud | round trips | bytes up + down | tokens/s |\n|---|---|");
    out.push_str(&"---|".repeat(split.modes.len() + 4));
    out.push('\n');
    let auto = split.modes.iter().find(|m| m.mode == Mode::Auto);
    for (at, category) in first.categories.iter().enumerate() {
        let _ = write!(out, "| {} | {} |", category.category, category.prompts);
        for mode in &split.modes {
            let _ = write!(out, " {} |", mode.categories.get(at).map_or_else(String::new, |c| percent(c.exact_match)));
        }
        let _ = writeln!(out, "{}", cost(auto, at));
    }
    out.push('\n');
}

fn cost(auto: Option<&ModeReport>, at: usize) -> String {
    let Some(c) = auto.and_then(|m| m.categories.get(at)) else { return " – | – | – | – |".into() };
    format!(
        " {} | {:.2} | {:.0} + {:.0} | {} |",
        percent(c.cloud_share),
        c.round_trips,
        c.bytes_up,
        c.bytes_down,
        speed(c)
    )
}

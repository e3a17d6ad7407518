//! Plots as SVG; text stays text, so no font is needed to draw them.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::LabError;
use crate::eval::{Curve, SplitReport};
use tandem_edge_node::request::Mode;

const SIZE: (u32, u32) = (840, 520);
/// Readable on white and for most kinds of colour blindness (Okabe and Ito 2008).
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(120, 120, 120)];

fn failed(e: impl std::fmt::Display) -> LabError {
    LabError::Plot(e.to_string())
}

/// Mean score over the share of tokens that the cloud decided, per rule, with the levels of the edge
/// and the cloud alone.
///
/// # Errors
/// The split has no curves, or the file cannot be written.
pub fn shares(split: &SplitReport, to: &Path) -> Result<(), LabError> {
    let levels = [(Mode::Local, "edge alone"), (Mode::Cloud, "cloud alone")]
        .map(|(mode, label)| (split.total(mode).map(|t| t.exact_match), label));
    let points = || split.curves.iter().flat_map(|c| &c.points);
    let values = || points().map(|p| p.exact_match).chain(levels.iter().filter_map(|l| l.0));
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x), high.max(x)));
    let right = points().map(|p| p.share).fold(0.0, f64::max);
    if split.curves.is_empty() || right <= 0.0 {
        return Err(LabError::Plot(format!("{} has no curves", split.split)));
    }
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let title = format!("{}: {} over tokens decided by the cloud", split.split, split.measure.title());
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..100.0 * right * 1.03, 100.0 * low - 1.5..100.0 * high + 1.5)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc("tokens decided by the cloud, %")
            .y_desc(format!("{}, %", split.measure.title()))
            .label_style(("sans-serif", 13))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(failed)?;
        for (level, label) in levels {
            let Some(y) = level.map(|y| 100.0 * y) else { continue };
            let ends = [(0.0, y), (100.0 * right * 1.03, y)];
            chart.draw_series(DashedLineSeries::new(ends, 6, 4, BLACK.mix(0.6).stroke_width(1))).map_err(failed)?;
            let style = ("sans-serif", 13).into_text_style(&root).pos(Pos::new(HPos::Right, VPos::Bottom));
            let name = Text::new(format!("{label} {y:.1} %"), (100.0 * right * 1.02, y + 0.15), style);
            chart.draw_series([name]).map_err(failed)?;
        }
        for (curve, colour) in split.curves.iter().zip(COLOURS) {
            let points: Vec<(f64, f64)> = percents(curve, levels[0].0);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
                .map_err(failed)?
                .label(curve.rule.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
            chart.draw_series(points.iter().skip(1).map(|p| Circle::new(*p, 3, colour.filled()))).map_err(failed)?;
        }
        let labels = chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .label_font(("sans-serif", 13))
            .background_style(WHITE)
            .border_style(BLACK.mix(0.3))
            .draw();
        labels.map_err(failed)?;
        root.present().map_err(failed)?;
    }
    text.push('\n');
    std::fs::write(to, text).map_err(LabError::io(to))
}

/// A curve in percent, from the edge's own point on.
fn percents(curve: &Curve, edge: Option<f64>) -> Vec<(f64, f64)> {
    let start = edge.map(|y| (0.0, 100.0 * y));
    start.into_iter().chain(curve.points.iter().map(|p| (100.0 * p.share, 100.0 * p.exact_match))).collect()
}

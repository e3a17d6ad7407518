//! How good scores are. `scored` is always (score, label), in any order.

/// Area under the ROC curve: the probability that a positive scores above a negative, ties half.
/// 0.5 if there is only one kind.
#[must_use]
pub fn auc(scored: &[(f32, bool)]) -> f32 {
    let mut sorted = scored.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut wins, mut positives) = (0.0f64, 0.0f64, 0.0f64);
    for group in sorted.chunk_by(|a, b| a.0 == b.0) {
        let positive = group.iter().filter(|(_, label)| *label).count() as f64;
        let negative = group.len() as f64 - positive;
        wins += positive * (below + negative / 2.0);
        below += negative;
        positives += positive;
    }
    if below == 0.0 || positives == 0.0 { 0.5 } else { (wins / (below * positives)) as f32 }
}

/// Mean squared difference of probability and label; 0 is best. 0 for no scores.
#[must_use]
pub fn brier(scored: &[(f32, bool)]) -> f32 {
    let squares = scored.iter().map(|(p, label)| {
        let error = f64::from(*p) - f64::from(u8::from(*label));
        error * error
    });
    (squares.sum::<f64>() / scored.len().max(1) as f64) as f32
}

/// Expected calibration error: mean |probability − rate| over `bins` bins of equal count.
#[must_use]
pub fn calibration_error(scored: &[(f32, bool)], bins: usize) -> f32 {
    let mut sorted = scored.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let size = sorted.len().div_ceil(bins.max(1)).max(1);
    let off = sorted.chunks(size).map(|bin| {
        let signed = bin.iter().map(|(p, label)| f64::from(*p) - f64::from(u8::from(*label)));
        signed.sum::<f64>().abs()
    });
    (off.sum::<f64>() / sorted.len().max(1) as f64) as f32
}

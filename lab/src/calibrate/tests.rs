use super::*;

fn sample(n: usize) -> Vec<Row> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/data/calibration.jsonl");
    let rows = crate::questions::read(&path, &crate::questions::ReadOptions::default()).unwrap().0;
    rows.into_iter().filter(|r| matches!(r.category.as_str(), "add" | "mul" | "compare")).take(n).collect()
}

/// Two runs of a small calibration give the same bytes, and the file is one that loads.
fn deterministic_and_valid(rows: &[Row], predicts: Predicts) {
    let pair = Pair::embedded(1).unwrap();
    let mut options = CalibrateOptions::default();
    options.fit.units = Some(4);
    options.fit.epochs = 2;
    let run = || calibrate(&pair, (rows, &[]), &options, &Progress::silent()).unwrap();
    let (file, report) = run();
    let (again, report_again) = run();
    assert_eq!(serde_json::to_vec(&file).unwrap(), serde_json::to_vec(&again).unwrap());
    assert_eq!(report, report_again);
    file.check_pair(&pair.edge.digest(), &pair.cloud.digest()).unwrap();
    let parsed = PolicyFile::parse(&serde_json::to_vec(&file).unwrap()).unwrap();
    assert_eq!(parsed.quality.requests as usize, report.measured_rows);
    assert!(report.measured_rows > 0 && report.measured_rows < rows.len());
    assert!(report.markdown().contains("(chosen)"));
    assert_eq!((file.predicts, report.predicts), (predicts, predicts));
    assert!(file.fitted_on.starts_with(predicts.describe()), "{}", file.fitted_on);
    assert!(report.measured.positive > 0.0 && report.measured.positive <= report.measured.differs);
}

#[test]
fn rows_with_right_answers_teach_the_benefit() {
    deterministic_and_valid(&sample(160), Predicts::Benefit);
}

#[test]
fn rows_without_right_answers_teach_the_difference() {
    let mut rows = sample(48);
    // Else the answer says which wordings belong together.
    rows.retain(|row| !row.key.is_empty());
    rows.iter_mut().for_each(|row| row.answer.clear());
    deterministic_and_valid(&rows, Predicts::Divergence);
}

#[test]
fn wordings_of_a_problem_stay_on_one_side() {
    let rows = sample(400);
    let data = Data::split(&rows, 0.25, 3);
    let mut sides = std::collections::BTreeMap::new();
    for (problem, measured) in data.problems.iter().zip(&data.measured) {
        assert_eq!(sides.entry(*problem).or_insert(*measured), measured);
    }
    let share = data.measured().count() as f64 / rows.len() as f64;
    assert!((0.15..0.35).contains(&share), "{share}");
}

use tandem_lab::{calibrate::*, pair::Pair, progress::Progress, rows};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let n: usize = a[1].parse().unwrap();
    let t = std::time::Instant::now();
    let pair = Pair::embedded(2).unwrap();
    let mut rows = rows::read("models/data/calibration.jsonl".as_ref()).unwrap();
    if n > 0 { rows.truncate(n); }
    let o = CalibrateOptions::default();
    let (file, report) = calibrate(&pair, &rows, &o, &Progress::new("x", 1)).unwrap();
    println!("{}\n{:?}", report.markdown(), t.elapsed());
    file.save("/tmp/policy.json".as_ref()).unwrap();
}

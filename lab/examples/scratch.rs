use tandem_lab::{calibrate::*, pair::Pair, progress::Progress, rows};
use tandem_router::policy::fit::CalibrationKind;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let n: usize = a[1].parse().unwrap();
    let t = std::time::Instant::now();
    let pair = Pair::embedded(2).unwrap();
    let mut rows = rows::read("models/data/calibration.jsonl".as_ref()).unwrap();
    if n > 0 { rows.truncate(n); }
    let mut o = CalibrateOptions::default();
    for x in &a[3..] {
        let (k, v) = x.split_once('=').unwrap();
        let f = || v.parse::<f32>().unwrap();
        match k {
            "units" => o.fit.units = (v != "0").then(|| v.parse().unwrap()),
            "hidden" => if v == "0" { o.fit.hidden = None },
            "wd" => o.fit.weight_decay = f(),
            "lr" => o.fit.learning_rate = f(),
            "epochs" => o.fit.epochs = v.parse().unwrap(),
            "rounds" => o.rounds = v.parse().unwrap(),
            "seed" => o.fit.seed = v.parse().unwrap(),
            "teacher" => o.teacher = f(),
            "share" => o.share = f64::from(f()),
            "platt" => o.fit.calibration = CalibrationKind::Platt,
            _ => panic!("{k}"),
        }
    }
    let (file, report) = calibrate(&pair, &rows, &o, &Progress::silent()).unwrap();
    println!("{:?}\n{}epoch {} {:?}", &a[3..], report.markdown(), report.epoch, t.elapsed());
    file.save(a[2].as_ref()).unwrap();
}

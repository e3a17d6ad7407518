use tandem_engine::bench::*;
use tandem_engine::*;
#[test]
#[ignore = "measures"]
fn speed() {
    let spec = std::env::var("SPEED").unwrap();
    for item in spec.split(',') {
        let (name, t) = item.rsplit_once('@').unwrap();
        let files = match name {
            "edge" => ModelFiles::Embedded { config: tandem_models::EDGE.config, weights: tandem_models::EDGE.weights },
            "cloud" => {
                ModelFiles::Embedded { config: tandem_models::CLOUD.config, weights: tandem_models::CLOUD.weights }
            }
            p => ModelFiles::Gguf(p.into()),
        };
        let c = std::time::Instant::now();
        let m = Model::load(&files, &LoadOptions { threads: t.parse().unwrap(), ..Default::default() }).unwrap();
        let l = c.elapsed();
        let o = BenchOptions { rounds: 5, ..Default::default() };
        let r = bench_model(&m, &o).unwrap();
        println!(
            "{} {}T load {:.2?} prefill {:.0} decode {:.1} verify {:.0} best {:.1}",
            name.rsplit('/').next().unwrap(),
            r.threads,
            l,
            r.median.prefill_tokens_per_s,
            r.median.decode_tokens_per_s,
            r.median.verify_tokens_per_s.unwrap(),
            r.rounds.iter().map(|r| r.decode_tokens_per_s).fold(0f64, f64::max)
        );
        if let Ok(s) = std::env::var("SLEEP") {
            std::thread::sleep(std::time::Duration::from_secs(s.parse().unwrap()));
        }
    }
}

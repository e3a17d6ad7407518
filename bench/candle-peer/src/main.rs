//! Runs candle-transformers' quantized Llama on a GGUF and prints the figures that
//! `tandem bench engine` prints, as JSON.
//!
//! usage: candle-peer FILE.gguf [--threads N] [--prompt N] [--decode N] [--rounds N]

use std::error::Error;
use std::time::Instant;

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use serde_json::json;

const DECODE_PROMPT_TOKENS: usize = 32;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("usage: candle-peer FILE.gguf [--threads N] [--prompt N] [--decode N] [--rounds N]")?;
    let option = |name: &str, default: usize| -> Result<usize, Box<dyn Error>> {
        match args.iter().position(|a| a == name) {
            Some(i) => Ok(args.get(i + 1).ok_or_else(|| format!("{name} needs a number"))?.parse()?),
            None => Ok(default),
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match option("--threads", 0)? {
        0 => cores,
        n => n,
    };
    let (prompt, decode, rounds) = (option("--prompt", 512)?, option("--decode", 64)?, option("--rounds", 5)?.max(1));
    // candle and rayon read it when they first start threads, which is below.
    std::env::set_var("RAYON_NUM_THREADS", threads.to_string());

    let device = Device::Cpu;
    let mut file = std::fs::File::open(path)?;
    let content = Content::read(&mut file)?;
    let vocab = content.tensor_infos.get("token_embd.weight").map_or(1, |t| t.shape.dims()[0]);
    let mut model = ModelWeights::from_gguf(content, &mut file, &device)?;
    let token = |i: usize| (i * 7919 % vocab) as u32;
    let mut pass = |tokens: &[u32], at: usize| -> candle_core::Result<u32> {
        let logits = model.forward(&Tensor::new(tokens, &device)?.unsqueeze(0)?, at)?;
        logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()
    };
    let mut measured = Vec::new();
    for round in 0..=rounds {
        let tokens: Vec<u32> = (0..prompt).map(token).collect();
        let from = Instant::now();
        pass(&tokens, 0)?;
        let prefill = prompt as f64 / from.elapsed().as_secs_f64();
        let mut next = pass(&tokens[..DECODE_PROMPT_TOKENS.min(prompt)], 0)?;
        let from = Instant::now();
        for i in 0..decode {
            next = pass(&[next], DECODE_PROMPT_TOKENS.min(prompt) + i)?;
        }
        let decode = decode as f64 / from.elapsed().as_secs_f64();
        // The first round warms up.
        if round > 0 {
            measured.push((prefill, decode));
        }
    }
    let median = |f: fn(&(f64, f64)) -> f64| {
        let mut v: Vec<f64> = measured.iter().map(f).collect();
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    let round = |prefill: f64, decode: f64| {
        json!({ "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "verify_tokens_per_s": null })
    };
    let report = json!({
        "engine": "candle-transformers-0.11 quantized_llama",
        "threads": threads,
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "verify_tokens": 0,
        "median": round(median(|r| r.0), median(|r| r.1)),
        "rounds": measured.iter().map(|r| round(r.0, r.1)).collect::<Vec<_>>(),
    });
    println!("{report:#}");
    Ok(())
}

//! candle-transformers' quantized Llama as a peer of `tandem bench engine`: loads a GGUF once, then
//! measures a round per line of standard input (the protocol is in `cli/src/bench/peer.rs`).
//!
//! usage: candle-peer FILE.gguf --threads N      (`bench/candle-peer/setup` builds it)
//!
//! Its forward pass gives the logits of the last token only, so it measures no verification.

use std::error::Error;
use std::io::BufRead as _;
use std::time::Instant;

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use serde_json::{json, Value};

const DECODE_PROMPT_TOKENS: usize = 32;

/// The version that this was built from.
fn candle_version() -> &'static str {
    let lock = include_str!("../Cargo.lock");
    let entry = lock.split("[[package]]").find(|entry| entry.contains("name = \"candle-transformers\"")).unwrap_or("");
    entry.lines().find_map(|line| line.strip_prefix("version = ")).unwrap_or("of an unknown version").trim_matches('"')
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, option, threads] = &args[..] else {
        return Err("usage: candle-peer FILE.gguf --threads N".into());
    };
    if option != "--threads" {
        return Err(format!("unknown option {option}").into());
    }
    let threads: usize = threads.parse()?;
    // candle and rayon read it when they first start threads, which is below.
    std::env::set_var("RAYON_NUM_THREADS", threads.to_string());

    let device = Device::Cpu;
    let mut file = std::fs::File::open(path)?;
    let content = Content::read(&mut file)?;
    let vocab = content.tensor_infos.get("token_embd.weight").map_or(1, |t| t.shape.dims()[0]);
    let mut model = ModelWeights::from_gguf(content, &mut file, &device)?;
    let mut pass = |tokens: &[u32], at: usize| -> candle_core::Result<u32> {
        let logits = model.forward(&Tensor::new(tokens, &device)?.unsqueeze(0)?, at)?;
        logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()
    };
    let engine = format!("candle-transformers {} quantized_llama", candle_version());
    println!("{}", json!({ "engine": engine, "threads": threads }));
    for line in std::io::stdin().lock().lines() {
        let job: Value = serde_json::from_str(&line?)?;
        let number = |name: &str| job[name].as_u64().map(|n| n as usize).ok_or(format!("the job has no {name}"));
        let (prompt, decode) = (number("prompt_tokens")?, number("decode_tokens")?);
        let tokens: Vec<u32> =
            (0..prompt.max(DECODE_PROMPT_TOKENS)).map(|i| (i * 7919 % vocab) as u32).collect();
        let from = Instant::now();
        pass(&tokens[..prompt], 0)?;
        let prefill = prompt as f64 / from.elapsed().as_secs_f64();
        let mut next = pass(&tokens[..DECODE_PROMPT_TOKENS], 0)?;
        let from = Instant::now();
        for i in 0..decode {
            next = pass(&[next], DECODE_PROMPT_TOKENS + i)?;
        }
        let decode = decode as f64 / from.elapsed().as_secs_f64();
        println!("{}", json!({ "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "verify": [] }));
    }
    Ok(())
}

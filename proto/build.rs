//! Generates the control plane's tonic types, only when the feature `rpc` asks for them.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=control.proto");
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_RPC").is_none() {
        return Ok(());
    }
    let descriptors = protox::compile(["control.proto"], ["."])?;
    // The manifest cannot tie build-dependencies to a feature without renaming them all; skipping
    // the work keeps the pure build quick.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}

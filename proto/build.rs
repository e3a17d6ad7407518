//! Generates the control plane's tonic types, only when the feature `rpc` asks for them.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=control.proto");
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "rpc")]
    {
        // protox parses the file in Rust, so no protoc is needed.
        let descriptors = protox::compile(["control.proto"], ["."])?;
        tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    }
    Ok(())
}

//! Rebuilds the crate when a file is added to the page's assets.

fn main() {
    println!("cargo:rerun-if-changed=assets");
}

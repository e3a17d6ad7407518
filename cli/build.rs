//! Compiles `src/allocator.c` into every program that links this crate, where the C library is glibc.

fn main() {
    println!("cargo::rerun-if-changed=src/allocator.c");
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu")
        && std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux")
    {
        // Nothing refers to it, so the linker must be told to keep it.
        cc::Build::new().file("src/allocator.c").link_lib_modifier("+whole-archive").compile("allocator");
    }
}

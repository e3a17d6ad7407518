//! Models by name. The embedded pair is compiled into the binary, so that `tandem up` needs no file
//! and no network, also after `cargo install` (provenance and licences: `models/README.md`,
//! `models/*/SOURCES.md`). Others are files: [`resolve()`] finds them, [`store`] is where downloads lie.

mod loaded;
pub mod repo;
mod resolve;
pub mod store;

pub use loaded::LoadedModel;
pub use repo::is_file;
pub use resolve::{Found, Place, ResolveError, gguf_files, matching, resolve};
pub use tandem_engine::{SplitPart, split_part};

/// The files of one embedded model, in Hugging Face layout. Each is a `static`: a `const` would put its
/// bytes into the binary once for every unit of code that names it.
pub struct EmbeddedModel {
    /// Name under which the model is served.
    pub name: &'static str,
    /// `config.json`.
    pub config: &'static [u8],
    /// `model.safetensors`.
    pub weights: &'static [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'static [u8],
    /// `chat_template.jinja`.
    pub chat_template: &'static str,
    /// `generation_config.json`.
    pub generation_config: &'static [u8],
}

/// The small model that runs on the device.
pub static EDGE: EmbeddedModel = EmbeddedModel {
    name: "demo-edge",
    config: include_bytes!("../edge/config.json"),
    weights: include_bytes!("../edge/model.safetensors"),
    tokenizer: include_bytes!("../edge/tokenizer.json"),
    chat_template: include_str!("../edge/chat_template.jinja"),
    generation_config: include_bytes!("../edge/generation_config.json"),
};

/// The mixture-of-experts model that runs in the cloud.
pub static CLOUD: EmbeddedModel = EmbeddedModel {
    name: "demo-cloud",
    config: include_bytes!("../cloud/config.json"),
    weights: include_bytes!("../cloud/model.safetensors"),
    tokenizer: include_bytes!("../cloud/tokenizer.json"),
    chat_template: include_str!("../cloud/chat_template.jinja"),
    generation_config: include_bytes!("../cloud/generation_config.json"),
};

/// Layers that both share from the bottom, with the embedding below them (`pair.json`).
pub const TRUNK_LAYERS: usize = 2;

/// Parameters of the calibrated escalation rule fitted for the pair (`policy.json`), if there are any.
pub static POLICY: Option<&[u8]> = Some(include_bytes!("../policy.json"));

/// Every embedded model, by name.
pub static ALL: [&EmbeddedModel; 2] = [&EDGE, &CLOUD];

/// The embedded model called `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static EmbeddedModel> {
    ALL.into_iter().find(|m| m.name == name)
}

//! `tandem model`: the models on this machine. They lie in the Hugging Face cache, so that what other
//! tools have downloaded is there too, and the other way round.

mod hub;
mod pull;
mod remove;
mod show;

use serde_json::json;
use tandem_models::repo::{HubName, MAIN};
use tandem_models::store::{Snapshot, Store};

use crate::args::{Global, ModelArgs, ModelCommand, ModelPullArgs};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::{print_json, print_line};

/// Runs a subcommand.
pub(crate) async fn run(global: &Global, args: &ModelArgs) -> Result<(), Failure> {
    match &args.command {
        ModelCommand::Pull(args) => fetch(global, args).await,
        ModelCommand::Ls => list(global),
        ModelCommand::Show(args) => show::run(global, args),
        ModelCommand::Rm(args) => remove::run(global, args),
    }
}

fn store() -> Result<Store, Failure> {
    Store::from_env().ok_or_else(|| {
        Failure::new(Code::State, "this user has no home folder; name one for models with HF_HUB_CACHE or HF_HOME")
    })
}

async fn fetch(global: &Global, args: &ModelPullArgs) -> Result<(), Failure> {
    let mut name: HubName = args.name.parse().or_fail(Code::Usage)?;
    if let Some(revision) = &args.revision {
        if name.revision != MAIN {
            return Err(Failure::new(Code::Usage, "the revision is given twice, in the name and by --revision"));
        }
        // Checked like one in a name.
        name = format!("{}@{revision}{}", name.repo, name.file.map(|f| format!(":{f}")).unwrap_or_default())
            .parse()
            .or_fail(Code::Usage)?;
    }
    let store = store()?;
    let work = pull::pull(&name, &store, global.json);
    let snapshot = tokio::select! {
        pulled = work => pulled?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::reported(Code::Interrupted)),
    };
    let bytes = size(&snapshot);
    if global.json {
        let value =
            json!({ "model": name.to_string(), "commit": snapshot.commit, "path": snapshot.dir, "bytes": bytes });
        print_json(&value);
    } else {
        print_line(&format!("{name} is in {} ({})", snapshot.dir.display(), human(bytes)));
        print_line(&format!("Run it:  tandem up --no-cloud --edge-model {name}"));
    }
    Ok(())
}

fn list(global: &Global) -> Result<(), Failure> {
    let store = store()?;
    let snapshots: Vec<Snapshot> = store.repos().iter().flat_map(|repo| store.snapshots(repo)).collect();
    if global.json {
        let embedded = tandem_models::ALL.map(|model| json!({ "model": model.name, "embedded": true }));
        let stored = snapshots.iter().map(|snapshot| {
            let files: Vec<_> = snapshot.files().iter().map(|f| json!({ "name": f.name, "bytes": f.bytes })).collect();
            json!({
                "model": snapshot.repo.to_string(),
                "commit": snapshot.commit,
                "refs": snapshot.refs,
                "path": snapshot.dir,
                "bytes": size(snapshot),
                "files": files,
            })
        });
        let models: Vec<_> = embedded.into_iter().chain(stored).collect();
        print_json(&json!({ "store": store.root(), "models": models }));
        return Ok(());
    }
    for model in tandem_models::ALL {
        print_line(&format!("{:<48} {:>10}  in the program", model.name, human(model.weights.len() as u64)));
    }
    for snapshot in &snapshots {
        let revision = match snapshot.refs.as_slice() {
            [] => snapshot.commit.chars().take(12).collect(),
            refs => refs.join(", "),
        };
        print_line(&format!("{:<48} {:>10}  {revision}", snapshot.repo.to_string(), human(size(snapshot))));
        for file in snapshot.files().iter().filter(|file| file.name.ends_with(".gguf")) {
            print_line(&format!("  :{:<45} {:>10}", file.name, human(file.bytes)));
        }
    }
    print_line(&format!("store: {store}"));
    Ok(())
}

fn size(snapshot: &Snapshot) -> u64 {
    snapshot.files().iter().map(|file| file.bytes).sum()
}

/// Bytes for people.
pub(crate) fn human(bytes: u64) -> String {
    let units = ["KB", "MB", "GB", "TB"];
    let mut value = bytes as f64 / 1e3;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1e3;
        unit += 1;
    }
    if value < 9.95 { format!("{value:.1} {}", units[unit]) } else { format!("{value:.0} {}", units[unit]) }
}

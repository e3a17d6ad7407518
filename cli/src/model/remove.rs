//! `tandem model rm`: a snapshot, and the blobs that no other snapshot points to.

use std::collections::BTreeSet;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::PathBuf;

use serde_json::json;
use tandem_models::repo::HubName;
use tandem_models::store::Snapshot;

use super::{human, size, store};
use crate::args::{Global, ModelRmArgs};
use crate::failure::{Code, Failure, OrFail as _};
use crate::ready::{print_json, print_line};

/// Removes what was named: one revision, or all of a repository.
pub(super) fn run(global: &Global, args: &ModelRmArgs) -> Result<(), Failure> {
    let name: HubName = args.name.parse().or_fail(Code::Usage)?;
    if name.file.is_some() {
        let message = format!("files are not removed one by one; give {} or {0}@REVISION", name.repo);
        return Err(Failure::new(Code::Usage, message));
    }
    let store = store()?;
    let all = store.snapshots(&name.repo);
    // `org/name@main` is one revision; read as a name it would be the same as `org/name`.
    let one_revision = args.name.contains('@');
    let (gone, kept): (Vec<Snapshot>, Vec<Snapshot>) = if one_revision {
        let commit = store.snapshot(&name.repo, &name.revision).map(|snapshot| snapshot.commit);
        all.into_iter().partition(|snapshot| Some(&snapshot.commit) == commit.as_ref())
    } else {
        (all, Vec::new())
    };
    let (asked, repo) = (&args.name, store.repo_dir(&name.repo));
    if gone.is_empty() {
        return Err(Failure::new(Code::Usage, format!("{asked} is not in the store; see `tandem model ls`")));
    }
    let bytes: u64 = gone.iter().map(size).sum();
    if !args.yes && !confirmed(&format!("Remove {asked} ({}) from {store}?", human(bytes)))? {
        return Err(Failure::new(Code::Interrupted, "nothing was removed"));
    }
    let failed = |e: std::io::Error| Failure::new(Code::State, format!("{} cannot be removed: {e}", repo.display()));
    let freed = if kept.is_empty() {
        let freed = folder_bytes(&repo);
        std::fs::remove_dir_all(&repo).map_err(failed)?;
        freed
    } else {
        let needed: BTreeSet<PathBuf> = kept.iter().flat_map(Snapshot::blobs).collect();
        let mut freed = 0;
        for snapshot in &gone {
            for blob in snapshot.blobs().difference(&needed) {
                // A snapshot may hold files that are no links.
                freed += std::fs::metadata(blob).map_or(0, |meta| meta.len());
                std::fs::remove_file(blob).map_err(failed)?;
            }
            std::fs::remove_dir_all(&snapshot.dir).map_err(failed)?;
            for reference in &snapshot.refs {
                std::fs::remove_file(repo.join("refs").join(reference)).map_err(failed)?;
            }
        }
        freed
    };
    if global.json {
        print_json(&json!({ "removed": asked, "snapshots": gone.len(), "bytes": freed }));
    } else {
        print_line(&format!("removed {asked}: {} freed", human(freed)));
    }
    Ok(())
}

fn folder_bytes(dir: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(dir.join("blobs")).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

fn confirmed(question: &str) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new(Code::Usage, "nobody is there to ask; say --yes"));
    }
    eprint!("{question} [y/N] ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).or_fail(Code::Failed)?;
    Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

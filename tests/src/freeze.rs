//! Stops one thread of a process, as a hung accelerator does: everything else of it lives on (Linux).

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// A stopped thread; it goes on when this is dropped.
#[derive(Debug)]
pub struct Frozen {
    /// Its end ends the wait of the tracer.
    thaw: Option<Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.thaw.take());
        if let Some(tracer) = self.tracer.take() {
            // It has nothing to say.
            let _ = tracer.join();
        }
    }
}

/// Stops the thread called `name` of the process `pid`.
pub fn freeze(pid: u32, name: &str) -> Result<Frozen> {
    let thread = thread(pid, name)?.with_context(|| format!("no thread `{name}` in {pid}"))?;
    let (thaw, wait) = channel::<()>();
    let (stopped, told) = channel();
    // Only the thread that has stopped another one may let it go.
    let tracer = std::thread::spawn(move || {
        let stop = || {
            ptrace::seize(thread, ptrace::Options::empty())?;
            ptrace::interrupt(thread)?;
            waitpid(thread, Some(WaitPidFlag::__WALL))
        };
        let is_stopped = stop();
        let go_on = is_stopped.is_ok();
        let _ = stopped.send(is_stopped);
        if go_on {
            let _ = wait.recv();
            // The process may have ended.
            let _ = ptrace::detach(thread, None);
        }
    });
    let frozen = Frozen { thaw: Some(thaw), tracer: Some(tracer) };
    told.recv()?.with_context(|| format!("thread `{name}` of {pid} cannot be stopped"))?;
    Ok(frozen)
}

fn thread(pid: u32, name: &str) -> Result<Option<Pid>> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        if std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim_end() == name {
            let id: i32 = entry.file_name().to_str().context("a thread's number")?.parse()?;
            return Ok(Some(Pid::from_raw(id)));
        }
    }
    Ok(None)
}

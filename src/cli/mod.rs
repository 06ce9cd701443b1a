//! The command line: arguments come in, an exit code goes out, and what there is to say is printed.
//!
//! ```text
//!  arguments ── args ──▶ Plan ── run ──▶ the library ──▶ Exit
//!                                  └── events ── progress, summary ── output ──▶ terminal, lines or JSON
//! ```
//!
//! `args` knows clap and nothing else does; a [`Plan`] is typed and checked; [`progress`] and [`summary`] turn
//! events into text and print nothing.

mod args;
mod check;
mod engine;
mod exit;
mod hook;
pub mod output;
mod plan;
pub mod progress;
pub mod quantity;
mod summary;
mod trust;

pub use args::{Stop, parse};
pub use exit::Exit;
pub use plan::{AgentPlan, CheckPlan, HookPlan, LogFormat, MovePlan, Plan, TrustChange, TrustPlan};
pub use summary::summary;

use crate::kernel::open_files;
use anyhow::Context;
use std::process::ExitCode;

/// Does what was asked and says how the program ends. An error is for the caller to print; it ends the program
/// with [`Exit::Internal`].
///
/// # Errors
/// If the command could not be done at all.
pub fn run(plan: Plan) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout();
    open_files::allow_most().context("cannot raise the limit of open files")?;
    match plan {
        Plan::Identity { state_dir } => trust::identity(&state_dir, &mut out)?,
        Plan::Trust(plan) => match trust::trust(&plan, &mut out) {
            Err(error) if error.is_usage() => {
                eprintln!("migrate: {error}");
                return Ok(Exit::Usage.into());
            }
            done => done?,
        },
        // CRIU reads exit 0 as go on and anything else as undo.
        Plan::Hook(plan) if hook::run(&plan) => {}
        Plan::Hook(_) => return Ok(ExitCode::FAILURE),
        Plan::Pager(arguments) => return Ok(crate::target::pager::main(arguments)),
        Plan::Move(plan) => return engine::move_container(&plan),
        Plan::Check(plan) => return check::check(&plan, &mut out),
        Plan::Agent(plan) => return engine::run_agent(&plan),
        Plan::Recover {
            state_dir,
            resume_source,
        } => return engine::recover_all(&state_dir, resume_source, &mut out),
        Plan::Resume { state_dir } => return engine::resume_serving(&state_dir, &mut out),
        Plan::Guard(arguments) => return engine::run_guard(&arguments),
        Plan::Stdio(arguments) => return engine::run_stdio(&arguments),
    }
    Ok(Exit::Done.into())
}

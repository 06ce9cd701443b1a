//! `migrate check`: what works here, as a table or as JSON.

use super::exit::Exit;
use super::plan::CheckPlan;
use crate::check::{self, HostCheck, KernelBug};
use crate::kernel::bugs::{By, Standing};
use crate::migration::event::Verdict;
use crate::migration::report::Tracker;
use std::io::{self, Write};
use std::process::ExitCode;

/// Looks at this host and prints what was found. A host that cannot take part is [`Exit::Refused`].
pub fn check(plan: &CheckPlan, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let found = check::check(&plan.state_dir, &plan.runtime_root);
    if plan.json {
        serde_json::to_writer_pretty(&mut *out, &found)?;
        writeln!(out)?;
    } else {
        table(&found, out)?;
    }
    let exit = if found.passes() {
        Exit::Done
    } else {
        Exit::Refused
    };
    Ok(exit.into())
}

fn table(found: &HostCheck, out: &mut impl Write) -> io::Result<()> {
    let width = found
        .findings
        .iter()
        .map(|finding| finding.what.len())
        .max()
        .unwrap_or(0);
    for finding in &found.findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "note   ",
            Verdict::Refused => "MISSING",
        };
        writeln!(
            out,
            "{:width$}  {verdict}  {}",
            finding.what, finding.detail
        )?;
        if let Some(fix) = &finding.fix {
            writeln!(out, "{:width$}           fix: {fix}", "")?;
        }
    }
    bugs(&found.kernel_bugs, out)?;
    let tracker = match found.tracker {
        Some(Tracker::UffdWp) => "uffd-wp",
        Some(Tracker::SoftDirty) => "soft-dirty",
        None => "none",
    };
    writeln!(
        out,
        "\nmigrations from here will use: tracker {tracker}, {}",
        found.freeze
    )
}

/// One line for each bug; what it is and what is done about it only where it is here or may be.
fn bugs(bugs: &[KernelBug], out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\nknown kernel bugs (docs/kernel-bugs.md)")?;
    let width = bugs.iter().map(|bug| bug.name.len()).max().unwrap_or(0);
    let version = bugs.first().and_then(|bug| bug.kernel.as_deref());
    let version = version.unwrap_or("unknown");
    for bug in bugs {
        let standing = match (bug.standing, bug.by) {
            (Standing::Present, _) => "present (tried)".to_owned(),
            (Standing::Possible, _) => format!("possible (kernel {version})"),
            (Standing::Fixed, By::Probe) => "not here (tried)".to_owned(),
            (Standing::Fixed, _) => format!("fixed (kernel {version})"),
            (Standing::NotApplicable, By::Version) => format!("not yet there (kernel {version})"),
            (Standing::NotApplicable, _) => {
                "does not apply: what it touches is not here".to_owned()
            }
        };
        write!(out, "{:width$}  {}: {standing}", bug.name, bug.reference)?;
        if matches!(bug.standing, Standing::Present | Standing::Possible) {
            match &bug.lacks {
                None => write!(out, ": {}", bug.remedy)?,
                Some(need) => write!(out, ": tracker avoided, for the remedy needs {need}")?,
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

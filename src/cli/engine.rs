//! The commands that have the engine behind them.

use super::exit::Exit;
use super::output::{Format, Output};
use super::plan::{AgentPlan, LogFormat, MovePlan};
use crate::agent;
use crate::api::{Canceller, Migration};
use crate::kernel::ptrace;
use crate::migration::MigrationId;
use crate::migration::event::Side;
use crate::migration::report::{Outcome, Report, Tracker};
use crate::recover::{End, Finding, recover, resume};
use crate::source::guard;
use crate::source::run::resume_source;
use crate::source::settle::{LOST, is_known};
use crate::source::tracker::TrackerKind;
use crate::target::stdio;
use anyhow::Context;
use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// `migrate --to HOST:PORT CONTAINER`
pub fn move_container(plan: &MovePlan) -> anyhow::Result<ExitCode> {
    log_to_stderr(LogFormat::Human, "warn");
    // Before anything is touched: afterwards it would be too late to say that there can be no report.
    let report_file = match plan.report.as_deref().map(open_report).transpose() {
        Ok(file) => file,
        Err(error) => {
            eprintln!("migrate: {error:#}");
            return Ok(Exit::Usage.into());
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut migration = migration(plan);
        let mut events = migration.events();
        let canceller = migration.canceller();
        tokio::spawn(cancel_on_signal(canceller));
        let format = match (plan.json, std::io::stdout().is_terminal()) {
            (true, _) => Format::Json,
            (false, true) => Format::Terminal {
                width: terminal_width(),
            },
            (false, false) => Format::Lines,
        };
        let shown = tokio::spawn(async move {
            let mut output = Output::new(std::io::stdout(), format);
            while let Some(event) = events.recv().await {
                // A reader that went away must not stop a migration half way.
                let _ = output.event(&event);
            }
        });
        let result = migration.run().await;
        let _ = shown.await;
        ptrace::wait_for_stuck();
        let report = result?;
        if let Some(file) = report_file
            && let Err(error) = write_report(file, &report)
        {
            // The exit code says how the migration ended.
            eprintln!("migrate: cannot write the report: {error:#}");
        }
        complain(plan, &report);
        Ok(Exit::of(&report.outcome).into())
    })
}

fn open_report(path: &Path) -> anyhow::Result<File> {
    // Not emptied yet: an engine that fails has no report to write over the one before.
    let opened = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path);
    opened.with_context(|| format!("cannot write the report to {}", path.display()))
}

fn write_report(mut file: File, report: &Report) -> anyhow::Result<()> {
    // A pipe or a terminal has no length.
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Ok(file.write_all(&serde_json::to_vec_pretty(report)?)?)
}

/// Says on standard error why a container has not moved.
fn complain(plan: &MovePlan, report: &Report) {
    let complaint = match &report.outcome {
        Outcome::Moved | Outcome::WouldMove => return,
        Outcome::Refused { reasons } => reasons.join("\nmigrate: "),
        Outcome::RolledBack { reason, stays, .. } => {
            format!("rolled back, {} {stays}: {reason}", report.container)
        }
        Outcome::Unknown { reason } => format!(
            "unknown whether {} moved, it stays frozen here: {reason}; find out with: migrate recover --state-dir {}",
            report.container,
            plan.state_dir.display()
        ),
        Outcome::Incomplete { reason } => format!(
            "{} runs at {}, which has not said that every page is in its place and every file on disk; it is kept frozen here: {reason}; go on with: migrate resume --state-dir {}",
            report.container,
            report.target,
            plan.state_dir.display()
        ),
        Outcome::Stranded { reason } => stranded(
            &report.container.to_string(),
            reason,
            &plan.state_dir,
            report.migration,
        ),
    };
    eprintln!("migrate: {complaint}");
}

fn migration(plan: &MovePlan) -> Migration {
    let mut migration = Migration::new(plan.container.clone(), plan.to.clone())
        .runtime_root(&plan.runtime_root)
        .state_dir(&plan.state_dir)
        .max_rounds(plan.limits.max_rounds)
        .timeout(plan.limits.timeout)
        .mode(plan.mode)
        .reconnect_timeout(plan.reconnect_timeout)
        .auto_converge(plan.auto_converge)
        .compression(plan.compression)
        .dry_run(plan.dry_run)
        .rootfs(plan.rootfs);
    if plan.strict_downtime {
        migration = migration.downtime_limit(plan.limits.downtime);
    }
    if let Some(bandwidth) = plan.bandwidth {
        migration = migration.bandwidth_limit(bandwidth.0);
    }
    for path in &plan.shared {
        migration = migration.shared(path);
    }
    match plan.tracker {
        Some(Tracker::UffdWp) => migration.tracker(TrackerKind::UffdWp),
        Some(Tracker::SoftDirty) => migration.tracker(TrackerKind::SoftDirty),
        None => migration,
    }
}

async fn cancel_on_signal(canceller: Canceller) -> std::io::Result<()> {
    let (mut int, mut term) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    tokio::select! {
        _ = int.recv() => {}
        _ = term.recv() => {}
    }
    eprintln!("migrate: stopping; the container goes on here, unless it is past the commit");
    canceller.cancel();
    Ok(())
}

/// `migrate agent`
pub fn run_agent(plan: &AgentPlan) -> anyhow::Result<ExitCode> {
    log_to_stderr(plan.log, "info");
    let plan = agent::AgentPlan {
        listen: plan.listen,
        state_dir: plan.state_dir.clone(),
        runtime_root: plan.runtime_root.clone(),
        program: std::env::current_exe().context("cannot tell which program this is")?,
    };
    agent::run(&plan)?;
    Ok(Exit::Done.into())
}

/// What a person is told who has to decide.
fn stranded(container: &str, reason: &str, state_dir: &Path, migration: MigrationId) -> String {
    format!(
        "{container} is kept frozen here, and it may have written to files that both hosts use: {reason}; let it go on with: {}; or delete it",
        resume_source(state_dir, migration)
    )
}

/// `migrate recover`
pub fn recover_all(
    state_dir: &Path,
    resume_source: Option<MigrationId>,
    out: &mut impl Write,
) -> anyhow::Result<ExitCode> {
    log_to_stderr(LogFormat::Human, "warn");
    if let Some(migration) = resume_source
        && !is_known(state_dir, migration)
    {
        eprintln!("migrate: no migration {migration} from here");
        return Ok(Exit::Usage.into());
    }
    let findings = recover(state_dir, resume_source)?;
    if findings.is_empty() {
        writeln!(out, "nothing to recover")?;
    }
    tell(state_dir, findings, out)
}

/// `migrate resume`
pub fn resume_serving(state_dir: &Path, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    log_to_stderr(LogFormat::Human, "warn");
    let findings = resume(state_dir)?;
    if findings.is_empty() {
        writeln!(
            out,
            "no container that moved away from here needs anything of it"
        )?;
    }
    tell(state_dir, findings, out)
}

fn tell(
    state_dir: &Path,
    findings: Vec<Finding>,
    out: &mut impl Write,
) -> anyhow::Result<ExitCode> {
    let mut exits = Vec::with_capacity(findings.len());
    for finding in findings {
        let side = match finding.side {
            Side::Source => "from here",
            Side::Target => "to here",
        };
        let done = |text: &str| (Exit::Done, text.to_owned());
        let (exit, end) = match finding.end {
            End::Moved => done("the container lives at the target"),
            End::RolledBack => done("rolled back, the container lives at the source"),
            End::Running(None) => done("still running, left alone"),
            End::Running(Some(who)) => done(&format!("still running, left alone: {who}")),
            End::Lost => done(
                "the copy here was lost before it was complete: it is gone, and the source goes on with what it kept",
            ),
            End::TakenBack => done(
                "the copy was lost at the target: the container goes on here as it was at the switch",
            ),
            End::Stranded => (
                Exit::Incomplete,
                stranded("the container", LOST, state_dir, finding.migration),
            ),
            End::Incomplete(reason) => (
                Exit::Incomplete,
                format!(
                    "the container runs at the target and is not complete there; it is kept frozen at the source: {reason}"
                ),
            ),
            End::Unknown(reason) => (
                Exit::Unknown,
                format!("unknown, the container stays frozen: {reason}"),
            ),
            End::Stuck(reason) => (Exit::Internal, reason),
        };
        writeln!(out, "{} {side}: {end}", finding.migration)?;
        exits.push(exit);
    }
    let worst = [Exit::Unknown, Exit::Internal, Exit::Incomplete]
        .into_iter()
        .find(|exit| exits.contains(exit));
    Ok(worst.unwrap_or(Exit::Done).into())
}

/// `migrate guard STATE_DIR MIGRATION`
pub fn run_guard(arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    log_to_stderr(LogFormat::Human, "warn");
    let [state_dir, migration] = arguments else {
        anyhow::bail!("migrate guard is started by a migration");
    };
    let migration: MigrationId = migration.to_string_lossy().parse()?;
    guard::watch(Path::new(state_dir), migration);
    Ok(Exit::Done.into())
}

/// `migrate stdio LOG`
pub fn run_stdio(arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    let [log] = arguments else {
        anyhow::bail!("migrate stdio is started by the agent");
    };
    stdio::log(&PathBuf::from(log))?;
    Ok(Exit::Done.into())
}

/// `MIGRATE_LOG` decides what is logged, in the syntax of tracing's `EnvFilter`.
fn log_to_stderr(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_env("MIGRATE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Human => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}

fn terminal_width() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.map_or(80, |size| usize::from(size.ws_col)).max(20)
}

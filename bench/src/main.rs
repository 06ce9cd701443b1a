//! The core benchmark: how long a container stands still, and what moving it costs, against runc and CRIU alone and
//! against the bare transfer of the same bytes. `scripts/bench core` runs it. What tracking writes costs is measured by
//! itself: [`trackers`], `scripts/bench trackers`.
//!
//! ```text
//!  case (memory × dirty rate × packet size)  ─▶ mover (migrate | runc-checkpoint | tls-copy)  ─▶ record  ─▶ summary
//! ```
//!
//! The gap is what the container itself saw: the longest time its clock stood still. A record is verified only if the
//! workload found every page right afterwards.

mod chaos;
mod checkpoint;
mod engine;
mod faults;
mod guests;
mod measure;
mod modes;
mod predump;
mod prefork;
mod record;
mod summary;
mod tls_copy;
mod trackers;

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use measure::{Case, System};
use record::{Machine, Recorder};

/// Benchmarks of migrate.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Containers of several sizes, idle and busy.
    Core {
        /// One run of each case instead of three.
        #[arg(long)]
        quick: bool,
        /// Systems to measure.
        #[arg(
            long,
            value_enum,
            value_delimiter = ',',
            default_value = "runc-checkpoint,tls-copy,migrate"
        )]
        systems: Vec<System>,
        /// Directory for core.jsonl and README.md.
        #[arg(long)]
        results: PathBuf,
    },
    /// What each dirty tracker of this kernel costs, and whether it agrees with a program's own record.
    Trackers(trackers::Arguments),
    /// Against CRIU's own pre-copy, which only a kernel with soft-dirty bits has.
    Predump(predump::Options),
    /// Pre-copy, post-copy, both, the engine's choice, and CRIU's post-copy, on several links.
    Modes(modes::Options),
    /// Memory that forked processes share, on the wire and at both ends.
    Prefork(prefork::Options),
    /// What a fault costs in post-copy, idle and under full push.
    Faults(faults::Options),
    /// Moves while things go wrong at random: nothing is measured, everything is judged.
    Chaos(chaos::Options),
    /// Another benchmark, in a guest of each kernel of scripts/guest.
    InGuests(guests::Arguments),
    /// Part of the benchmark, started by it on a host.
    #[command(subcommand, hide = true)]
    Part(Part),
}

#[derive(Subcommand)]
enum Part {
    /// Holds so many MiB of memory for another process to read.
    Hold { mib: u64 },
    /// Receives so many MiB over TLS.
    TlsReceive {
        listen: SocketAddrV4,
        mib: u32,
        certificate: PathBuf,
    },
    /// Sends so many MiB over TLS.
    TlsSend {
        to: SocketAddrV4,
        mib: u32,
        certificate: PathBuf,
    },
    /// Unpacks what arrives over TCP.
    TreeReceive { listen: SocketAddrV4 },
    /// Packs directories and sends them over TCP.
    TreeSend {
        to: SocketAddrV4,
        directories: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Core {
            quick,
            systems,
            results,
        } => core(quick, &systems, &results),
        Command::Trackers(arguments) => trackers::run(&arguments),
        Command::Faults(options) => faults::run(&options),
        Command::Chaos(options) => chaos::run(&options),
        Command::InGuests(arguments) => guests::run(&arguments),
        Command::Predump(options) => predump::run(&options),
        Command::Modes(options) => modes::run(&options),
        Command::Prefork(options) => prefork::run(&options),
        Command::Part(part) => run_part(part).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("bench: {why:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs every case with every system. Returns whether all of it went well.
fn core(quick: bool, systems: &[System], results: &std::path::Path) -> Result<bool> {
    std::fs::create_dir_all(results).with_context(|| format!("creating {}", results.display()))?;
    let machine = Machine::read()?;
    let mut recorder = Recorder::create(results.join("core.jsonl"), machine.clone())?;
    let runs = if quick { 1 } else { 3 };
    for run in 1..=runs {
        for case in Case::core() {
            for &system in systems.iter().filter(|&&system| case.suits(system)) {
                let load = record::load()?;
                let measured = measure::run(&case, system);
                recorder.add(&case, system, run, load, measured)?;
            }
        }
    }
    let records = recorder.finish();
    let summary = summary::write(&records, &machine)?;
    let readme = results.join("README.md");
    std::fs::write(&readme, &summary).with_context(|| format!("writing {}", readme.display()))?;
    println!("\n{summary}");
    Ok(records.iter().all(|record| record.verified))
}

fn run_part(part: Part) -> Result<()> {
    match part {
        Part::Hold { mib } => faults::hold(mib),
        Part::TlsReceive {
            listen,
            mib,
            certificate,
        } => tls_copy::receive(listen, mib, &certificate),
        Part::TlsSend {
            to,
            mib,
            certificate,
        } => tls_copy::send(to, mib, &certificate),
        Part::TreeReceive { listen } => checkpoint::receive_tree(listen),
        Part::TreeSend { to, directories } => checkpoint::send_tree(to, &directories),
    }
}

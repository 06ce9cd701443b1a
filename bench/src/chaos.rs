//! Moves with random faults, and what is true after each: exactly one copy, right, nothing left, and it can move again.
//!
//! ```text
//!  seed ─▶ Scenario: workload, mode, link, one or two (moment, fault) ─▶ two hosts, a container, `migrate`
//!       ─▶ faults at their moments ─▶ recovery as an operator would ─▶ verdict: a line of chaos.jsonl
//! ```
//!
//! A seed draws the same move and faults every time; what the machine does in between differs. `scripts/chaos` runs it.

mod faults;
mod scenario;
mod trial;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use crate::record::Machine;
use scenario::Scenario;
use trial::Found;

/// How much chaos.
#[derive(clap::Args)]
pub struct Options {
    /// Moves to make.
    #[arg(long, default_value_t = 20)]
    moves: u64,
    /// The seed of the first; each that follows has the next.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Directory for chaos.jsonl, to which lines are appended.
    #[arg(long)]
    results: PathBuf,
}

/// A line of `chaos.jsonl`.
#[derive(Serialize)]
struct Record<'a> {
    seed: u64,
    workload: String,
    mode: &'a str,
    link_mbit: Option<u32>,
    faults: Vec<String>,
    /// Of the faults, those that did not come about.
    missed: u32,
    outcome: &'a str,
    /// The last thing `migrate` said.
    said: &'a str,
    copies: u32,
    lost_with_host: bool,
    right: bool,
    left_over: &'a [String],
    hung: bool,
    next_move: bool,
    /// All of it is as it should be.
    good: bool,
    why: &'a str,
    seconds: f64,
    commit: &'a str,
    kernel: &'a str,
}

/// Makes the moves. Returns whether all of them ended as they should.
pub fn run(options: &Options) -> Result<bool> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("creating {}", options.results.display()))?;
    let path = options.results.join("chaos.jsonl");
    let mut out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let machine = Machine::read()?;
    trial::rehearse().context("this machine cannot stall or restart a test host")?;
    let (mut good, mut bad) = (0, Vec::new());
    for seed in options.seed..options.seed + options.moves {
        let scenario = Scenario::new(seed);
        let began = Instant::now();
        let found = carry_out(&scenario);
        let record = Record {
            seed: scenario.seed,
            workload: scenario.workload.to_string(),
            mode: scenario.mode,
            link_mbit: scenario.link,
            faults: scenario
                .faults
                .iter()
                .map(|(moment, fault)| format!("{fault}, {moment}"))
                .collect(),
            missed: found.missed,
            outcome: &found.outcome,
            said: &found.said,
            copies: found.copies,
            lost_with_host: found.lost_with_host,
            right: found.right,
            left_over: &found.left_over,
            hung: found.hung,
            next_move: found.next_move,
            good: found.is_good(),
            why: &found.why,
            seconds: began.elapsed().as_secs_f64(),
            commit: &machine.commit,
            kernel: &machine.kernel,
        };
        let line = serde_json::to_string(&record)?;
        writeln!(out, "{line}").with_context(|| format!("writing {}", path.display()))?;
        println!("{line}");
        if record.good {
            good += 1;
        } else {
            bad.push(seed);
        }
    }
    println!(
        "chaos: {good} as they should be, {} not: seeds {bad:?}",
        bad.len()
    );
    Ok(bad.is_empty())
}

/// A scenario on a thread of its own: a host that cannot be removed panics, and the other moves go on.
fn carry_out(scenario: &Scenario) -> Found {
    let outcome = std::thread::scope(|scope| scope.spawn(|| trial::run(scenario)).join());
    let outcome = outcome.unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        Err(anyhow!("{}", words.unwrap_or_default()))
    });
    outcome.unwrap_or_else(|why| Found {
        outcome: "not carried out".to_string(),
        why: format!("{why:#}"),
        ..Found::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some of the moves that `scripts/chaos` makes by the thousand: a guard stopped, a runtime killed; the link cut; CRIU killed while
    /// the copy is released.
    const SEEDS: [u64; 3] = [1, 2, 3];

    #[test]
    fn moves_while_things_go_wrong_end_with_one_right_copy() {
        trial::rehearse().expect("this machine can stall and restart a test host");
        for seed in SEEDS {
            let scenario = Scenario::new(seed);
            let found = carry_out(&scenario);
            assert!(found.is_good(), "{scenario:?} {found:?}");
        }
    }
}

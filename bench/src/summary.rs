//! What the raw results say: a table of medians, and the aims held against them.

use std::fmt::Write;

use anyhow::Result;

use crate::measure::System;
use crate::record::{Machine, Record};

/// Writes the summary, as Markdown.
pub fn write(records: &[Record], machine: &Machine) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "# Core benchmark\n")?;
    writeln!(
        text,
        "Command: `scripts/bench {}`  ",
        std::env::args().skip(1).collect::<Vec<_>>().join(" ")
    )?;
    writeln!(
        text,
        "Commit {}, kernel {}, {}, {}.\n",
        machine.commit, machine.kernel, machine.software, machine.hardware
    )?;
    writeln!(
        text,
        "Medians of the runs in `core.jsonl`. The gap is the longest time the container's own clock stood still. Memory and \
         processor time are of everything outside the container at the source / at the target, for runc-checkpoint with the \
         images, which are kept in memory. Bytes are all that both hosts put on the link. The machine's load in the minute before a run was {:.1} in the median; \
         what else it did makes times longer, and {} cores are shared by both hosts and the container.\n",
        median(records.iter().map(|record| record.load_before)).unwrap_or_default(),
        machine.cores,
    )?;
    table(&mut text, records)?;
    parts(&mut text, records)?;
    aims(&mut text, records)?;
    for record in records.iter().filter(|record| !record.verified) {
        let why = record
            .error
            .as_deref()
            .unwrap_or("the workload found its memory wrong");
        let why = why.lines().next().unwrap_or_default();
        let system = name(record.system);
        writeln!(
            text,
            "\nFAILED: {system}, {} MiB, {}, run {}: {why}",
            record.memory_mib, record.case, record.run
        )?;
    }
    Ok(text)
}

fn table(text: &mut String, records: &[Record]) -> Result<()> {
    writeln!(
        text,
        "| memory MiB | case | MTU | system | gap ms | downtime ms | total s | wire MB | CPU s | peak MiB | lost |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|---|---|---|")?;
    let mut seen = Vec::new();
    for first in records {
        let key = (
            first.memory_mib,
            first.case.as_str(),
            first.mtu,
            first.system,
        );
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let group: Vec<_> = records
            .iter()
            .filter(|r| (r.memory_mib, r.case.as_str(), r.mtu, r.system) == key)
            .collect();
        let of = |figure: &dyn Fn(&Record) -> Option<f64>| {
            median(group.iter().filter_map(|record| figure(record)))
        };
        let ends = |source: Option<f64>, target: Option<f64>, digits| {
            format!("{} / {}", show(source, digits), show(target, digits))
        };
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            first.memory_mib,
            first.case,
            first.mtu,
            name(first.system),
            show(of(&|r| r.gap_ms), 0),
            show(of(&|r| r.downtime_ms), 0),
            show(of(&|r| r.total_s), 2),
            show(of(&|r| r.wire_bytes.map(|bytes| bytes as f64 / 1e6)), 0),
            ends(
                of(&|r| r.cpu_s.map(|s| s.source)),
                of(&|r| r.cpu_s.map(|s| s.target)),
                2
            ),
            ends(
                of(&|r| r.peak_rss_mib.map(|m| m.source)),
                of(&|r| r.peak_rss_mib.map(|m| m.target)),
                0
            ),
            of(&|r| r.throughput_loss)
                .map_or("–".to_string(), |loss| format!("{:.1} %", loss * 100.0)),
        )?;
    }
    Ok(())
}

/// Where the downtime goes, by the engine's report.
fn parts(text: &mut String, records: &[Record]) -> Result<()> {
    const PARTS: [&str; 8] = [
        "freeze", "delta", "dump", "images", "restore", "fill", "commit", "resume",
    ];
    let mut groups: Vec<(u32, &str, u32)> = Vec::new();
    for record in records.iter().filter(|record| record.downtime.is_some()) {
        let key = (record.memory_mib, record.case.as_str(), record.mtu);
        if !groups.contains(&key) {
            groups.push(key);
        }
    }
    if groups.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "\nWhere migrate's downtime goes, in ms (medians, each on its own; delta and dump run side by side):\n"
    )?;
    writeln!(text, "| memory MiB | case | MTU | {} |", PARTS.join(" | "))?;
    writeln!(text, "|---|---|---|{}", "---|".repeat(PARTS.len()))?;
    for (memory_mib, case, mtu) in groups {
        write!(text, "| {memory_mib} | {case} | {mtu} |")?;
        for part in PARTS {
            let name = format!("{part}_ms");
            let runs = records
                .iter()
                .filter(|r| (r.memory_mib, r.case.as_str(), r.mtu) == (memory_mib, case, mtu));
            let figures = runs.filter_map(|record| record.downtime.as_ref()?.get(&name).copied());
            write!(text, " {} |", show(median(figures), 1))?;
        }
        writeln!(text)?;
    }
    Ok(())
}

/// The aims, each with what was reached. Nothing is written of an aim whose figures are missing.
fn aims(text: &mut String, records: &[Record]) -> Result<()> {
    let of = |system, memory_mib, case: &str, mtu, figure: &dyn Fn(&Record) -> Option<f64>| {
        let runs = records.iter().filter(|r| {
            r.system == system
                && r.memory_mib == memory_mib
                && r.case == case
                && r.mtu == mtu
                && r.verified
        });
        median(runs.filter_map(figure))
    };
    let gap = |record: &Record| record.gap_ms;
    let total = |record: &Record| record.total_s;
    let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
    let mut rows = Vec::new();
    for case in ["idle", "dirtying"] {
        let large = of(System::Migrate, 2048, case, 1500, &gap);
        let small = of(System::Migrate, 64, case, 1500, &gap);
        let baseline = of(System::RuncCheckpoint, 2048, case, 1500, &gap);
        rows.push((format!("gap at 2 GiB, {case}"), large, 200.0, true, " ms"));
        rows.push((
            format!("gap at 2 GiB over gap at 64 MiB, {case}"),
            ratio(large, small),
            1.3,
            true,
            "",
        ));
        rows.push((
            format!("the baseline's gap over ours at 2 GiB, {case}"),
            ratio(baseline, large),
            8.0,
            false,
            "",
        ));
    }
    for mtu in [1500, 9000] {
        let ours = of(System::Migrate, 2048, "idle", mtu, &total);
        let bare = of(System::TlsCopy, 2048, "idle", mtu, &total);
        rows.push((
            format!("total time over bare TCP and TLS, 2 GiB, MTU {mtu}"),
            ratio(ours, bare),
            1.3,
            true,
            "",
        ));
    }
    let source = of(System::Migrate, 2048, "dirtying", 1500, &|r| {
        r.peak_rss_mib.map(|m| m.source)
    });
    let target = of(System::Migrate, 2048, "dirtying", 1500, &|r| {
        r.peak_rss_mib.map(|m| m.target)
    });
    rows.push((
        "memory at the source, 2 GiB".to_string(),
        source,
        96.0,
        true,
        " MiB",
    ));
    rows.push((
        "memory at the target, 2 GiB".to_string(),
        target,
        2048.0 * 1.15 + 96.0,
        true,
        " MiB",
    ));
    let loss = of(System::Migrate, 2048, "busy", 1500, &|r| {
        r.throughput_loss.map(|loss| loss * 100.0)
    });
    rows.push((
        "throughput lost while rounds run".to_string(),
        loss,
        10.0,
        true,
        " %",
    ));

    rows.retain(|row| row.1.is_some());
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n| aim | bound | measured | |\n|---|---|---|---|")?;
    for (what, reached, limit, at_most, unit) in rows {
        let reached = reached.unwrap_or(f64::NAN);
        let met = if at_most {
            reached <= limit
        } else {
            reached >= limit
        };
        let (bound, met) = (
            if at_most { "at most" } else { "at least" },
            if met { "reached" } else { "MISSED" },
        );
        writeln!(
            text,
            "| {what} | {bound} {limit}{unit} | {reached:.2}{unit} | {met} |"
        )?;
    }
    Ok(())
}

fn name(system: System) -> &'static str {
    match system {
        System::Migrate => "migrate",
        System::RuncCheckpoint => "runc-checkpoint",
        System::TlsCopy => "tls-copy",
    }
}

fn show(figure: Option<f64>, digits: usize) -> String {
    figure.map_or("–".to_string(), |figure| format!("{figure:.digits$}"))
}

fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}

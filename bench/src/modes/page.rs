//! `modes.md`: medians of what was verified as tables, the container's pace as pictures, and the engine's own choice held
//! against the best fixed mode.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;

use super::record::{self, Record};
use super::{Load, System};
use crate::record::Machine;

/// Reads the lines of a results file and writes the page, as Markdown.
pub fn write(lines: &Path, machine: &Machine) -> Result<String> {
    let records = record::read(lines)?;
    let mut page = String::new();
    head(&mut page, machine)?;
    let cells = grouped(&records);
    for cell in &cells {
        table(&mut page, cell)?;
    }
    choice(&mut page, &cells)?;
    failures(&mut page, &records)?;
    Ok(page)
}

fn head(page: &mut String, machine: &Machine) -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    writeln!(
        page,
        "# Modes\n\nCommand: `scripts/bench {}`  ",
        arguments.join(" ")
    )?;
    writeln!(
        page,
        "Commit {}, kernel {}, {}, {}.\n",
        machine.commit, machine.kernel, machine.software, machine.hardware
    )?;
    writeln!(
        page,
        "Both hosts are on this machine, joined by a veth pair that tc-tbf holds to the link's rate both ways (bucket 10 ms of \
         the rate, queue 50 ms), MTU 1500. Memory is incompressible. Downtime is the longest time the container's own clock \
         stood still; *reported* is migrate's, *predicted* what it foretold at the decision to freeze, of the downtime and of \
         the total time. *Way* is what became of the pages then left: sent during the downtime (pre) or owed (post). \
         *Resumed*, *last page* and *total* (all over at the source) are seconds since the order. *Lost* is work the container did not do, in \
         seconds of its pace before, whether it stood still, was slowed or waited for pages; *back* is when it was at nine \
         tenths of that pace again. *Waits* are pages the container itself waited for longer than 30 µs: how many, and the \
         median and 99th percentile of the wait. The picture is its pace, a tenth of a second a column, from half a second \
         before the order (│); full height is the pace before.\n"
    )?;
    Ok(())
}

/// Runs that may be compared: same link, workload and dirty rate.
fn grouped(records: &[Record]) -> Vec<Vec<&Record>> {
    let same = |a: &Record, b: &Record| {
        (a.link, a.workload, a.dirty_times_link) == (b.link, b.workload, b.dirty_times_link)
    };
    let mut cells: Vec<Vec<&Record>> = Vec::new();
    for record in records {
        match cells.iter_mut().find(|cell| same(cell[0], record)) {
            Some(cell) => cell.push(record),
            None => cells.push(vec![record]),
        }
    }
    cells
}

fn table(page: &mut String, cell: &[&Record]) -> Result<()> {
    let first = cell[0];
    write!(page, "## {}, {}", first.link.name(), first.workload.name())?;
    match (first.workload, first.dirty_times_link) {
        (Load::MemoryWriter, Some(times)) => writeln!(
            page,
            ", dirtying {times} × the link's {:.1} MB/s\n\n{} MiB; {} MB/s wanted, {} MB/s reached before the order.\n",
            first.link_mb_s,
            first.memory_mib,
            first.dirty_mb_s.unwrap_or(0),
            show(median(cell, |r| r.dirty_reached_mb_s), 0),
        )?,
        _ => writeln!(page, "\n\nRecords of {} MiB.\n", first.memory_mib / 2)?,
    }
    writeln!(
        page,
        "| system | runs | way | downtime ms | reported | predicted | resumed s | last page s | total s | predicted | wire MB | rounds | waits | p50 / p99 ms | lost s | back s |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    )?;
    for (system, runs) in by_system(cell) {
        let figure =
            |digits, figure: &dyn Fn(&Record) -> Option<f64>| show(median(&runs, figure), digits);
        writeln!(
            page,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} / {} | {} | {} |",
            system.name(),
            runs.iter().filter(|run| run.verified).count(),
            ways(&runs),
            figure(0, &|r| r.downtime_ms),
            figure(0, &|r| r
                .downtime_reported
                .as_ref()?
                .get("total_ms")
                .copied()),
            figure(0, &|r| r.predicted_ms("downtime_ms")),
            figure(2, &|r| r.resumed_s),
            figure(2, &|r| r.last_page_s),
            figure(2, &|r| r.total_s),
            figure(2, &|r| Some(r.predicted_ms("total_ms")? / 1e3)),
            figure(1, &|r| r.wire_bytes.map(|bytes| bytes as f64 / 1e6)),
            figure(0, &|r| r.rounds.map(|rounds| rounds as f64)),
            figure(0, &|r| r.slow.map(|slow| slow.pages as f64)),
            figure(2, &|r| r.slow.map(|slow| slow.p50_us / 1e3)),
            figure(2, &|r| r.slow.map(|slow| slow.p99_us / 1e3)),
            figure(2, &|r| r.lost_s),
            figure(2, &|r| r.recovered_s),
        )?;
    }
    writeln!(page, "\n```text")?;
    for (system, runs) in by_system(cell) {
        if let Some(run) = runs.iter().find(|run| run.verified) {
            writeln!(page, "{:>15} {}", system.name(), picture(run))?;
        }
    }
    writeln!(page, "```\n")?;
    Ok(())
}

fn by_system<'r>(cell: &[&'r Record]) -> Vec<(System, Vec<&'r Record>)> {
    let mut systems: Vec<(System, Vec<&Record>)> = Vec::new();
    for &record in cell {
        match systems
            .iter_mut()
            .find(|(system, _)| *system == record.system)
        {
            Some((_, runs)) => runs.push(record),
            None => systems.push((record.system, vec![record])),
        }
    }
    systems
}

/// What became of the pages left at the freeze, each way once.
fn ways(runs: &[&Record]) -> String {
    let mut ways: Vec<&str> = runs
        .iter()
        .filter_map(|run| run.switch.as_deref()?.strip_suffix("-copy"))
        .collect();
    ways.dedup();
    match ways.is_empty() {
        true => "–".to_string(),
        false => ways.join(", "),
    }
}

/// The pace, a tenth of a second a column; a long move is cut off.
fn picture(run: &Record) -> String {
    const COLUMN: f64 = 0.1;
    const MOST: usize = 140;
    const HEIGHTS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let full = run.pace_before.unwrap_or(1.0);
    let end = run.curve.last().map_or(0.0, |point| point.0);
    let mut picture = String::new();
    let mut column = -0.5;
    let mut drawn = 0;
    while column + COLUMN <= end {
        if drawn == MOST {
            picture.push('…');
            break;
        }
        // Past -0.05 the next column begins at the order.
        if column.abs() < COLUMN / 2.0 {
            picture.push('│');
        }
        let share = work(&run.curve, column, column + COLUMN) / (full * COLUMN);
        let height = (share * 8.0).round().clamp(0.0, 8.0) as usize;
        picture.push(HEIGHTS[height]);
        column += COLUMN;
        drawn += 1;
    }
    picture
}

/// What was done within `from..to`, when each point's pace held since the point before.
fn work(curve: &[(f64, f64)], from: f64, to: f64) -> f64 {
    curve
        .windows(2)
        .map(|pair| {
            let overlap = pair[1].0.min(to) - pair[0].0.max(from);
            overlap.max(0.0) * pair[1].1
        })
        .sum()
}

/// The engine's choice over the best fixed mode of the same cell.
fn choice(page: &mut String, cells: &[Vec<&Record>]) -> Result<()> {
    const FIXED: [System; 3] = [System::PreCopy, System::PostCopy, System::Hybrid];
    let mut rows = String::new();
    for cell in cells {
        let systems = by_system(cell);
        let of = |system: System, figure: fn(&Record) -> Option<f64>| {
            let (_, runs) = systems.iter().find(|(other, _)| *other == system)?;
            median(runs, figure)
        };
        let against = |figure: fn(&Record) -> Option<f64>| {
            let best = FIXED
                .into_iter()
                .filter_map(|fixed| Some((fixed, of(fixed, figure)?)))
                .min_by(|a, b| a.1.total_cmp(&b.1))?;
            let auto = of(System::Auto, figure)?;
            Some(format!(
                "{auto:.2} / {:.2} {} ({:+.0} %)",
                best.1,
                best.0.name(),
                (auto / best.1 - 1.0) * 100.0
            ))
        };
        let Some(lost) = against(|r| r.lost_s) else {
            continue;
        };
        let shown = |text: Option<String>| text.unwrap_or_else(|| "–".to_string());
        writeln!(
            rows,
            "| {} | {} | {} | {lost} | {} | {} |",
            cell[0].link.name(),
            cell[0].workload.name(),
            show(cell[0].dirty_times_link, 2),
            shown(against(|r| r.downtime_ms)),
            shown(against(|r| r.total_s)),
        )?;
    }
    if !rows.is_empty() {
        writeln!(
            page,
            "## auto against the best fixed mode\n\nEach figure by itself: no one mode is best in all three.\n\n\
             | link | workload | dirty × link | lost s | downtime ms | total s |\n|---|---|---|---|---|---|\n{rows}"
        )?;
    }
    Ok(())
}

fn failures(page: &mut String, records: &[Record]) -> Result<()> {
    for record in records.iter().filter(|record| !record.verified) {
        let why = record
            .error
            .as_deref()
            .unwrap_or("the workload found its memory wrong");
        writeln!(
            page,
            "FAILED: {}, {}, {}, × {}, run {}: {}\n",
            record.system.name(),
            record.link.name(),
            record.workload.name(),
            show(record.dirty_times_link, 2),
            record.run,
            why.lines().next().unwrap_or_default()
        )?;
    }
    Ok(())
}

/// Of the runs that were verified.
fn median(runs: &[&Record], figure: impl Fn(&Record) -> Option<f64>) -> Option<f64> {
    let mut figures: Vec<f64> = runs
        .iter()
        .filter(|run| run.verified)
        .filter_map(|run| figure(run))
        .collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}

fn show(figure: Option<f64>, digits: usize) -> String {
    figure.map_or("–".to_string(), |figure| format!("{figure:.digits$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_shared_among_columns_by_time() {
        let curve = [(0.0, 5.0), (0.1, 10.0), (0.3, 2.0)];
        assert!((work(&curve, 0.0, 0.1) - 1.0).abs() < 1e-9);
        assert!((work(&curve, 0.05, 0.15) - 0.6).abs() < 1e-9);
        assert!((work(&curve, 0.2, 0.5) - 0.2).abs() < 1e-9);
    }
}

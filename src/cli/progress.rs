//! What a person sees of a migration: events in, lines out. Nothing is printed here.

use std::time::Duration;

use crate::memory::PAGE_SIZE;
use crate::migration::convergence::FreezeReason;
use crate::migration::event::{Event, Side, TimedEvent, Verdict};
use crate::migration::mode::Switch;
use crate::migration::report::{DumpKind, Prediction, RoundReport, Tracker};

use super::summary::summary;

/// Something to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A line that stays.
    Line(String),
    /// A line that the next one takes the place of. Only for a terminal.
    Passing(String),
}

/// What to show for an event, in order. `width` is that of the terminal in columns; `None` if there is none, and
/// then nothing passing is shown.
pub fn show(event: &TimedEvent, width: Option<usize>) -> Vec<Shown> {
    let line = |text: String| vec![Shown::Line(text)];
    match &event.event {
        Event::Started {
            migration,
            container,
            target,
        } => line(format!(
            "moving {container} to {target} (migration {migration})"
        )),
        Event::Preflight { side, findings } => {
            let side = match side {
                Side::Source => "source",
                Side::Target => "target",
            };
            let mut shown = Vec::new();
            for finding in findings
                .iter()
                .filter(|finding| finding.verdict != Verdict::Ok)
            {
                let verdict = match finding.verdict {
                    Verdict::Refused => "refused",
                    Verdict::Ok | Verdict::Warning => "warning",
                };
                let fix = finding
                    .fix
                    .as_ref()
                    .map_or(String::new(), |fix| format!(" — {fix}"));
                shown.push(Shown::Line(format!(
                    "{side}: {verdict}: {}: {}{fix}",
                    finding.what, finding.detail
                )));
            }
            if shown.is_empty() {
                shown.push(Shown::Line(format!(
                    "{side}: all {} checks passed",
                    findings.len()
                )));
            }
            shown
        }
        Event::Mode { mode, why, .. } => match why {
            Some(why) => line(format!("mode: {mode} only: {why}")),
            None => line(format!("mode: {mode}")),
        },
        Event::Tracking {
            tracker,
            processes,
            pages,
        } => {
            let tracker = match tracker {
                Tracker::SoftDirty => "soft-dirty",
                Tracker::UffdWp => "uffd-wp",
            };
            line(format!(
                "tracking {processes} processes with {} by {tracker}",
                memory(*pages)
            ))
        }
        Event::Rootfs {
            pass,
            frozen,
            entries,
            deleted,
            bytes_wire,
            duration,
        } => {
            let what = if *pass == 1 { "files" } else { "changed files" };
            let when = if *frozen { ", frozen" } else { "" };
            let deleted = if *deleted == 0 {
                String::new()
            } else {
                format!(", {deleted} deleted")
            };
            line(format!(
                "{what}: {entries} entries{deleted}, {} in {}{when}",
                bytes(*bytes_wire),
                time(*duration)
            ))
        }
        Event::RoundStarted { round, pages } => {
            passing(width, 0, format!("round {round}: {}", memory(*pages)))
        }
        Event::RoundProgress {
            round,
            pages,
            pages_sent,
            bytes_wire,
        } => {
            let share = if *pages == 0 {
                100
            } else {
                (pages_sent.min(pages) * 100 / pages) as usize
            };
            let text = format!(
                "round {round}: {share:3}% of {}, {} sent",
                memory(*pages),
                bytes(*bytes_wire)
            );
            passing(width, share, text)
        }
        Event::RoundFinished(round) => line(round_line(round)),
        Event::Slowed { percent } => line(format!(
            "slowed: the container is left {percent}% of its CPU time, for its rounds do not converge"
        )),
        Event::Freezing {
            why,
            switch,
            predicted,
            ..
        } => line(format!(
            "freezing, {}: {}; expected {}",
            switched(*switch),
            reason(*why),
            expected(predicted)
        )),
        Event::Frozen { duration } => {
            passing(width, 0, format!("frozen after {}", time(*duration)))
        }
        Event::Delta(delta) => line(format!(
            "delta: {} pages, {} on the wire in {}",
            delta.sent.pages,
            bytes(delta.sent.bytes_wire),
            time(delta.duration)
        )),
        Event::Hold {
            dump,
            bytes_images,
            duration,
            ..
        } => {
            let dump = match dump {
                DumpKind::Skeleton => "skeleton",
                DumpKind::Full => "full dump",
            };
            line(format!(
                "held: {dump} of {} in {}",
                bytes(*bytes_images),
                time(*duration)
            ))
        }
        Event::Prepared { restore, .. } => {
            line(format!("target: prepared, restored in {}", time(*restore)))
        }
        Event::CommitSent => passing(width, 0, "commit sent".to_owned()),
        Event::Committed { downtime } => {
            line(format!("committed after {} of downtime", time(*downtime)))
        }
        Event::Serving {
            pages_left,
            bytes_wire,
            faults,
        } => passing(
            width,
            0,
            format!(
                "serving: {} left, {} sent, {faults} faults answered",
                memory(*pages_left),
                bytes(*bytes_wire)
            ),
        ),
        Event::LinkLost { reason, patience } => line(format!(
            "link lost, looking for the target for {}: {reason}",
            time(*patience)
        )),
        Event::LinkBack { duration } => line(format!("link back after {}", time(*duration))),
        Event::Whole { duration } => line(format!(
            "target: last page arrived {} after the release",
            time(*duration)
        )),
        Event::Incomplete {
            reason,
            how_to_go_on,
        } => line(format!(
            "incomplete: {reason}; the container is kept frozen here until `{how_to_go_on}`"
        )),
        Event::RolledBack {
            reason, downtime, ..
        } => {
            let stood = downtime.map_or(String::new(), |downtime| {
                format!(" after {} of downtime", time(downtime))
            });
            line(format!("rolled back{stood}: {reason}"))
        }
        Event::Unknown {
            reason,
            how_to_find_out,
        } => line(format!(
            "unknown: {reason}; the container stays frozen here until `{how_to_find_out}` finds out"
        )),
        Event::Filled { duration } => line(format!(
            "target: last page filled {} after the release",
            time(*duration)
        )),
        Event::Done { report } => summary(report).into_iter().map(Shown::Line).collect(),
    }
}

/// A passing line, with a bar if there is room for one.
fn passing(width: Option<usize>, share: usize, text: String) -> Vec<Shown> {
    const BAR: usize = 24;
    let Some(width) = width else {
        return Vec::new();
    };
    let mut line = text;
    if share > 0 && line.chars().count() + BAR + 3 < width {
        let full = BAR * share.min(100) / 100;
        line = format!("{line} [{}{}]", "=".repeat(full), " ".repeat(BAR - full));
    }
    // A line longer than the terminal would wrap, and could not be replaced.
    vec![Shown::Passing(
        line.chars().take(width.saturating_sub(1)).collect(),
    )]
}

fn round_line(round: &RoundReport) -> String {
    let seconds = round.duration.as_secs_f64().max(1e-6);
    let rate = (round.sent.pages as f64 * PAGE_SIZE as f64 / seconds) as u64;
    let dirtied = (round.dirty_rate * PAGE_SIZE as f64) as u64;
    let expected = round.expected_downtime.map_or(String::new(), |downtime| {
        format!(", expected downtime {}", time(downtime))
    });
    format!(
        "round {}: {} in {} ({}/s), {} on the wire; dirtied {}/s, {} left{expected}",
        round.round,
        memory(round.sent.pages),
        time(round.duration),
        bytes(rate),
        bytes(round.sent.bytes_wire),
        bytes(dirtied),
        memory(round.pages_left),
    )
}

/// What becomes of the pages that are left, in words.
pub(super) fn switched(switch: Switch) -> &'static str {
    match switch {
        Switch::PreCopy => "pre-copy",
        Switch::PostCopy => "post-copy",
    }
}

/// A prediction in words, beside which the truth can stand.
pub(super) fn expected(predicted: &Prediction) -> String {
    let Prediction {
        downtime,
        total,
        last_page,
    } = *predicted;
    let last_page = last_page.map_or(String::new(), |after| {
        format!(", last page {} after the release", time(after))
    });
    let total = total.map_or(String::new(), |total| format!(", total {}", time(total)));
    format!("downtime {}{last_page}{total}", time(downtime))
}

/// Why the rounds ended, in words.
pub(super) fn reason(why: FreezeReason) -> &'static str {
    match why {
        FreezeReason::Converged => "little is left",
        FreezeReason::NoProgress => "the container writes as fast as pages can be sent",
        FreezeReason::MaxRounds => "the allowed rounds are used up",
        FreezeReason::Timeout => "the time is up",
        FreezeReason::Idle => "next to nothing is left",
        FreezeReason::Outrun => "more rounds would not bring the downtime within the limit",
        FreezeReason::NoRounds => "without rounds",
    }
}

fn memory(pages: u64) -> String {
    bytes(pages.saturating_mul(PAGE_SIZE))
}

/// Bytes with a binary prefix and three digits or so.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A time in the unit it is easiest read in.
pub(super) fn time(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    if ms < 9.95 {
        format!("{ms:.1} ms")
    } else if ms < 999.5 {
        format!("{ms:.0} ms")
    } else if ms < 119_950.0 {
        format!("{:.1} s", ms / 1000.0)
    } else {
        let seconds = (ms / 1000.0).round() as u64;
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::event::examples::examples;

    /// Everything the documented examples show, without the summary that follows `done`.
    fn shown(width: Option<usize>) -> Vec<Shown> {
        examples()
            .iter()
            .filter(|example| !matches!(example.event, Event::Done { .. }))
            .flat_map(|example| show(example, width))
            .collect()
    }

    #[test]
    fn without_a_terminal_a_migration_is_a_list_of_lines() {
        let lines: Vec<String> = shown(None)
            .into_iter()
            .map(|shown| match shown {
                Shown::Line(line) => line,
                Shown::Passing(line) => panic!("{line} passes, and there is no terminal"),
            })
            .collect();
        let expected = [
            "moving web to 10.0.0.2:7070 (migration 6f1c8802b34d4e9aa107553ed2904bc8)",
            "source: refused: network: the container's network has eth0: only loopback can move yet",
            "mode: auto",
            "tracking 3 processes with 2.0 GiB by uffd-wp",
            "files: 812 entries, 32.0 MiB in 135 ms",
            "round 1: 2.0 GiB in 2.6 s (781.2 MiB/s), 448.0 MiB on the wire; dirtied 50.0 MiB/s, 50.0 MiB left, expected downtime 184 ms",
            "slowed: the container is left 50% of its CPU time, for its rounds do not converge",
            "freezing, pre-copy: little is left; expected downtime 184 ms, total 3.0 s",
            "delta: 2400 pages, 2.1 MiB on the wire in 19 ms",
            "held: skeleton of 130.0 KiB in 37 ms",
            "target: prepared, restored in 41 ms",
            "committed after 118 ms of downtime",
            "link lost, looking for the target for 5 min 00 s: the connection timed out",
            "link back after 5.0 s",
            "target: last page arrived 6.0 s after the release",
            "incomplete: the connection timed out; the container is kept frozen here until `migrate resume --state-dir /var/lib/migrate`",
            "rolled back after 103 ms of downtime: the connection to the target broke",
            "unknown: no answer to commit within 5 s; the container stays frozen here until `migrate recover --state-dir /var/lib/migrate` finds out",
            "target: last page filled 240 ms after the release",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn on_a_terminal_a_round_shows_a_bar_that_fits() {
        let progress = |width| {
            let event = examples()
                .into_iter()
                .find(|example| matches!(example.event, Event::RoundProgress { .. }));
            show(&event.expect("an example of progress"), Some(width))
        };
        let expected = "round 1:  19% of 2.0 GiB, 85.4 MiB sent [====                    ]";
        assert_eq!(progress(80), [Shown::Passing(expected.to_owned())]);
        assert_eq!(
            progress(50),
            [Shown::Passing(
                "round 1:  19% of 2.0 GiB, 85.4 MiB sent".to_owned()
            )]
        );
        assert_eq!(progress(10), [Shown::Passing("round 1: ".to_owned())]);
        assert_eq!(progress(0), [Shown::Passing(String::new())]);
    }

    #[test]
    fn sizes_and_times_are_in_the_unit_they_are_easiest_read_in() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (micros, text) in [
            (0, "0.0 ms"),
            (5_460, "5.5 ms"),
            (118_400, "118 ms"),
            (999_600, "1.0 s"),
            (90_000_000, "90.0 s"),
            (3_601_000_000, "60 min 01 s"),
        ] {
            assert_eq!(time(Duration::from_micros(micros)), text);
        }
    }
}

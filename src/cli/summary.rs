//! The last words on a migration: its report as a few lines.

use super::progress::{bytes, expected, reason, switched, time};
use crate::migration::phase::Downtime;
use crate::migration::report::{DumpKind, Outcome, Report};

/// The report for a person.
pub fn summary(report: &Report) -> Vec<String> {
    let mut lines = vec![outcome(report)];
    if matches!(report.outcome, Outcome::Refused { .. } | Outcome::WouldMove) {
        return lines;
    }
    let ended = report
        .rounds_ended
        .map_or(String::new(), |why| format!(": {}", reason(why)));
    let mode = match report.switch {
        Some(switch) if switched(switch) != report.mode.as_str() => {
            format!("{}: {} in the end", report.mode, switched(switch))
        }
        _ => report.mode.to_string(),
    };
    lines.push(format!("  mode      {mode}"));
    let plural = if report.rounds.len() == 1 { "" } else { "s" };
    lines.push(format!(
        "  total     {} with {} round{plural}{ended}",
        time(report.total),
        report.rounds.len()
    ));

    let sent = report.sent;
    let ratio = sent
        .compression_ratio()
        .map_or(String::new(), |ratio| format!(" ({ratio:.1} : 1)"));
    lines.push(format!(
        "  memory    {} in the container",
        bytes(report.memory_bytes)
    ));
    lines.push(format!(
        "  sent      {} on the wire for {} of content{ratio}; {} zero pages, {} the target had",
        bytes(sent.bytes_wire),
        bytes(sent.bytes_raw),
        sent.zero_pages,
        sent.same_pages
    ));
    if let Some(downtime) = &report.downtime {
        lines.push(format!(
            "  downtime  {}: {}",
            time(downtime.total),
            parts(downtime)
        ));
    }
    if let Some(predicted) = &report.predicted {
        lines.push(format!("  expected  {}", expected(predicted)));
    }
    if let Some(percent) = report.slowed_percent {
        lines.push(format!(
            "  slowed    to {percent}% of its CPU time during the rounds"
        ));
    }
    if report.dump == Some(DumpKind::Full) {
        lines.push("            CRIU dumped every page: the skeleton dump does not work on this host (migrate check)".to_owned());
    }
    if let Some(post_copy) = &report.post_copy {
        let last = post_copy
            .last_page
            .map_or("the last has not arrived".to_owned(), |last| {
                format!("the last arrived {} after the release", time(last))
            });
        lines.push(format!(
            "  owed      {} pages followed, {} faults; {last}",
            post_copy.owed_pages, post_copy.faults
        ));
    }
    if let Some(fill) = report.fill_after_release {
        lines.push(format!("  filled    {} after the release", time(fill)));
    }
    lines
}

fn outcome(report: &Report) -> String {
    let Report {
        container, target, ..
    } = report;
    match &report.outcome {
        Outcome::Moved => format!("{container} runs at {target}"),
        Outcome::WouldMove => format!("{container} could move to {target}; nothing was touched"),
        Outcome::Refused { reasons } => {
            let plural = if reasons.len() == 1 { "" } else { "s" };
            format!(
                "{container} cannot move to {target} for {} reason{plural}; nothing was touched",
                reasons.len()
            )
        }
        Outcome::RolledBack {
            during,
            reason,
            stays,
        } => format!("{container} {stays}: {reason} (while {during})"),
        Outcome::Unknown { reason } => {
            format!(
                "it is not known whether {container} runs at {target}: {reason}. It is frozen here; run: migrate recover"
            )
        }
        Outcome::Incomplete { reason } => {
            format!(
                "{container} runs at {target}, and what it may need is kept here: {reason}. When the link is back, run: migrate resume"
            )
        }
        Outcome::Stranded { reason } => {
            format!(
                "{container} was lost at {target} and is frozen here: {reason}. Both used the same files: say what becomes of it"
            )
        }
    }
}

/// Delta and dump run side by side, which the `|` says.
fn parts(downtime: &Downtime) -> String {
    let Downtime {
        total: _,
        freeze,
        delta,
        dump,
        images,
        restore,
        fill,
        commit,
        resume,
    } = *downtime;
    format!(
        "freeze {}, delta {} | dump {}, images {}, restore {}, fill {}, commit {}, resume {}",
        time(freeze),
        time(delta),
        time(dump),
        time(images),
        time(restore),
        time(fill),
        time(commit),
        time(resume)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::event::{Event, examples::examples};
    use crate::migration::handoff::SourceState;
    use crate::migration::report::StaysAs;

    fn report() -> Report {
        let done = examples()
            .into_iter()
            .find_map(|example| match example.event {
                Event::Done { report } => Some(*report),
                _ => None,
            });
        done.expect("an example of a report")
    }

    #[test]
    fn a_move_is_summed_up_with_its_downtime_by_parts() {
        let expected = [
            "web runs at 10.0.0.2:7070",
            "  mode      auto: pre-copy in the end",
            "  total     3.0 s with 1 round: little is left",
            "  memory    2.0 GiB in the container",
            "  sent      450.1 MiB on the wire for 1.8 GiB of content (4.0 : 1); 65836 zero pages, 0 the target had",
            "  downtime  118 ms: freeze 2.9 ms, delta 19 ms | dump 37 ms, images 4.1 ms, restore 41 ms, fill 0.0 ms, commit 6.2 ms, resume 5.5 ms",
            "  expected  downtime 184 ms, total 3.0 s",
            "  filled    240 ms after the release",
        ];
        assert_eq!(summary(&report()), expected);
    }

    #[test]
    fn every_other_outcome_says_where_the_container_is() {
        let of = |outcome| {
            summary(&Report {
                outcome,
                ..report()
            })[0]
                .clone()
        };
        assert_eq!(
            of(Outcome::WouldMove),
            "web could move to 10.0.0.2:7070; nothing was touched"
        );
        let refused = of(Outcome::Refused {
            reasons: vec!["no memory".into()],
        });
        assert!(refused.contains("nothing was touched"), "{refused}");
        let rolled_back = of(Outcome::RolledBack {
            during: SourceState::Holding,
            reason: "the link broke".into(),
            stays: StaysAs::Running,
        });
        assert_eq!(
            rolled_back,
            "web goes on here: the link broke (while holding)"
        );
        let unknown = of(Outcome::Unknown {
            reason: "no answer".into(),
        });
        assert!(
            unknown.contains("frozen here") && unknown.contains("migrate recover"),
            "{unknown}"
        );
    }
}

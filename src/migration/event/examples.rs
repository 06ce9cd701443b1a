//! One example of each event, compared with the lines in `docs/events.md`.

use super::*;
use crate::migration::phase::Downtime;
use crate::migration::report::{Outcome, Sent};

const DOCUMENT: &str = include_str!("../../../docs/events.md");

#[test]
fn the_document_shows_every_event_as_it_is_written() {
    let documented: Vec<&str> = DOCUMENT
        .lines()
        .filter(|line| line.starts_with("{\"at_ms\""))
        .collect();
    let written: Vec<String> = examples()
        .iter()
        .map(|event| serde_json::to_string(event).expect("an event is serializable"))
        .collect();
    for (written, documented) in written.iter().zip(&documented) {
        assert_eq!(
            written, documented,
            "docs/events.md differs from what is written"
        );
    }
    assert_eq!(
        documented.len(),
        written.len(),
        "docs/events.md has too many or too few events"
    );
}

#[test]
fn every_event_is_read_as_it_was_written() {
    for event in examples() {
        let line = serde_json::to_string(&event).expect("an event is serializable");
        assert!(!line.contains('\n'), "{line}");
        assert_eq!(
            serde_json::from_str::<TimedEvent>(&line).expect(&line),
            event
        );
    }
}

#[test]
fn the_examples_leave_no_event_out() {
    let kinds: std::collections::HashSet<_> = examples()
        .iter()
        .map(|example| std::mem::discriminant(&example.event))
        .collect();
    // A new variant makes this match incomplete: give it an example and count it.
    let count = match Event::CommitSent {
        Event::Started { .. }
        | Event::Mode { .. }
        | Event::Preflight { .. }
        | Event::Tracking { .. }
        | Event::Rootfs { .. }
        | Event::RoundStarted { .. }
        | Event::RoundProgress { .. }
        | Event::RoundFinished(_)
        | Event::Slowed { .. }
        | Event::Freezing { .. }
        | Event::Frozen { .. }
        | Event::Delta(_)
        | Event::Hold { .. }
        | Event::Prepared { .. }
        | Event::CommitSent
        | Event::Committed { .. }
        | Event::Serving { .. }
        | Event::LinkLost { .. }
        | Event::LinkBack { .. }
        | Event::Whole { .. }
        | Event::Incomplete { .. }
        | Event::RolledBack { .. }
        | Event::Unknown { .. }
        | Event::Filled { .. }
        | Event::Done { .. } => 25,
    };
    assert_eq!(kinds.len(), count);
}

fn ms(ms: f64) -> Duration {
    Duration::from_micros((ms * 1000.0) as u64)
}

fn migration() -> MigrationId {
    MigrationId::from_bytes([
        0x6f, 0x1c, 0x88, 0x02, 0xb3, 0x4d, 0x4e, 0x9a, 0xa1, 0x07, 0x55, 0x3e, 0xd2, 0x90, 0x4b,
        0xc8,
    ])
}

fn round(number: u32, pages: u64, duration: Duration, pages_dirty: u64) -> RoundReport {
    RoundReport {
        round: number,
        sent: Sent {
            pages,
            data_pages: pages - pages / 8,
            zero_pages: pages / 8,
            same_pages: 0,
            bytes_raw: (pages - pages / 8) * 4096,
            bytes_wire: (pages - pages / 8) * 1024,
        },
        duration,
        pages_dirty,
        pages_left: pages_dirty,
        pages_held: 0,
        dirty_rate: 12800.0,
        throughput: Some(200000.0),
        expected_downtime: Some(ms(184.5)),
    }
}

fn delta() -> RoundReport {
    RoundReport {
        dirty_rate: 0.0,
        throughput: None,
        expected_downtime: None,
        ..round(2, 2400, ms(19.25), 0)
    }
}

pub(crate) fn examples() -> Vec<TimedEvent> {
    let first = round(1, 524288, ms(2621.44), 12800);
    let downtime = Downtime {
        total: ms(118.4),
        freeze: ms(2.9),
        delta: ms(19.25),
        dump: ms(37.0),
        images: ms(4.1),
        restore: ms(41.0),
        fill: ms(0.0),
        commit: ms(6.2),
        resume: ms(5.5),
    };
    let predicted = Prediction {
        downtime: ms(184.5),
        total: Some(ms(2996.6)),
        last_page: None,
    };
    let report = Report {
        migration: migration(),
        container: "web".parse().expect("a container id"),
        target: "10.0.0.2:7070".into(),
        outcome: Outcome::Moved,
        tracker: Some(Tracker::UffdWp),
        mode: Mode::Auto,
        total: ms(2960.0),
        rounds: vec![first.clone()],
        rounds_ended: Some(FreezeReason::Converged),
        switch: Some(Switch::PreCopy),
        predicted: Some(predicted),
        slowed_percent: None,
        delta: Some(delta()),
        sent: first.sent.plus(delta().sent),
        memory_bytes: 2147483648,
        downtime: Some(downtime),
        fill_after_release: Some(ms(240.0)),
        post_copy: None,
        dump: Some(DumpKind::Skeleton),
    };
    let events = vec![
        (
            0.0,
            Event::Started {
                migration: migration(),
                container: "web".parse().expect("a container id"),
                target: "10.0.0.2:7070".into(),
            },
        ),
        (
            41.2,
            Event::Preflight {
                side: Side::Source,
                findings: vec![
                    Finding {
                        what: "status".into(),
                        verdict: Verdict::Ok,
                        detail: "running".into(),
                        fix: None,
                    },
                    Finding {
                        what: "network".into(),
                        verdict: Verdict::Refused,
                        detail: "the container's network has eth0: only loopback can move yet"
                            .into(),
                        fix: None,
                    },
                ],
            },
        ),
        (
            41.3,
            Event::Mode {
                asked: Mode::Auto,
                mode: Mode::Auto,
                why: None,
            },
        ),
        (
            55.0,
            Event::Tracking {
                tracker: Tracker::UffdWp,
                processes: 3,
                pages: 524288,
            },
        ),
        (
            190.7,
            Event::Rootfs {
                pass: 1,
                frozen: false,
                entries: 812,
                deleted: 0,
                bytes_wire: 33554432,
                duration: ms(135.0),
            },
        ),
        (
            191.0,
            Event::RoundStarted {
                round: 1,
                pages: 524288,
            },
        ),
        (
            691.0,
            Event::RoundProgress {
                round: 1,
                pages: 524288,
                pages_sent: 100000,
                bytes_wire: 89600000,
            },
        ),
        (2812.0, Event::RoundFinished(first)),
        (2812.0, Event::Slowed { percent: 50 }),
        (
            2812.1,
            Event::Freezing {
                why: FreezeReason::Converged,
                expected_downtime: ms(184.5),
                switch: Switch::PreCopy,
                predicted,
            },
        ),
        (2815.0, Event::Frozen { duration: ms(2.9) }),
        (2834.3, Event::Delta(delta())),
        (
            2852.0,
            Event::Hold {
                dump: DumpKind::Skeleton,
                bytes_images: 133120,
                pages_dumped: 3,
                duration: ms(37.0),
            },
        ),
        (
            2915.0,
            Event::Prepared {
                restore: ms(41.0),
                fill: ms(0.0),
            },
        ),
        (2918.8, Event::CommitSent),
        (
            2930.5,
            Event::Committed {
                downtime: ms(118.4),
            },
        ),
        (
            3130.5,
            Event::Serving {
                pages_left: 12800,
                bytes_wire: 9437184,
                faults: 211,
            },
        ),
        (
            3400.0,
            Event::LinkLost {
                reason: "the connection timed out".into(),
                patience: ms(300000.0),
            },
        ),
        (
            8420.0,
            Event::LinkBack {
                duration: ms(5020.0),
            },
        ),
        (
            8950.0,
            Event::Whole {
                duration: ms(6019.5),
            },
        ),
        (
            308420.0,
            Event::Incomplete {
                reason: "the connection timed out".into(),
                how_to_go_on: "migrate resume --state-dir /var/lib/migrate".into(),
            },
        ),
        (
            2915.0,
            Event::RolledBack {
                during: SourceState::Holding,
                reason: "the connection to the target broke".into(),
                downtime: Some(ms(103.0)),
            },
        ),
        (
            7930.5,
            Event::Unknown {
                reason: "no answer to commit within 5 s".into(),
                how_to_find_out: "migrate recover --state-dir /var/lib/migrate".into(),
            },
        ),
        (
            3170.5,
            Event::Filled {
                duration: ms(240.0),
            },
        ),
        (
            3171.0,
            Event::Done {
                report: Box::new(report),
            },
        ),
    ];
    events
        .into_iter()
        .map(|(at, event)| TimedEvent { at: ms(at), event })
        .collect()
}

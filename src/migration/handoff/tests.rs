//! The tables as a whole: every pair of state and event has exactly one row.

use std::fmt::Debug;

use super::source::SOURCE_TABLE;
use super::target::TARGET_TABLE;
use super::{Row, SourceEvent, SourceState, TargetEvent, TargetState};

#[test]
fn every_state_and_event_of_the_source_has_exactly_one_row() {
    each_pair_has_one_row(SourceState::ALL, SourceEvent::ALL, SOURCE_TABLE);
}

#[test]
fn every_state_and_event_of_the_target_has_exactly_one_row() {
    each_pair_has_one_row(TargetState::ALL, TargetEvent::ALL, TARGET_TABLE);
}

fn each_pair_has_one_row<S: PartialEq + Debug, E: PartialEq + Debug, A>(
    states: &[S],
    events: &[E],
    table: &[Row<S, E, A>],
) {
    let mut wrong = Vec::new();
    for state in states {
        for event in events {
            let rows = table
                .iter()
                .filter(|row| row.from.contains(state) && row.on.contains(event))
                .count();
            if rows != 1 {
                wrong.push(format!("({state:?}, {event:?}) has {rows} rows"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

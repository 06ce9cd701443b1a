//! Both tables together, walked through every interleaving: a source, a target, a network that loses, repeats and
//! reorders, disks that fail half-way, hooks and CRIU that die, and a crash of either end after every action.
//!
//! The world is small enough to visit all of it. In every state: never two copies running, never a copy that
//! runs on old memory, never a source that destroyed what it had before the copy was complete, never a source that goes on
//! with a container whose copy may run. And from every state, once nothing fails any more, both ends can settle with
//! exactly one copy running, or with a person asked where both used the same files. The last tests break one rule each
//! and see the walk notice.

use std::collections::{HashMap, VecDeque};

use world::{Here, There, World};

mod world;

#[test]
fn no_interleaving_of_losses_and_crashes_breaks_the_handover() {
    let walk = Walk::through_everything(Flaw::None).expect("no state breaks a rule");
    walk.every_state_can_settle()
        .expect("from every state both ends can settle");

    let ends: Vec<&World> = walk
        .worlds
        .iter()
        .filter(|world| world.is_settled())
        .collect();
    assert!(
        ends.iter().any(|world| world.there == There::Running),
        "no interleaving ever moves the container"
    );
    assert!(
        ends.iter().any(|world| world.here == Here::Running),
        "no interleaving ever rolls back"
    );
    assert!(
        ends.iter()
            .any(|world| world.here == Here::Running && world.has_run()),
        "no interleaving ever takes back a container whose copy was lost"
    );
    assert!(
        ends.iter().any(|world| world.here == Here::Frozen),
        "no interleaving ever asks a person"
    );
    assert!(
        walk.worlds.len() > 10_000,
        "only {} states: the model has lost its faults",
        walk.worlds.len()
    );
}

#[test]
fn the_walk_notices_a_hook_that_lets_go_without_a_record() {
    broken_by(Flaw::HookLetsGoWithoutRecord, "the copy runs on old memory");
}

#[test]
fn the_walk_notices_a_commit_sent_before_the_record_is_durable() {
    broken_by(Flaw::DecidingIsNotDurable, "two copies run");
}

#[test]
fn the_walk_notices_a_source_that_takes_silence_for_a_no() {
    broken_by(Flaw::SilenceMeansNo, "two copies run");
}

#[test]
fn the_walk_notices_a_target_that_answers_before_its_copy_runs() {
    broken_by(
        Flaw::CompleteSaidBeforeRelease,
        "the source destroyed what the copy may still need",
    );
}

#[test]
fn the_walk_notices_a_target_that_says_complete_when_its_copy_runs() {
    broken_by(
        Flaw::CompleteSaidAtRelease,
        "the source destroyed what the copy may still need",
    );
}

#[test]
fn the_walk_notices_a_target_that_says_complete_while_pages_are_missing() {
    broken_by(
        Flaw::CompleteSaidBeforeItIs,
        "the source destroyed what the copy may still need",
    );
}

#[test]
fn the_walk_notices_a_target_that_says_complete_before_its_files_are_on_disk() {
    broken_by(
        Flaw::FilesNotSynced,
        "the source destroyed what the copy may still need",
    );
}

#[test]
fn the_walk_notices_a_copy_said_to_be_lost_while_it_runs() {
    broken_by(
        Flaw::LostSaidBeforeKill,
        "a copy that was said to be lost may run",
    );
}

#[test]
fn the_walk_notices_a_rollback_said_before_the_copy_is_gone() {
    broken_by(Flaw::RolledBackSaidBeforeDiscard, "two copies run");
}

#[test]
fn the_walk_notices_a_hold_that_nobody_looked_at_again() {
    broken_by(Flaw::HoldNotConfirmed, "the copy runs on old memory");
}

#[test]
fn the_walk_notices_a_source_that_never_asks_again() {
    let walk = Walk::through_everything(Flaw::NeverAsks).expect("waiting for ever is safe");
    assert!(
        walk.every_state_can_settle().is_err(),
        "a source that never asks was seen to settle"
    );
}

fn broken_by(flaw: Flaw, rule: &str) {
    match Walk::through_everything(flaw) {
        Ok(walk) => panic!("{flaw:?} went unnoticed in {} states", walk.worlds.len()),
        Err(found) => assert!(
            found.starts_with(rule),
            "{flaw:?} was noticed by another rule: {found}"
        ),
    }
}

/// A rule broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    HookLetsGoWithoutRecord,
    DecidingIsNotDurable,
    SilenceMeansNo,
    CompleteSaidBeforeRelease,
    CompleteSaidAtRelease,
    CompleteSaidBeforeItIs,
    FilesNotSynced,
    LostSaidBeforeKill,
    RolledBackSaidBeforeDiscard,
    HoldNotConfirmed,
    NeverAsks,
}

/// Whether a step is the world going on or something failing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Works,
    Fails,
}

type Steps = Vec<(Kind, World)>;

struct Walk {
    worlds: Vec<World>,
    /// For every world, the worlds that reach it in one step without a failure.
    before: Vec<Vec<usize>>,
}

impl Walk {
    fn through_everything(flaw: Flaw) -> Result<Walk, String> {
        // A move whose memory is at the target when its copy runs, and one whose copy is owed pages; that also with files that
        // both ends use.
        let first = [(false, false), (true, false), (true, true)]
            .map(|(owed, sharing)| World::first(owed, sharing));
        let mut walk = Walk {
            worlds: first.to_vec(),
            before: vec![Vec::new(); first.len()],
        };
        let mut known: HashMap<World, usize> = first.into_iter().zip(0..).collect();
        let mut queue: VecDeque<usize> = (0..walk.worlds.len()).collect();
        while let Some(index) = queue.pop_front() {
            let world = walk.worlds[index].clone();
            for (kind, next) in world.steps(flaw)? {
                next.check()
                    .map_err(|broken| format!("{broken}\nin  {next:?}\nafter {world:?}"))?;
                let next_index = *known.entry(next).or_insert_with_key(|next| {
                    walk.worlds.push(next.clone());
                    walk.before.push(Vec::new());
                    queue.push_back(walk.worlds.len() - 1);
                    walk.worlds.len() - 1
                });
                if kind == Kind::Works {
                    walk.before[next_index].push(index);
                }
            }
        }
        Ok(walk)
    }

    fn every_state_can_settle(&self) -> Result<(), String> {
        let mut can = vec![false; self.worlds.len()];
        let mut queue: Vec<usize> = (0..self.worlds.len())
            .filter(|i| self.worlds[*i].is_settled())
            .collect();
        for index in &queue {
            can[*index] = true;
        }
        while let Some(index) = queue.pop() {
            for earlier in &self.before[index] {
                if !std::mem::replace(&mut can[*earlier], true) {
                    queue.push(*earlier);
                }
            }
        }
        match can.iter().position(|can| !can) {
            Some(index) => Err(format!("no way to settle from {:?}", self.worlds[index])),
            None => Ok(()),
        }
    }
}

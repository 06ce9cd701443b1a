//! The handover with its three outcomes, as two tables held as data: [`source`] and [`target`].
//!
//! ```text
//!  source                                   target
//!  Copying ── pages ───────────────────────▶ Receiving
//!  Freezing, Frozen ── delta, images ──────▶ Restoring
//!  Holding                                   Held ── every page there? ── Preparing: journal `prepared`
//!  Prepared ◀───────────────── prepared ───  Prepared
//!  Deciding: journal `deciding`
//!  CommitSent ── commit ───────────────────▶ Committing: journal `committed`
//!                                            Releasing: the hook lets go, the copy runs
//!  Serving ◀────────────────── committed ──  Released: the pager brings pages to their places
//!  (keeps its frozen copy;
//!   in post-copy: owed pages) ─────────────▶  Completing: the files go to the disk
//!                                            RecordingComplete: journal `complete`
//!  Committed ◀───────────────── complete ──  Complete
//!  (kills its frozen copy)
//! ```
//!
//! A copy that is lost before it is complete goes back:
//!
//! ```text
//!                                            Released: its pager died ── Losing: what runs is killed
//!                                                    or its host was restarted
//!                                            RecordingLost: journal `lost`
//!  RolledBack ◀──────────────────── lost ──  Lost
//!  (its container goes on as it was at the switch; Stranded, and a person decides, where both used the same files)
//! ```
//!
//! The rules the tables hold, and the tests prove by walking every interleaving with lost messages and a crash
//! after every single action:
//!
//! 1. **Before `deciding` is on disk every failure rolls back.** No `commit` was sent, so the target cannot run.
//! 2. **The source writes `deciding` durably before it sends `commit`.** From then on it is frozen until the
//!    target's word is known; a lost answer is *unknown*, never guessed.
//! 3. **The target writes `prepared` before it answers prepared, `committed` before it lets the copy run, and
//!    answers committed only when the copy runs.** So a release that fails can still be taken back: the source is
//!    frozen and whole until it hears *complete*.
//! 4. **The target says *rolled back* only when its copy is gone and `aborted` is on disk.** Later commits are
//!    refused from that record. A question (`query`) to a target that has not committed makes it abort: the asker
//!    is frozen, and its container goes on soonest where it is.
//! 5. **A target that lost its source while prepared waits a while and aborts by itself.** Sound because a late
//!    commit or query is answered from the record.
//! 6. **"Never heard of it" means rolled back only from the same journal.** `prepared` was written before the
//!    source could decide, so a journal without the migration never prepared it. A target whose journal was lost
//!    answers under another [`JournalId`](super::JournalId), and then its word proves nothing: unknown.
//! 7. **If the target's agent dies, the hook that holds the copy reads the journal itself**: `committed` means let
//!    go, anything else means fail the restore. So the record decides, not who is alive to read it. Hook and
//!    recovery agree on what happened by a mark the hook leaves before the first task can run
//!    ([`TargetEvent::FoundNeverRan`]).
//!
//! 8. **What is frozen at the source dies only when the target said *complete*: every page in its place, out of the reach of
//!    any process that may die, every file on disk, and that on record.** While it serves, no failure here rolls anything
//!    back: the copy at the target has run.
//! 9. **The target says *lost* only of a copy that can never run again, with `lost` on record**: its host was restarted, or
//!    its pager died with pages missing and what was left of it was killed. A container that ended by itself, or was stopped
//!    where it lives now, is not lost: its pager sees that and is done, the copy is complete, and the source never runs it.
//!
//! What is not covered: a disk that loses what `fdatasync` and `syncfs` promised.

use std::collections::VecDeque;
use std::fmt;

pub mod source;
pub mod target;

#[cfg(test)]
mod graph;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use source::{SourceAction, SourceEvent, SourceState};
pub use target::{TargetAction, TargetEvent, TargetState};

/// One end of a handover on its way: the state, and the actions still to take.
///
/// It holds the rules by which actions are taken, so that both the engine and the tests keep them:
///
/// - Actions are taken one after the other, in order. An action that has an answer is over when its answer was
///   given to [`Course::on`]; the next is taken only then. So an answer never meets a state that waits for another.
/// - Events from outside may come between any two actions. If one changes the state, what was still to do in the
///   old state is dropped; if the state stays, its actions join the end, each at most once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Course<S: Party> {
    state: S,
    pending: VecDeque<S::Action>,
}

/// The two ends: [`SourceState`] and [`TargetState`].
pub trait Party: Copy + PartialEq + fmt::Debug + Sized + 'static {
    /// What can happen to it.
    type Event: Copy + PartialEq + fmt::Debug + 'static;
    /// What it has to do.
    type Action: Copy + PartialEq + fmt::Debug + std::hash::Hash + Eq + 'static;
    /// What its journal says.
    type Record: Copy + fmt::Debug + 'static;

    /// Its first state.
    const FIRST: Self;

    /// Its table.
    fn table() -> &'static [Row<Self, Self::Event, Self::Action>];

    /// Where it goes on after a crash.
    fn after_crash(record: Self::Record) -> Step<Self, Self::Action>;
}

impl<S: Party> Course<S> {
    /// A new migration.
    pub fn start() -> Course<S> {
        Course {
            state: S::FIRST,
            pending: VecDeque::new(),
        }
    }

    /// A migration found in the journal.
    pub fn recover(record: S::Record) -> Course<S> {
        let step = S::after_crash(record);
        Course {
            state: step.state,
            pending: step.actions.iter().copied().collect(),
        }
    }

    /// The state now.
    pub fn state(&self) -> S {
        self.state
    }

    /// Something happened. Says why if it changes nothing.
    ///
    /// # Errors
    /// If the table says it cannot happen; nothing changes.
    pub fn on(
        &mut self,
        event: S::Event,
    ) -> Result<Option<&'static str>, ImpossibleEvent<S, S::Event>> {
        let step = step(S::table(), self.state, event)?;
        if step.state != self.state {
            self.state = step.state;
            self.pending.clear();
        }
        for action in step.actions {
            if !self.pending.contains(action) {
                self.pending.push_back(*action);
            }
        }
        Ok(step.ignored)
    }

    /// The next action, taken off the list.
    pub fn next_action(&mut self) -> Option<S::Action> {
        self.pending.pop_front()
    }

    /// Whether there is nothing to do until something happens.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }
}

/// One row of a table: what happens on any of these events in any of these states.
#[derive(Debug)]
pub struct Row<S: 'static, E: 'static, A: 'static> {
    /// The states the row is for.
    pub from: &'static [S],
    /// The events the row is for.
    pub on: &'static [E],
    /// What happens.
    pub then: Then<S, A>,
}

/// What an event does.
#[derive(Debug)]
pub enum Then<S: 'static, A: 'static> {
    /// Go to (or stay in) a state and take these actions, in order.
    Go(S, &'static [A]),
    /// Nothing, for this reason.
    Ignore(&'static str),
    /// It cannot happen, for this reason; if it does the engine has a bug.
    Impossible(&'static str),
}

/// The outcome of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<S, A: 'static> {
    /// The state now.
    pub state: S,
    /// What to do now, in this order. Each is safe to repeat: a crash in between makes recovery take it again.
    pub actions: &'static [A],
    /// Why the event changed nothing, if it was ignored.
    pub ignored: Option<&'static str>,
}

/// An event that the table says cannot happen in this state: a bug of the engine, or a peer that breaks the protocol.
/// The state is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} cannot happen in state {state:?}: {why}")]
pub struct ImpossibleEvent<S: fmt::Debug, E: fmt::Debug> {
    /// The state it came in.
    pub state: S,
    /// The event.
    pub event: E,
    /// Why it cannot be.
    pub why: &'static str,
}

fn step<S, E, A>(
    table: &'static [Row<S, E, A>],
    state: S,
    event: E,
) -> Result<Step<S, A>, ImpossibleEvent<S, E>>
where
    S: Copy + PartialEq + fmt::Debug,
    E: Copy + PartialEq + fmt::Debug,
{
    let row = table
        .iter()
        .find(|row| row.from.contains(&state) && row.on.contains(&event));
    match row.map(|row| &row.then) {
        Some(Then::Go(to, actions)) => Ok(Step {
            state: *to,
            actions,
            ignored: None,
        }),
        Some(Then::Ignore(why)) => Ok(Step {
            state,
            actions: &[],
            ignored: Some(why),
        }),
        Some(Then::Impossible(why)) => Err(ImpossibleEvent { state, event, why }),
        None => Err(ImpossibleEvent {
            state,
            event,
            why: "the table has no row for it",
        }),
    }
}

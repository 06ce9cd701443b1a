//! What one move of the chaos is: everything that is random, drawn from its seed and from nothing else.

use std::fmt;

use rig::Workload;

/// One of the two hosts: the container starts on the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// A process of the engine, or one that it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `migrate --to`.
    Mover,
    Guard,
    Agent,
    Pager,
    Standby,
    /// `runc checkpoint` or `runc restore`.
    Runtime(End),
    /// CRIU, or a process that it makes of the container.
    Criu(End),
    /// Any process of these.
    Any(End),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Kill(Role),
    /// SIGSTOP, and SIGCONT so many milliseconds later.
    Pause(Role, u64),
    /// Packets vanish for so many milliseconds.
    CutLink(u64),
    /// The state directory's filesystem has no byte left.
    FillDisk(End),
    /// Writes to the state directory's filesystem wait for so many milliseconds.
    StallDisk(End, u64),
    /// Every process of the host ends, and what is in memory is gone: /run, cgroups, the boot id.
    Restart(End),
}

/// When it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So many milliseconds after the order to move.
    Order(u64),
    /// So many milliseconds after `migrate --json` said this event for the first time.
    Event(&'static str, u64),
}

/// A move and what goes wrong with it.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub seed: u64,
    pub workload: Load,
    pub mode: &'static str,
    /// Megabits a second; `None`: as fast as it goes.
    pub link: Option<u32>,
    /// One or two.
    pub faults: Vec<(Moment, Fault)>,
}

/// What runs in the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    Memory { mib: u32, dirty_mb_s: u32 },
    Redis { mib: u32 },
    Zoo { churn: bool },
    Files,
}

impl Scenario {
    /// The move with this seed.
    pub fn new(seed: u64) -> Scenario {
        let mut random = fastrand::Rng::with_seed(seed);
        let workload = match random.u32(..10) {
            0..5 => Load::Memory {
                mib: random.u32(8..=64),
                dirty_mb_s: *pick(&mut random, &[0, 5, 20, 100]),
            },
            5..7 => Load::Redis {
                mib: random.u32(4..=16),
            },
            7 => Load::Zoo { churn: false },
            8 => Load::Zoo { churn: true },
            _ => Load::Files,
        };
        let mode = pick(&mut random, &["pre-copy", "post-copy", "hybrid", "auto"]);
        let link = *pick(&mut random, &[None, None, Some(1000), Some(200)]);
        let number = random.usize(1..=2);
        let faults = (0..number)
            .map(|_| (moment(&mut random), fault(&mut random)))
            .collect();
        Scenario {
            seed,
            workload,
            mode,
            link,
            faults,
        }
    }

    /// Whether some fault is of the filesystem that holds this host's state, and needs one that can be frozen or filled.
    pub fn hits_disk(&self, end: End) -> bool {
        self.faults.iter().any(|(_, fault)| match fault {
            Fault::FillDisk(at) | Fault::StallDisk(at, _) => *at == end,
            _ => false,
        })
    }

    /// Whether this host is restarted.
    pub fn restarts(&self, end: End) -> bool {
        let restart = Fault::Restart(end);
        self.faults.iter().any(|(_, fault)| *fault == restart)
    }
}

impl Load {
    /// The workload for the rig.
    pub fn workload(self) -> Workload {
        match self {
            Load::Memory { mib, dirty_mb_s } => Workload::memory_writer(mib, dirty_mb_s),
            Load::Redis { mib } => Workload::redis(mib),
            Load::Zoo { churn } => Workload::zoo(churn),
            Load::Files => Workload::file_mutator(),
        }
    }
}

/// Most faults come where they matter most: around the handover.
fn moment(random: &mut fastrand::Rng) -> Moment {
    const EVENTS: [&str; 8] = [
        "started",
        "tracking",
        "freezing",
        "frozen",
        "hold",
        "prepared",
        "commit_sent",
        "committed",
    ];
    match random.u32(..4) {
        0 => Moment::Order(random.u64(..2500)),
        _ => {
            let event = pick(random, &EVENTS);
            Moment::Event(event, *pick(random, &[0, 0, 1, 3, 10, 30, 100, 400]))
        }
    }
}

fn fault(random: &mut fastrand::Rng) -> Fault {
    let end = *pick(random, &[End::Source, End::Destination]);
    match random.u32(..20) {
        0..9 => Fault::Kill(role(random)),
        9..12 => Fault::Pause(role(random), random.u64(50..8000)),
        12..15 => Fault::CutLink(random.u64(50..15_000)),
        15 => Fault::FillDisk(end),
        16 => Fault::StallDisk(end, random.u64(500..15_000)),
        _ => Fault::Restart(end),
    }
}

fn role(random: &mut fastrand::Rng) -> Role {
    use End::{Destination, Source};
    *pick(
        random,
        &[
            Role::Mover,
            Role::Guard,
            Role::Agent,
            Role::Pager,
            Role::Standby,
            Role::Runtime(Source),
            Role::Runtime(Destination),
            Role::Criu(Source),
            Role::Criu(Destination),
            Role::Any(Source),
            Role::Any(Destination),
        ],
    )
}

fn pick<'a, T>(random: &mut fastrand::Rng, of: &'a [T]) -> &'a T {
    &of[random.usize(..of.len())]
}

impl Role {
    /// The host it runs on.
    pub fn end(self) -> End {
        match self {
            Role::Mover | Role::Guard => End::Source,
            Role::Agent | Role::Pager | Role::Standby => End::Destination,
            Role::Runtime(end) | Role::Criu(end) | Role::Any(end) => end,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::Source => "source",
            End::Destination => "destination",
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Mover => f.write_str("migrate"),
            Role::Guard => f.write_str("guard"),
            Role::Agent => f.write_str("agent"),
            Role::Pager => f.write_str("pager"),
            Role::Standby => f.write_str("standby"),
            Role::Runtime(end) => write!(f, "runc at the {end}"),
            Role::Criu(end) => write!(f, "criu at the {end}"),
            Role::Any(end) => write!(f, "any process at the {end}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill(role) => write!(f, "kill {role}"),
            Fault::Pause(role, ms) => write!(f, "stop {role} for {ms} ms"),
            Fault::CutLink(ms) => write!(f, "cut the link for {ms} ms"),
            Fault::FillDisk(end) => write!(f, "fill the disk of the {end}"),
            Fault::StallDisk(end, ms) => write!(f, "stall the disk of the {end} for {ms} ms"),
            Fault::Restart(end) => write!(f, "restart the {end}"),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Moment::Order(ms) => write!(f, "{ms} ms after the order"),
            Moment::Event(event, ms) => write!(f, "{ms} ms after {event}"),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Load::Memory { mib, dirty_mb_s } => {
                write!(f, "memory-writer {mib} MiB {dirty_mb_s} MB/s")
            }
            Load::Redis { mib } => write!(f, "redis {mib} MiB"),
            Load::Zoo { churn: false } => f.write_str("zoo"),
            Load::Zoo { churn: true } => f.write_str("zoo that churns"),
            Load::Files => f.write_str("file-mutator"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_draws_the_same_move() {
        for seed in 0..200 {
            assert_eq!(
                format!("{:?}", Scenario::new(seed)),
                format!("{:?}", Scenario::new(seed))
            );
        }
    }

    #[test]
    fn every_kind_of_fault_and_workload_is_drawn() {
        let drawn: String = (0..2000)
            .map(|seed| format!("{:?}\n", Scenario::new(seed)))
            .collect();
        for kind in [
            "Kill(Mover)",
            "Kill(Any(Destination))",
            "Pause(Pager",
            "CutLink",
            "FillDisk(Source)",
            "FillDisk(Destination)",
            "StallDisk",
            "Restart(Source)",
            "Restart(Destination)",
            "Event(\"commit_sent\"",
            "Order(",
            "Redis",
            "Zoo { churn: true }",
            "Files",
            "\"hybrid\"",
        ] {
            assert!(drawn.contains(kind), "{kind} is never drawn");
        }
    }
}

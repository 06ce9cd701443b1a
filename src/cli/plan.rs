//! What the command line asks for, typed and checked.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::quantity::Bandwidth;
use crate::migration::convergence::Limits;
use crate::migration::mode::Mode;
use crate::migration::report::Tracker;
use crate::migration::{ContainerId, MigrationId, PeerAddress};
use crate::transport::{Fingerprint, PeerName};
use crate::wire::codec::Compression;
use crate::wire::message::RootfsMode;

/// One command with all it needs.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// `migrate --to HOST:PORT CONTAINER`
    Move(MovePlan),
    /// `migrate check`
    Check(CheckPlan),
    /// `migrate identity`
    Identity {
        /// Where the identity is kept.
        state_dir: PathBuf,
    },
    /// `migrate trust`
    Trust(TrustPlan),
    /// `migrate agent`
    Agent(AgentPlan),
    /// `migrate recover`
    Recover {
        /// Whose journals to read.
        state_dir: PathBuf,
        /// The migration whose frozen container a person lets go on.
        resume_source: Option<MigrationId>,
    },
    /// `migrate resume`
    Resume {
        /// Whose journals to read.
        state_dir: PathBuf,
    },
    /// `migrate hook`: CRIU's action script asks the engine, or the journal if the engine is gone.
    Hook(HookPlan),
    /// `migrate pager`: the process that serves page faults at the target.
    Pager(Vec<OsString>),
    /// `migrate guard`: the process that recovers if the source's process dies while the container is frozen.
    Guard(Vec<OsString>),
    /// `migrate stdio`: the process that keeps a container's standard streams at the target.
    Stdio(Vec<OsString>),
}

/// A container to move.
#[derive(Clone, Debug, PartialEq)]
pub struct MovePlan {
    /// The container.
    pub container: ContainerId,
    /// The agent to move it to.
    pub to: PeerAddress,
    /// How memory gets there.
    pub mode: Mode,
    /// How to find dirty pages; `None` picks the best that works here.
    pub tracker: Option<Tracker>,
    /// When to stop copying and freeze.
    pub limits: Limits,
    /// The downtime limit was asked for: what is known to break it is refused.
    pub strict_downtime: bool,
    /// How long to wait for a lost link while pages are owed.
    pub reconnect_timeout: Duration,
    /// Slow the container when rounds do not converge.
    pub auto_converge: bool,
    /// The most to send.
    pub bandwidth: Option<Bandwidth>,
    /// How to compress pages.
    pub compression: Compression,
    /// Only preflight, at both ends.
    pub dry_run: bool,
    /// The runtime's state directory.
    pub runtime_root: PathBuf,
    /// How the root filesystem gets there.
    pub rootfs: RootfsMode,
    /// Paths that both hosts have in common.
    pub shared: Vec<PathBuf>,
    /// Identity, trust and journals.
    pub state_dir: PathBuf,
    /// Events as JSON lines instead of a progress display.
    pub json: bool,
    /// Where to write the report.
    pub report: Option<PathBuf>,
}

/// What this host can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckPlan {
    /// JSON instead of a table.
    pub json: bool,
    /// Identity, trust and journals.
    pub state_dir: PathBuf,
    /// The runtime's state directory.
    pub runtime_root: PathBuf,
}

/// The list of trusted peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustPlan {
    /// Where it is kept.
    pub state_dir: PathBuf,
    /// What to do with it.
    pub change: TrustChange,
}

/// What to do with the list of trusted peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrustChange {
    /// Trust a peer.
    Add {
        /// What to call it.
        name: PeerName,
        /// Its certificate.
        fingerprint: Fingerprint,
    },
    /// Print the list.
    List,
    /// Trust a peer no longer.
    Remove {
        /// What it is called.
        name: PeerName,
    },
}

/// The daemon at the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPlan {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Identity, trust, journals, page stores and bundles.
    pub state_dir: PathBuf,
    /// The runtime's state directory.
    pub runtime_root: PathBuf,
    /// How to write the log.
    pub log: LogFormat,
}

/// How to write the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// JSON lines.
    Json,
}

/// A hook that CRIU called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookPlan {
    /// The directory with the engine's socket.
    pub directory: PathBuf,
    /// The journal that decides if the engine is gone.
    pub journal: PathBuf,
}

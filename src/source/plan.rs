//! What to move, where to, and how: the arguments of a migration, checked.

use crate::migration::mode::Mode;
use crate::migration::{ContainerId, PeerAddress};
use crate::runtime::runc;
use crate::source::tracker::TrackerKind;
use crate::wire::codec::Compression;
use crate::wire::message::RootfsMode;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the engine keeps its journals, identity and working files unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/migrate";

/// How long a lost link is waited for unless told otherwise.
pub const DEFAULT_RECONNECT_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a container should stand still at most unless told otherwise.
pub const DEFAULT_DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// One migration, as it was asked for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The container.
    pub container: ContainerId,
    /// The target's agent.
    pub target: PeerAddress,
    /// runc's state directory.
    pub runtime_root: PathBuf,
    /// Where journals, identity and working files are kept.
    pub state_dir: PathBuf,
    /// How memory gets to the target.
    pub mode: Mode,
    /// How dirty pages are found; `None` lets the kernel's features decide.
    pub tracker: Option<TrackerKind>,
    /// Rounds after which the container is frozen whatever is dirty.
    pub max_rounds: u32,
    /// How long the container should stand still at most.
    pub downtime_limit: Duration,
    /// It was asked for: what is known to break it before the freeze is refused, and not only said.
    pub strict_downtime: bool,
    /// Bytes a second for pages and files.
    pub bandwidth_limit: Option<NonZeroU64>,
    /// How pages are compressed.
    pub compression: Compression,
    /// How long the whole migration may take before it is given up.
    pub timeout: Duration,
    /// How long a lost link is waited for while pages are owed, until the copy at the target is stopped.
    pub reconnect_timeout: Duration,
    /// Slow the container by its CPU quota when rounds do not converge.
    pub auto_converge: bool,
    /// Only look whether it would work.
    pub dry_run: bool,
    /// How the root filesystem gets to the target.
    pub rootfs: RootfsMode,
    /// Directories and files of this host that the target has as well, for containers that have them mounted.
    pub shared: Vec<PathBuf>,
    /// Page streams, and threads that read pages.
    pub page_streams: u16,
    /// The `migrate` program, which hooks and guard are started from. The program that runs, unless it only embeds the
    /// engine.
    pub program: PathBuf,
}

impl Plan {
    /// The plan that `migrate --to TARGET CONTAINER` makes.
    pub fn new(container: ContainerId, target: PeerAddress) -> Plan {
        Plan {
            container,
            target,
            runtime_root: PathBuf::from(runc::DEFAULT_ROOT),
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            mode: Mode::Auto,
            tracker: None,
            max_rounds: 30,
            downtime_limit: DEFAULT_DOWNTIME_LIMIT,
            strict_downtime: false,
            bandwidth_limit: None,
            compression: Compression::Auto,
            timeout: Duration::from_secs(3600),
            reconnect_timeout: DEFAULT_RECONNECT_TIMEOUT,
            auto_converge: false,
            dry_run: false,
            rootfs: RootfsMode::Copied,
            shared: Vec::new(),
            page_streams: 2,
            program: std::env::current_exe().unwrap_or_else(|_| PathBuf::from("migrate")),
        }
    }

    /// The working directory of a migration below a state directory.
    pub fn work_dir(state_dir: &Path, migration: impl std::fmt::Display) -> PathBuf {
        state_dir.join("work").join(migration.to_string())
    }
}

//! The command line: what may be typed, and what it means.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::plan::{
    AgentPlan, CheckPlan, HookPlan, LogFormat, MovePlan, Plan, TrustChange, TrustPlan,
};
use super::quantity::{self, Bandwidth, QuantityError};
use crate::migration::convergence::Limits;
use crate::migration::mode::Mode;
use crate::migration::report::Tracker;
use crate::migration::{ContainerId, PeerAddress};
use crate::transport::{Fingerprint, PeerName};
use crate::wire::codec::Compression;
use crate::wire::message::RootfsMode;

/// Why there is nothing to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Help or the version was asked for: print it, and all is well.
    Told(String),
    /// The command line is wrong: one line that says how.
    Wrong(String),
}

/// Reads a command line, program name first.
///
/// # Errors
/// If there is nothing to run: help was asked for, or it is wrong.
pub fn parse<I: IntoIterator<Item: Into<OsString> + Clone>>(arguments: I) -> Result<Plan, Stop> {
    let typed = Typed::try_parse_from(arguments).map_err(|error| stop(&error))?;
    match (typed.command, typed.migration) {
        (Some(command), _) => Ok(command.into()),
        (None, Some(migration)) if migration.slows_in_vain() => Err(Stop::Wrong(format!(
            "--auto-converge does nothing with --mode {}: use it with pre-copy or auto",
            migration.mode
        ))),
        (None, Some(migration)) => Ok(Plan::Move(migration.into())),
        (None, None) => Err(Stop::Wrong(
            "say what to move: migrate --to HOST:PORT CONTAINER (migrate --help lists everything)"
                .to_owned(),
        )),
    }
}

fn stop(error: &clap::Error) -> Stop {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    let text = error.render().to_string();
    if matches!(error.kind(), DisplayHelp | DisplayVersion) {
        return Stop::Told(text);
    }
    // clap says what is wrong up to the first empty line, some of it in lines of its own; usage and tips follow.
    let said: Vec<&str> = text
        .lines()
        .take_while(|line| !line.is_empty())
        .map(str::trim)
        .collect();
    let said = said.join(" ");
    Stop::Wrong(said.strip_prefix("error: ").unwrap_or(&said).to_owned())
}

/// Moves running Linux containers from host to host.
#[derive(Debug, Parser)]
#[command(
    name = "migrate",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 moved (or done), 1 internal error, 2 usage, 3 refused by preflight (nothing touched),\n\
                  4 rolled back (the container goes on here), 5 unknown (the container is frozen here; migrate recover finds out),\n\
                  6 incomplete (it lives at the target and lacks pages that are kept here; migrate resume goes on)."
)]
struct Typed {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    migration: Option<Migration>,
}

#[derive(Debug, Args)]
struct Migration {
    /// The agent to move the container to
    #[arg(long, value_name = "HOST:PORT")]
    to: PeerAddress,
    /// The container to move
    container: ContainerId,
    /// How to move memory: pre-copy, post-copy, hybrid or auto
    #[arg(long, value_name = "MODE", default_value_t)]
    mode: Mode,
    /// How to find the pages the container writes
    #[arg(long, value_enum, default_value = "auto")]
    tracker: TrackerChoice,
    /// Freeze after this many rounds at the latest
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_rounds: u32,
    /// How long the container should stand still at most, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    downtime_limit: u32,
    /// The most to send: 100M is bytes a second, 1Gbit is bits
    #[arg(long, value_name = "RATE")]
    bandwidth_limit: Option<Bandwidth>,
    /// How to compress pages: auto, none, lz4 or zstd
    #[arg(long, value_name = "CODEC", default_value = "auto")]
    compress: Compression,
    /// How long the whole migration may take: seconds, or 10m, 2h; what would not keep the downtime limit then rolls back
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = timeout)]
    timeout: Duration,
    /// How long post-copy waits for a lost link: seconds, or 10m
    #[arg(long, value_name = "TIME", default_value = "300", value_parser = reconnect_timeout)]
    reconnect_timeout: Duration,
    /// Slow the container by its CPU quota while rounds do not converge (pre-copy and auto)
    #[arg(long)]
    auto_converge: bool,
    /// Look at both ends whether it would work; touch nothing
    #[arg(long)]
    dry_run: bool,
    /// The runtime's state directory
    #[arg(long, value_name = "DIR", default_value = "/run/runc")]
    runtime_root: PathBuf,
    /// Copy the root filesystem, or expect the same path at the target
    #[arg(long, value_enum, default_value = "copy")]
    rootfs: RootfsChoice,
    // Not the flattened StateDir: clap's derive leaves a struct that flattens another out of an Option.
    /// Where identity, trusted peers and journals are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/migrate")]
    state_dir: PathBuf,
    /// Write events as JSON lines (docs/events.md)
    #[arg(long)]
    json: bool,
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct StateDir {
    /// Where identity, trusted peers and journals are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/migrate")]
    state_dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what works on this host and what is missing
    Check {
        /// Write JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        state: StateDir,
        /// The runtime's state directory
        #[arg(long, value_name = "DIR", default_value = "/run/runc")]
        runtime_root: PathBuf,
    },
    /// Print this host's fingerprint, making its identity on first use
    Identity {
        #[command(flatten)]
        state: StateDir,
    },
    /// Say which hosts may send containers here, and receive them
    #[command(subcommand)]
    Trust(Trust),
    /// Receive containers
    Agent {
        /// Where to listen
        #[arg(long, value_name = "ADDR:PORT")]
        listen: SocketAddr,
        #[command(flatten)]
        state: StateDir,
        /// The runtime's state directory
        #[arg(long, value_name = "DIR", default_value = "/run/runc")]
        runtime_root: PathBuf,
        /// How to write the log
        #[arg(long, value_enum, default_value = "human")]
        log_format: LogFormat,
    },
    /// Finish or undo what a crash left
    Recover {
        #[command(flatten)]
        state: StateDir,
    },
    /// Go on sending pages to containers that moved away in post-copy and whose link broke
    Resume {
        #[command(flatten)]
        state: StateDir,
    },
    /// What CRIU's action script runs
    #[command(hide = true)]
    Hook {
        directory: PathBuf,
        journal: PathBuf,
    },
    #[command(hide = true, disable_help_flag = true)]
    Pager(Passed),
    #[command(hide = true, disable_help_flag = true)]
    Guard(Passed),
    #[command(hide = true, disable_help_flag = true)]
    Stdio(Passed),
}

/// Arguments of a process the engine starts itself; it reads them.
#[derive(Debug, Args)]
struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum Trust {
    /// Trust a host by the fingerprint `migrate identity` prints there
    Add {
        /// What to call it here
        name: PeerName,
        /// sha256: and 64 hex digits
        fingerprint: Fingerprint,
        #[command(flatten)]
        state: StateDir,
    },
    /// Print the trusted hosts
    List {
        #[command(flatten)]
        state: StateDir,
    },
    /// Trust a host no longer
    Remove {
        /// What it is called here
        name: PeerName,
        #[command(flatten)]
        state: StateDir,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TrackerChoice {
    /// The best that works here
    Auto,
    /// Soft-dirty bits
    SoftDirty,
    /// userfaultfd write protection
    UffdWp,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RootfsChoice {
    /// Copy bundle and root filesystem
    Copy,
    /// Both hosts see the same path
    Shared,
}

fn reconnect_timeout(text: &str) -> Result<Duration, String> {
    quantity::time(text).map_err(|_| "write seconds, or 90s, 10m, 2h".to_owned())
}

impl Migration {
    /// Whether it asks to slow a container whose rounds nobody waits for.
    fn slows_in_vain(&self) -> bool {
        self.auto_converge && matches!(self.mode, Mode::PostCopy | Mode::Hybrid)
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    match quantity::time(text) {
        Ok(time) if time >= Duration::from_secs(1) => Ok(time),
        Ok(_) => Err("a migration takes at least a second".to_owned()),
        Err(QuantityError::Time { .. }) => Err("write seconds, or 90s, 10m, 2h".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl From<Migration> for MovePlan {
    fn from(typed: Migration) -> MovePlan {
        MovePlan {
            container: typed.container,
            to: typed.to,
            mode: typed.mode,
            tracker: match typed.tracker {
                TrackerChoice::Auto => None,
                TrackerChoice::SoftDirty => Some(Tracker::SoftDirty),
                TrackerChoice::UffdWp => Some(Tracker::UffdWp),
            },
            limits: Limits {
                downtime: Duration::from_millis(typed.downtime_limit.into()),
                max_rounds: typed.max_rounds,
                timeout: typed.timeout,
            },
            reconnect_timeout: typed.reconnect_timeout,
            auto_converge: typed.auto_converge,
            bandwidth: typed.bandwidth_limit,
            compression: typed.compress,
            dry_run: typed.dry_run,
            runtime_root: typed.runtime_root,
            rootfs: match typed.rootfs {
                RootfsChoice::Copy => RootfsMode::Copied,
                RootfsChoice::Shared => RootfsMode::Shared,
            },
            state_dir: typed.state_dir,
            json: typed.json,
            report: typed.report,
        }
    }
}

impl From<Command> for Plan {
    fn from(typed: Command) -> Plan {
        match typed {
            Command::Check {
                json,
                state,
                runtime_root,
            } => Plan::Check(CheckPlan {
                json,
                state_dir: state.state_dir,
                runtime_root,
            }),
            Command::Identity { state } => Plan::Identity {
                state_dir: state.state_dir,
            },
            Command::Trust(Trust::Add {
                name,
                fingerprint,
                state,
            }) => Plan::Trust(TrustPlan {
                state_dir: state.state_dir,
                change: TrustChange::Add { name, fingerprint },
            }),
            Command::Trust(Trust::List { state }) => Plan::Trust(TrustPlan {
                state_dir: state.state_dir,
                change: TrustChange::List,
            }),
            Command::Trust(Trust::Remove { name, state }) => Plan::Trust(TrustPlan {
                state_dir: state.state_dir,
                change: TrustChange::Remove { name },
            }),
            Command::Agent {
                listen,
                state,
                runtime_root,
                log_format,
            } => Plan::Agent(AgentPlan {
                listen,
                state_dir: state.state_dir,
                runtime_root,
                log: log_format,
            }),
            Command::Recover { state } => Plan::Recover {
                state_dir: state.state_dir,
            },
            Command::Resume { state } => Plan::Resume {
                state_dir: state.state_dir,
            },
            Command::Hook { directory, journal } => Plan::Hook(HookPlan { directory, journal }),
            Command::Pager(passed) => Plan::Pager(passed.arguments),
            Command::Guard(passed) => Plan::Guard(passed.arguments),
            Command::Stdio(passed) => Plan::Stdio(passed.arguments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn plan(line: &str) -> Result<Plan, Stop> {
        parse(std::iter::once("migrate").chain(line.split_whitespace()))
    }

    fn moved(line: &str) -> MovePlan {
        match plan(line) {
            Ok(Plan::Move(plan)) => plan,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn wrong(line: &str) -> String {
        match plan(line) {
            Err(Stop::Wrong(said)) => said,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_definition_of_the_command_line_holds_together() {
        Typed::command().debug_assert();
    }

    #[test]
    fn two_words_are_enough_to_move_a_container() {
        let plan = moved("--to host-b:7070 web");
        assert_eq!(plan.container.as_str(), "web");
        assert_eq!(plan.to.to_string(), "host-b:7070");
        assert_eq!(
            (plan.tracker, plan.bandwidth, plan.report),
            (None, None, None)
        );
        assert_eq!(plan.limits.downtime, Duration::from_millis(300));
        assert_eq!(plan.limits.max_rounds, 30);
        assert_eq!(plan.compression, Compression::Auto);
        assert_eq!(plan.rootfs, RootfsMode::Copied);
        assert_eq!(plan.state_dir, PathBuf::from("/var/lib/migrate"));
        assert_eq!(plan.runtime_root, PathBuf::from("/run/runc"));
        assert!(!plan.dry_run && !plan.json && !plan.auto_converge);
        assert_eq!(plan.mode, Mode::Auto);
        assert_eq!(plan.reconnect_timeout, Duration::from_secs(300));
    }

    #[test]
    fn a_container_is_only_slowed_where_that_can_help() {
        for mode in ["pre-copy", "auto"] {
            assert!(moved(&format!("--to h:1 web --auto-converge --mode {mode}")).auto_converge);
        }
        for mode in ["post-copy", "hybrid"] {
            let said = wrong(&format!("--to h:1 web --auto-converge --mode {mode}"));
            assert!(
                said.contains(mode) && said.contains("auto-converge"),
                "{said}"
            );
        }
        assert!(wrong("--to h:1 web --mode precopy").contains("hybrid"));
    }

    #[test]
    fn every_option_reaches_the_plan() {
        let plan = moved(
            "--to [::1]:7 web --tracker soft-dirty --max-rounds 4 --downtime-limit 80 --bandwidth-limit 1Gbit \
             --mode hybrid --reconnect-timeout 7 --compress lz4 --timeout 10m --dry-run --runtime-root /r --rootfs shared --state-dir /s --json --report f",
        );
        assert_eq!(plan.mode, Mode::Hybrid);
        assert_eq!(plan.reconnect_timeout, Duration::from_secs(7));
        assert_eq!(plan.tracker, Some(Tracker::SoftDirty));
        let expected = Limits {
            downtime: Duration::from_millis(80),
            max_rounds: 4,
            timeout: Duration::from_secs(600),
        };
        assert_eq!(plan.limits, expected);
        assert_eq!(
            plan.bandwidth.map(|bandwidth| bandwidth.0.get()),
            Some(125_000_000)
        );
        assert_eq!(plan.compression.to_string(), "lz4");
        assert_eq!(plan.rootfs, RootfsMode::Shared);
        assert!(plan.dry_run && plan.json);
        assert_eq!(
            (plan.runtime_root, plan.state_dir),
            (PathBuf::from("/r"), PathBuf::from("/s"))
        );
        assert_eq!(plan.report, Some(PathBuf::from("f")));
    }

    #[test]
    fn a_container_may_be_called_like_a_command() {
        assert_eq!(moved("--to h:1 check").container.as_str(), "check");
        assert_eq!(
            plan("recover"),
            Ok(Plan::Recover {
                state_dir: "/var/lib/migrate".into()
            })
        );
        assert_eq!(
            plan("resume --state-dir /s"),
            Ok(Plan::Resume {
                state_dir: "/s".into()
            })
        );
    }

    #[test]
    fn every_command_has_its_plan() {
        let check = CheckPlan {
            json: true,
            state_dir: "/s".into(),
            runtime_root: "/run/runc".into(),
        };
        assert_eq!(plan("check --json --state-dir /s"), Ok(Plan::Check(check)));
        assert_eq!(
            plan("identity --state-dir /s"),
            Ok(Plan::Identity {
                state_dir: "/s".into()
            })
        );
        let agent = AgentPlan {
            listen: "[::]:7070".parse().expect("an address"),
            state_dir: "/s".into(),
            runtime_root: "/r".into(),
            log: LogFormat::Json,
        };
        let line = "agent --listen [::]:7070 --state-dir /s --runtime-root /r --log-format json";
        assert_eq!(plan(line), Ok(Plan::Agent(agent)));
        let fingerprint = format!("sha256:{}", "ab".repeat(32));
        let add = TrustChange::Add {
            name: "host-b".parse().expect("a name"),
            fingerprint: fingerprint.parse().expect("a fingerprint"),
        };
        let trust = |change| {
            Ok(Plan::Trust(TrustPlan {
                state_dir: "/var/lib/migrate".into(),
                change,
            }))
        };
        assert_eq!(plan(&format!("trust add host-b {fingerprint}")), trust(add));
        assert_eq!(plan("trust list"), trust(TrustChange::List));
        let remove = TrustChange::Remove {
            name: "host-b".parse().expect("a name"),
        };
        assert_eq!(plan("trust remove host-b"), trust(remove));
        let hook = HookPlan {
            directory: "/d".into(),
            journal: "/j".into(),
        };
        assert_eq!(plan("hook /d /j"), Ok(Plan::Hook(hook)));
        assert_eq!(
            plan("pager --standby"),
            Ok(Plan::Pager(vec!["--standby".into()]))
        );
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (line, part) in [
            ("", "--to <HOST:PORT> <CONTAINER>"),
            ("web", "--to <HOST:PORT>"),
            ("--to h:1", "<CONTAINER>"),
            ("--to h web", "HOST:PORT"),
            ("--to h:0 web", "1 to 65535"),
            ("--to h:1 ../web", "container id"),
            ("--to h:1 web --bandwidth-limit 10Mb", "bits or bytes"),
            ("--to h:1 web --compress gzip", "auto, none, lz4, zstd"),
            ("--to h:1 web --timeout soon", "10m"),
            ("--to h:1 web --max-rounds 0", "1..=1000"),
            ("--to h:1 web --tracker magic", "uffd-wp"),
            ("--to h:1 web --frobnicate", "--frobnicate"),
            ("trust add host-b sha256:12", "64 hex digits"),
            ("agent", "--listen"),
            ("agent --listen localhost", "--listen"),
        ] {
            let said = wrong(line);
            assert!(said.contains(part), "{line:?} says {said:?}, not {part:?}");
            assert!(
                !said.contains('\n') && !said.starts_with("error"),
                "{said:?}"
            );
        }
    }

    #[test]
    fn help_and_version_are_no_errors() {
        assert!(matches!(plan("--version"), Err(Stop::Told(text)) if text.starts_with("migrate ")));
        let Err(Stop::Told(help)) = plan("--help") else {
            panic!("no help")
        };
        for shown in [
            "--to",
            "check",
            "identity",
            "trust",
            "agent",
            "recover",
            "Exit codes",
        ] {
            assert!(help.contains(shown), "{shown} is not in the help:\n{help}");
        }
        for hidden in ["pager", "hook", "guard", "stdio"] {
            assert!(!help.contains(hidden), "{hidden} is in the help:\n{help}");
        }
    }
}

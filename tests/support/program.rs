//! The programs of tests/programs: built once, started in a freezer, commanded by lines.
//!
//! `MIGRATE_TEST_PROGRAMS=/dir` names a directory that holds them already built, for machines without a compiler.

use super::freezer::Freezer;
use super::offer::stretched;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// One of the programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Name {
    /// Changes its memory in every way a program can, on command.
    Dirtier,
    /// Keeps an exact record of what it writes.
    Recorder,
    /// Reaches for every descriptor that is put into it.
    Thief,
}

/// The built program.
pub fn program(name: Name) -> &'static Path {
    static DIRTIER: OnceLock<PathBuf> = OnceLock::new();
    static RECORDER: OnceLock<PathBuf> = OnceLock::new();
    static THIEF: OnceLock<PathBuf> = OnceLock::new();
    match name {
        Name::Dirtier => {
            DIRTIER.get_or_init(|| found_or_built("dirtier", include_str!("../programs/dirtier.c")))
        }
        Name::Recorder => RECORDER
            .get_or_init(|| found_or_built("recorder", include_str!("../programs/recorder.c"))),
        Name::Thief => {
            THIEF.get_or_init(|| found_or_built("thief", include_str!("../programs/thief.c")))
        }
    }
}

fn found_or_built(name: &str, source: &str) -> PathBuf {
    if let Some(programs) = std::env::var_os("MIGRATE_TEST_PROGRAMS") {
        let program = std::path::absolute(Path::new(&programs).join(name)).unwrap();
        assert!(
            program.is_file(),
            "MIGRATE_TEST_PROGRAMS names a directory without {program:?}"
        );
        return program;
    }
    let program = Path::new(option_env!("CARGO_TARGET_TMPDIR").unwrap_or("/tmp"))
        .join(format!("{name}-{}", std::process::id()));
    let mut compiler = Command::new("cc")
        .args([
            "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-x", "c", "-", "-o",
        ])
        .arg(&program)
        .stdin(Stdio::piped())
        .spawn()
        .expect("a C compiler (cc) or MIGRATE_TEST_PROGRAMS is needed");
    let mut input = compiler.stdin.take().unwrap();
    input.write_all(source.as_bytes()).unwrap();
    drop(input);
    assert!(
        compiler.wait().unwrap().success(),
        "{name}.c does not compile"
    );
    program
}

/// The program, running.
pub struct Commanded {
    child: Child,
    commands: ChildStdin,
    replies: BufReader<ChildStdout>,
}

impl Commanded {
    /// Starts the dirtier in `freezer`.
    pub fn start(freezer: &Freezer) -> Commanded {
        Commanded::start_program(freezer, Name::Dirtier, [])
    }

    /// Starts a program in `freezer`.
    pub fn start_program<'a>(
        freezer: &Freezer,
        name: Name,
        arguments: impl IntoIterator<Item = &'a OsStr>,
    ) -> Commanded {
        let mut child = Command::new("sh")
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(freezer.procs())
            .arg(program(name))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let replies = BufReader::new(child.stdout.take().unwrap());
        let mut commanded = Commanded {
            child,
            commands,
            replies,
        };
        assert_eq!(commanded.reply(), "ready");
        commanded
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Sends a command whose answer is "ok" (for `exec` "ready", for `fill` an address).
    pub fn obey(&mut self, command: &str) {
        if command.starts_with("fill") {
            self.address(command);
            return;
        }
        let expected = if command == "exec" { "ready" } else { "ok" };
        assert_eq!(self.ask(command), expected, "{command}");
    }

    /// Sends a command whose answer is an address.
    pub fn address(&mut self, command: &str) -> u64 {
        let answer = self.ask(command);
        u64::from_str_radix(&answer, 16).unwrap_or_else(|_| panic!("{command}: {answer}"))
    }

    pub fn ask(&mut self, command: &str) -> String {
        writeln!(self.commands, "{command}").unwrap();
        self.reply()
    }

    pub fn reply(&mut self) -> String {
        let mut line = String::new();
        let read = self.replies.read_line(&mut line).unwrap();
        assert!(
            read > 0,
            "the program has died: {:?}",
            self.child.try_wait()
        );
        line.trim_end().to_owned()
    }

    /// The address ranges of its mappings.
    pub fn mappings(&self) -> Vec<String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines()
            .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
            .collect()
    }

    /// Waits until `/proc/PID/stat` shows the leader in `state`.
    pub fn wait_for_state(&self, state: char) {
        let patience = Instant::now() + stretched(Duration::from_secs(60));
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            let now = stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap();
            if now == state {
                return;
            }
            assert!(
                Instant::now() < patience,
                "the program is in state {now}, not {state}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Commanded {
    fn drop(&mut self) {
        // Not waited for: it may be frozen, and dies when its freezer is dropped.
        let _ = self.child.kill();
    }
}

//! CRIU's action script: where a dump or a restore waits for the engine.
//!
//! ```text
//!  criu ──runs──▶ hook (sh) ──exec──▶ migrate hook DIR ──unix socket──▶ engine
//!        ◀─exit 0: go on──                             ◀──── "go" ────
//!        ◀─exit 1: undo ──                             ◀─ "no" or EOF ─
//! ```
//!
//! CRIU runs the script at many points; only three concern the engine:
//! `pre-dump` (nothing is touched yet), `post-dump` (the images are complete, the tasks stopped: exit 0 kills them,
//! anything else resumes them) and `post-restore` (the tasks are restored and have not run: exit 0 lets them, anything
//! else destroys them). At `pre-resume`, just before the restored tasks run, the script empties a file
//! ([`may_have_run`]). If the engine dies, the hook asks the journal what was decided ([`Verdict`]).

use crate::kernel::loopback;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;
use std::{fs, thread};

const SOCKET: &str = "hook.sock";
const SCRIPT: &str = "hook";
/// At a restore: the namespaces are there, the sockets are not yet.
const SETUP_NAMESPACES: &str = "setup-namespaces";
const MARK: &str = "not-resumed";
const GO: &[u8] = b"go";
const NO: &[u8] = b"no";

/// The point at which CRIU called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    /// CRIU is about to look at the tasks.
    PreDump,
    /// The images are written, the tasks are stopped.
    PostDump,
    /// The tasks are restored and have not run yet.
    PostRestore,
}

impl HookPoint {
    const ALL: [HookPoint; 3] = [
        HookPoint::PreDump,
        HookPoint::PostDump,
        HookPoint::PostRestore,
    ];

    /// CRIU's name for it, as in `CRTOOLS_SCRIPT_ACTION`.
    pub fn name(self) -> &'static str {
        match self {
            HookPoint::PreDump => "pre-dump",
            HookPoint::PostDump => "post-dump",
            HookPoint::PostRestore => "post-restore",
        }
    }
}

/// A hook that waits for an answer. Dropping it without one is a "no".
#[derive(Debug)]
pub struct WaitingHook {
    point: HookPoint,
    init_pid: Option<i32>,
    stream: UnixStream,
}

impl WaitingHook {
    /// Where CRIU waits.
    pub fn point(&self) -> HookPoint {
        self.point
    }

    /// The container's init in the engine's pid namespace, where CRIU knows it.
    pub fn init_pid(&self) -> Option<i32> {
        self.init_pid
    }

    /// Lets CRIU go on.
    pub fn go(mut self) -> io::Result<()> {
        self.stream.write_all(GO)
    }

    /// Makes CRIU undo what it did.
    pub fn refuse(mut self) -> io::Result<()> {
        self.stream.write_all(NO)
    }

    /// Whether the hook process still waits: false once it was killed.
    pub fn is_waiting(&self) -> bool {
        use nix::sys::socket::{MsgFlags, recv};
        use std::os::fd::AsRawFd;
        let peeked = recv(
            self.stream.as_raw_fd(),
            &mut [0],
            MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
        );
        peeked == Err(nix::errno::Errno::EAGAIN)
    }

    /// Blocks until the hook process is gone (killed, or CRIU with it); never returns while it waits.
    pub fn watch(&self) -> io::Result<impl FnOnce() + Send + use<>> {
        let mut stream = self.stream.try_clone()?;
        Ok(move || {
            let _ = stream.read(&mut [0]);
        })
    }
}

/// The engine's end: an installed script and its socket. Dropping it closes the socket and removes both.
#[derive(Debug)]
pub struct HookServer {
    directory: PathBuf,
}

impl HookServer {
    /// Installs the script in `directory`. Every hook that calls is given to `receive`, and what that returns is sent
    /// to `signals`; hooks are received one after another.
    ///
    /// `program` is the `migrate` program, `journal` the file its hook consults if the engine dies.
    pub fn start<E: Send + 'static>(
        program: &Path,
        directory: &Path,
        journal: &Path,
        signals: Sender<E>,
        receive: impl Fn(WaitingHook) -> Option<E> + Send + 'static,
    ) -> io::Result<HookServer> {
        let listener = UnixListener::bind(directory.join(SOCKET))?;
        let server = HookServer {
            directory: directory.to_path_buf(),
        };
        fs::write(directory.join(MARK), "not resumed\n")?;
        let script = server.script();
        fs::write(&script, script_text(program, directory, journal))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700))?;
        thread::Builder::new().name("hook".into()).spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                match greet(stream) {
                    Ok(Some(hook)) => {
                        if let Some(signal) = receive(hook)
                            && signals.send(signal).is_err()
                        {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(%error, "a hook called and did not say where CRIU is")
                    }
                }
            }
        })?;
        Ok(server)
    }

    /// The script to name in CRIU's options.
    pub fn script(&self) -> PathBuf {
        self.directory.join(SCRIPT)
    }
}

impl Drop for HookServer {
    fn drop(&mut self) {
        // The accepting thread blocks in accept: a caller that says "stop" ends it.
        if let Ok(mut stream) = UnixStream::connect(self.directory.join(SOCKET)) {
            let _ = stream.write_all(b"stop");
        }
        let _ = fs::remove_file(self.directory.join(SOCKET));
        let _ = fs::remove_file(self.script());
    }
}

/// What the journal says to a hook whose engine is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The container is to live at the target.
    Committed,
    /// It is to live at the source, or nothing was decided that could bind anyone.
    RolledBack,
    /// The source said "commit" and does not know whether it was heard: wait, whatever happens.
    Undecided,
}

/// The hook process: asks the engine, and without one the journal. Returns whether CRIU may go on.
///
/// `verdict` reads the journal anew at each call.
pub fn ask(
    directory: &Path,
    action: &str,
    init_pid: Option<&str>,
    verdict: impl Fn() -> Verdict,
) -> bool {
    if action == SETUP_NAMESPACES {
        let init_pid = init_pid.and_then(|pid| pid.parse().ok()).unwrap_or(0);
        return match loopback::bring_up(init_pid) {
            Ok(()) => true,
            Err(error) => {
                eprintln!(
                    "migrate hook: cannot bring up the loopback device of process {init_pid}: {error}"
                );
                false
            }
        };
    }
    let asked = UnixStream::connect(directory.join(SOCKET)).and_then(|mut stream| {
        writeln!(stream, "{action} {}", init_pid.unwrap_or(""))?;
        // Not to the end of the stream: the engine keeps its end open to see when this process dies.
        let mut answer = [0; GO.len()];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    });
    match asked.as_ref().map(|answer| &answer[..]) {
        Ok(GO) => true,
        Ok(NO) => false,
        // A dump that has not begun is never worth going on with alone.
        _ if action == HookPoint::PreDump.name() => false,
        _ => loop {
            match verdict() {
                Verdict::Committed => return true,
                Verdict::RolledBack => return false,
                Verdict::Undecided => thread::sleep(Duration::from_millis(50)),
            }
        },
    }
}

/// Whether a restore whose hook lives in `directory` got as far as letting tasks run.
pub fn may_have_run(directory: &Path) -> bool {
    // Only a mark that is there and not empty proves that they never did.
    fs::metadata(directory.join(MARK)).map_or(true, |mark| mark.len() == 0)
}

fn greet(mut stream: UnixStream) -> io::Result<Option<WaitingHook>> {
    // Said at once, unless the host has no processor to spare; without it the whole migration is off.
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 64 && stream.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    stream.set_read_timeout(None)?;
    let line = String::from_utf8_lossy(&line);
    if line == "stop" {
        return Ok(None);
    }
    let (action, pid) = line.split_once(' ').unwrap_or((&line, ""));
    let point = HookPoint::ALL
        .into_iter()
        .find(|point| point.name() == action)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("unknown action {action:?}"),
            )
        })?;
    Ok(Some(WaitingHook {
        point,
        init_pid: pid.parse().ok(),
        stream,
    }))
}

fn script_text(program: &Path, directory: &Path, journal: &Path) -> String {
    let points = HookPoint::ALL.map(HookPoint::name).join("|") + "|" + SETUP_NAMESPACES;
    // Emptying a file that is there needs no space, so a full disk cannot hide that the tasks ran.
    format!(
        "#!/bin/sh\ncase \"$CRTOOLS_SCRIPT_ACTION\" in\n  {points}) exec {} hook {} {} ;;\n  \
         pre-resume) : > {} ;;\nesac\n",
        quoted(program),
        quoted(directory),
        quoted(journal),
        quoted(&directory.join(MARK)),
    )
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn server() -> (tempfile::TempDir, HookServer, mpsc::Receiver<WaitingHook>) {
        let directory = tempfile::tempdir().unwrap();
        let (sender, receiver) = mpsc::channel();
        let server = HookServer::start(
            Path::new("/migrate"),
            directory.path(),
            Path::new("/j"),
            sender,
            Some,
        )
        .unwrap();
        (directory, server, receiver)
    }

    #[test]
    fn a_hook_goes_on_only_when_the_engine_says_go() {
        let (directory, _server, receiver) = server();
        let path = directory.path().to_path_buf();
        let engine = thread::spawn(move || {
            let hook = receiver.recv().unwrap();
            assert_eq!(
                (hook.point(), hook.init_pid()),
                (HookPoint::PostDump, Some(42))
            );
            hook.go().unwrap();
            receiver.recv().unwrap().refuse().unwrap();
        });
        let never = || -> Verdict { panic!("the engine is alive") };
        assert!(ask(&path, "post-dump", Some("42"), never));
        assert!(!ask(&path, "post-restore", None, never));
        engine.join().unwrap();
    }

    #[test]
    fn a_hook_whose_engine_died_does_what_the_journal_says() {
        let (directory, _server, receiver) = server();
        let path = directory.path().to_path_buf();
        let engine = thread::spawn(move || drop(receiver.recv().unwrap()));
        assert!(ask(&path, "post-dump", None, || Verdict::Committed));
        engine.join().unwrap();
        let missing = directory.path().join("gone");
        assert!(!ask(&missing, "post-dump", None, || Verdict::RolledBack));
        assert!(!ask(&missing, "pre-dump", None, || Verdict::Committed));
        let asked = std::cell::Cell::new(0);
        let undecided_twice = || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 {
                Verdict::Undecided
            } else {
                Verdict::Committed
            }
        };
        assert!(ask(&missing, "post-restore", None, undecided_twice));
    }

    #[test]
    fn the_script_quotes_its_paths() {
        let text = script_text(Path::new("/a b"), Path::new("/it's"), Path::new("/j"));
        assert!(text.contains(r"exec '/a b' hook '/it'\''s' '/j'"));
    }
}

//! The standard streams of a container that arrives.
//!
//! A pipe at the source led to somebody there. Here it leads to a small process that writes what the container says to
//! a log file, and that outlives the agent, in a cgroup of its own: a pipe without reader would kill the container with SIGPIPE.

use crate::runtime::apart;
use crate::wire::message::StdStream;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the restored container gets as standard input, output and error. Logs go to files in `logs`.
pub fn open(program: &Path, streams: &[StdStream; 3], logs: &Path) -> io::Result<[Stdio; 3]> {
    let [input, output, error] = streams;
    Ok([
        match input {
            StdStream::Null => Stdio::null(),
            // Nobody writes: the container reads the end of the file.
            StdStream::Pipe { .. } => io::pipe()?.0.into(),
        },
        logged(program, output, logs.join("stdout.log"))?,
        logged(program, error, logs.join("stderr.log"))?,
    ])
}

/// The content of runc's `descriptors.json`, which says which streams to replace.
pub fn descriptors(streams: &[StdStream; 3]) -> Vec<u8> {
    let names: Vec<String> = streams
        .iter()
        .map(|stream| match stream {
            StdStream::Null => "/dev/null".to_string(),
            StdStream::Pipe { inode } => format!("pipe:[{inode}]"),
        })
        .collect();
    serde_json::json!(names).to_string().into_bytes()
}

fn logged(program: &Path, stream: &StdStream, log: PathBuf) -> io::Result<Stdio> {
    if matches!(stream, StdStream::Null) {
        return Ok(Stdio::null());
    }
    let (reader, writer) = io::pipe()?;
    Command::new(program)
        .arg("stdio")
        .arg(log)
        .process_group(0)
        .stdin(reader)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(writer.into())
}

/// What `migrate stdio LOG` does: appends its standard input to the file until it ends.
pub fn log(path: &Path) -> io::Result<()> {
    // Its standard error leads nowhere; a pager's failure to do the same is logged.
    let _ = apart::leave();
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    io::copy(&mut io::stdin().lock(), &mut file)?;
    apart::end();
    Ok(())
}

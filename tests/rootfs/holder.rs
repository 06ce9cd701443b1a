//! A process that holds a file of the tree in one of the ways that matter to a copy.

use crate::harness::Trees;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// The program `holder.c`, compiled.
#[derive(Clone)]
pub struct Program(PathBuf);

impl Program {
    pub fn compile(trees: &Trees) -> Program {
        let program = trees.home.path().join("holder");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rootfs/holder.c");
        let compiled = Command::new("cc")
            .arg("-o")
            .arg(&program)
            .arg(source)
            .status()
            .unwrap();
        assert!(compiled.success());
        Program(program)
    }

    /// Starts it; it holds the files when this returns.
    pub fn start(&self, how: &str, files: &[&Path]) -> Holder {
        let mut child = Command::new(&self.0)
            .arg(how)
            .args(files)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut holder = Holder { child, answers };
        assert_eq!(holder.answer(), "ready");
        holder
    }
}

/// A process of the program. It is killed when it is dropped.
pub struct Holder {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Holder {
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn store(&mut self, offset: u64, value: u8) {
        assert_eq!(self.ask(&format!("{offset} {value}")), "stored");
    }

    pub fn ask(&mut self, what: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{what}").unwrap();
        self.answer()
    }

    /// Lets it end by itself; a signal would have ended it before.
    pub fn end(mut self) {
        drop(self.child.stdin.take());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    fn answer(&mut self) -> String {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The program as a script sees it: exit codes, standard output and standard error.

use std::process::{Command, Output};

fn migrate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_migrate"))
        .args(arguments)
        .output()
        .expect("the program starts")
}

#[test]
fn a_wrong_command_line_is_one_line_on_standard_error_and_code_2() {
    for arguments in [
        &[][..],
        &["--to", "h:1", "../web"],
        &["--to", "h", "web"],
        &["agent"],
        &["trust", "add", "x", "y"],
    ] {
        let output = migrate(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(
            said.starts_with("migrate: ") && output.stdout.is_empty(),
            "{arguments:?}: {said}"
        );
    }
}

#[test]
fn a_move_that_cannot_begin_says_so_in_its_events_and_its_report() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (state, runtime, report) = (path("state"), path("runc"), path("report.json"));
    let options = ["--to", "127.0.0.1:1", "--json", "--report", &report];
    let places = ["--state-dir", &state, "--runtime-root", &runtime, "nosuch"];
    let output = migrate(&[&options[..], &places].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("nosuch"), "{said}");
    let events: Vec<serde_json::Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    assert_eq!(events[0]["event"], "started", "{events:?}");
    let done = &events[events.len() - 1];
    assert_eq!(done["event"], "done", "{events:?}");
    assert_eq!(done["report"]["outcome"]["result"], "refused", "{done:#}");
    let written = std::fs::read(&report).expect("a report");
    let written: serde_json::Value = serde_json::from_slice(&written).expect("JSON");
    assert_eq!(written, done["report"]);
}

#[test]
fn a_report_that_cannot_be_written_is_told_before_anything_is_touched() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let report = directory.path().join("missing/report.json");
    let report = report.to_str().expect("a path in UTF-8");
    let output = migrate(&["--to", "127.0.0.1:1", "--json", "--report", report, "web"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(report), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn help_goes_to_standard_output_with_code_0() {
    let output = migrate(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("migrate"));
    assert!(output.stderr.is_empty());
}

#[test]
fn a_host_has_one_identity_and_trusts_whom_it_was_told_to() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let state = directory.path().to_str().expect("a path in UTF-8");
    let run = |arguments: &[&str]| migrate(&[arguments, &["--state-dir", state]].concat());

    let identity = run(&["identity"]);
    assert_eq!(identity.status.code(), Some(0));
    assert_eq!(identity.stdout, run(&["identity"]).stdout);
    let fingerprint = String::from_utf8(identity.stdout).expect("text");

    assert_eq!(
        run(&["trust", "add", "host-b", fingerprint.trim_end()])
            .status
            .code(),
        Some(0)
    );
    let listed = String::from_utf8(run(&["trust", "list"]).stdout).expect("text");
    assert!(
        listed.contains("host-b") && listed.contains(fingerprint.trim_end()),
        "{listed}"
    );
    let unknown = run(&["trust", "remove", "host-c"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("host-c"));
}

#[test]
fn a_hook_without_engine_and_journal_makes_criu_undo() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let status = Command::new(env!("CARGO_BIN_EXE_migrate"))
        .arg("hook")
        .arg(directory.path())
        .arg(directory.path().join("no-journal"))
        .env("CRTOOLS_SCRIPT_ACTION", "post-restore")
        .status()
        .expect("the program starts");
    assert_ne!(status.code(), Some(0));
}

#[test]
fn check_says_of_every_known_kernel_bug_whether_it_is_here_and_what_is_done() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let state = directory.path().to_str().expect("a path in UTF-8");
    let output = migrate(&["check", "--json", "--state-dir", state]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
    let bugs = said["kernel_bugs"].as_array().expect("a list");
    let standing = |name: &str| {
        let found = bugs.iter().find(|bug| bug["bug"] == name);
        let found = found.unwrap_or_else(|| panic!("{name} is not listed"));
        (text(&found["standing"]), text(&found["by"]))
    };
    for bug in bugs {
        assert!(!text(&bug["remedy"]).is_empty() && !text(&bug["reference"]).is_empty());
    }
    // What can be tried is tried, where there is something to try it on.
    let (tracked, by) = (said["tracker"] == "uffd-wp", "probe".to_owned());
    for name in ["mremap_keeps_protection", "dropped_copy_looks_swapped"] {
        assert_eq!(standing(name).1 == by, tracked, "{name}: {said}");
    }
    // What would hang is not.
    assert_ne!(standing("hugetlb_hole_hangs").1, by);

    let table = migrate(&["check", "--state-dir", state]);
    let table = String::from_utf8(table.stdout).expect("text");
    for bug in bugs {
        let (name, reference) = (text(&bug["name"]), text(&bug["reference"]));
        let mut lines = table.lines();
        let line = lines.find(|line| line.starts_with(&name) && line.contains(&reference));
        assert!(line.is_some(), "{name} in\n{table}");
    }
}

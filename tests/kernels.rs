//! The engine on Debian's 6.1 and 6.12 kernels, in guests: what is chosen there, every tracker that is offered, whole moves
//! in one guest, and moves from guest to guest over a wire, between kernels and between CRIU versions.
//!
//! Needs root and QEMU; `scripts/guest` installs QEMU and builds the images (two minutes, once). No KVM is needed.

use anyhow::{Context, Result, ensure};
use rig::{Finished, Guest, Job, KERNELS, WireEnd, built};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When a guest that works is killed: many times what one takes on a machine that has nothing else to do.
const LIMIT: Duration = Duration::from_secs(1800);

/// A guest runs its programs this many times slower than this machine, roughly.
const SLOWNESS: u32 = 10;

/// Guests that may run at the same time: an emulated processor takes a real one, and with less than that every patience in a
/// guest would have to be longer.
const AT_ONCE: usize = 2;

/// Permits for guests, of which there are [`AT_ONCE`].
struct Permits(usize);

static TAKEN: Mutex<usize> = Mutex::new(0);
static GIVEN_BACK: Condvar = Condvar::new();

impl Permits {
    /// Waits for as many as a test boots guests, all at once: two tests that each have half would wait for ever.
    fn take(guests: usize) -> Permits {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken + guests > AT_ONCE {
            taken = GIVEN_BACK
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *taken += guests;
        Permits(guests)
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
        GIVEN_BACK.notify_all();
    }
}

fn migrate() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_migrate"))
}

/// The test program `name` of this package.
fn test_program(name: &str) -> Result<PathBuf> {
    built(
        name,
        &["test", "--no-run", "--package", "migrate", "--test", name],
    )
}

/// Compiles the programs whose memory the tracker tests follow; a guest has no compiler.
fn compile_programs() -> Result<PathBuf> {
    // Once: another test may be about to copy them.
    static COMPILED: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(directory) = &*compiled {
        return Ok(directory.clone());
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-programs");
    fs::create_dir_all(&directory)?;
    for name in ["dirtier", "recorder", "thief"] {
        let source = format!("{}/tests/programs/{name}.c", env!("CARGO_MANIFEST_DIR"));
        let status = Command::new("cc")
            .args(["-O1", "-pthread", "-o"])
            .arg(directory.join(name))
            .arg(source)
            .status()
            .context("running cc")?;
        ensure!(status.success(), "cc {name}.c: {status}");
    }
    *compiled = Some(directory.clone());
    Ok(directory)
}

/// A job with `migrate` and its test program `name`, of which the tests in `filters` are run, one after another.
fn tests_job(name: &str, settings: &str, filters: &[&str]) -> Result<Job> {
    let program = test_program(name)?;
    let script = format!(
        "{settings}\nexport RUST_TEST_THREADS=1\n{} {}",
        program.display(),
        filters.join(" ")
    );
    let job = Job::new(&script)?;
    job.program(migrate())?;
    job.program(&program)?;
    Ok(job)
}

/// Every test that was asked for ran and passed; cargo's own line says how many.
fn passed(finished: &Finished, at_least: usize) -> Result<()> {
    println!("{}", finished.output);
    let count: usize = finished
        .output
        .lines()
        .find_map(|line| line.strip_prefix("test result: ok. "))
        .and_then(|rest| rest.split(' ').next()?.parse().ok())
        .context("no test result")?;
    ensure!(
        count >= at_least,
        "only {count} tests ran, of {at_least}: were they renamed?"
    );
    Ok(())
}

/// Whatever a test in a guest says is worth nothing if a failure there could look like a success here.
#[test]
fn a_job_that_fails_or_hangs_fails_here_and_shows_the_console() -> Result<()> {
    let _permit = Permits::take(1);
    let start = Instant::now();
    let failing = Guest::new("6.12").run(Job::new("echo a last word; exit 7")?);
    let took = start.elapsed();
    let said = format!("{:?}", failing.expect_err("the job ended with 7"));
    ensure!(said.contains("exit status: 7"), "{said}");
    ensure!(said.contains("a last word"), "{said}");
    ensure!(said.contains("userland after"), "no console: {said}");

    let mut hanging = Guest::new("6.12");
    // Time enough to boot here and now, and to say something.
    hanging.limit = Duration::from_secs(10) + 4 * took;
    let said = hanging.run(Job::new("echo it hangs; sleep 1000")?);
    let said = format!("{:?}", said.expect_err("the job never ends"));
    ensure!(said.contains("exit status: 124"), "{said}");
    ensure!(said.contains("it hangs"), "{said}");

    let dead = Guest::new("6.12").run(Job::new("echo c >/proc/sysrq-trigger; sleep 1000")?);
    let said = format!("{:?}", dead.expect_err("the kernel crashed"));
    ensure!(said.contains("exit status: 125"), "{said}");
    ensure!(said.contains("Kernel panic"), "no console: {said}");
    Ok(())
}

#[test]
fn bad_arguments_to_the_guest_script_are_told_in_one_line() -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest");
    let cases: [(&[&str], &str); 6] = [
        (&[], "what to do is missing"),
        (&["run", "5.4", "/tmp"], "unknown kernel \"5.4\""),
        (&["run", "6.1", "/nonexistent"], "not \"/nonexistent\""),
        (
            &["run", "--limit", "soon", "6.1", "/tmp"],
            "--limit wants a number",
        ),
        (&["run", "--memory"], "--memory needs a value"),
        (&["run", "--colour", "6.1"], "unknown option --colour"),
    ];
    for (arguments, expected) in cases {
        let output = Command::new(&script).args(arguments).output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(125), "{arguments:?}: {said}");
        ensure!(said.contains(expected), "{arguments:?}: {said}");
        ensure!(said.lines().count() == 1, "{arguments:?}: {said}");
    }
    Ok(())
}

#[test]
fn check_chooses_what_works_on_each_kernel() -> Result<()> {
    let _permit = Permits::take(1);
    for kernel in KERNELS {
        let job = Job::new(
            "migrate=target/debug/migrate\n$migrate check; $migrate check --json >/job/out/check.json",
        )?;
        job.program(migrate())?;
        let finished = Guest::new(kernel).run(job)?;
        println!("{}", finished.output);
        let check: Value = serde_json::from_str(&finished.file("check.json")?)?;
        let tracker = match kernel {
            "6.1" => "soft-dirty",
            _ => "uffd-wp",
        };
        ensure!(check["tracker"] == tracker, "{kernel}: {check:#}");
        ensure!(
            check["freeze"] == "cgroup v2 freezer",
            "{kernel}: {check:#}"
        );
        // Both have soft-dirty, so that CRIU's dump is a skeleton without any trick.
        let findings = check["findings"].as_array().context("no findings")?;
        let skeleton = findings
            .iter()
            .find(|finding| finding["what"] == "skeleton dump");
        let native = skeleton.and_then(|finding| finding["detail"].as_str());
        ensure!(
            native.is_some_and(|detail| detail.starts_with("native")),
            "{kernel}: {skeleton:?}"
        );
    }
    Ok(())
}

/// Programs that never rest, against an engine that has to get a word in: on the one emulated processor of a guest they did not end
/// in ten minutes (6.12). They run on this machine, in tests/tracker.rs.
const TOO_MUCH_FOR_ONE_PROCESSOR: [&str; 2] = [
    "a_process_whose_threads_exec_all_the_time",
    "nothing_in_a_container_gets_hold_of_a_descriptor",
];

fn trackers_of(kernel: &'static str, offered: &str) -> Result<()> {
    let programs = compile_programs()?;
    let job = tests_job(
        "tracker",
        &format!(
            "export MIGRATE_TEST_TRACKERS={offered} MIGRATE_TEST_SLOWNESS={SLOWNESS} MIGRATE_TEST_PROGRAMS={}",
            programs.display()
        ),
        &TOO_MUCH_FOR_ONE_PROCESSOR
            .map(|name| format!("--skip {name}"))
            .each_ref()
            .map(String::as_str),
    )?;
    job.directory(&programs)?;
    let mut guest = Guest::new(kernel);
    guest.limit = LIMIT;
    let _permit = Permits::take(1);
    passed(&guest.run(job)?, 20)
}

#[test]
fn soft_dirty_misses_no_page_on_6_1() -> Result<()> {
    trackers_of("6.1", "soft-dirty")
}

#[test]
fn both_trackers_miss_no_page_on_6_12() -> Result<()> {
    trackers_of("6.12", "uffd-wp,soft-dirty")
}

const PRE_COPY: [&str; 2] = [
    "next_to_no_page_is_dumped_of_a_container_that_writes_until_it_is_frozen",
    "forty_processes_move_with_all_that_joins_them",
];

/// Whole moves between two hosts in one guest, with Debian 13's own CRIU and cgroup v2.
fn moves_on(kernel: &'static str, tests: &[&str]) -> Result<()> {
    let mut guest = Guest::new(kernel);
    guest.memory_mib = 3072;
    guest.limit = LIMIT;
    let settings = format!("export MIGRATE_TEST_SLOWNESS={SLOWNESS}");
    let job = tests_job("move", &settings, tests)?;
    let _permit = Permits::take(1);
    passed(&guest.run(job)?, tests.len())
}

#[test]
fn containers_move_on_6_1_with_soft_dirty() -> Result<()> {
    moves_on("6.1", &PRE_COPY)
}

#[test]
fn containers_move_on_6_12_with_cgroup_v2() -> Result<()> {
    moves_on("6.12", &PRE_COPY)
}

/// The copy's cgroup, its freezer and its quota are those of cgroup v2 here.
#[test]
fn containers_move_in_post_copy_on_6_12_with_cgroup_v2() -> Result<()> {
    let tests = [
        "post_copy_moves_first_and_brings_every_byte_afterwards",
        "forty_processes_move_in_post_copy",
    ];
    moves_on("6.12", &tests)
}

/// One end of a wire.
struct End {
    kernel: &'static str,
    /// It uses the newer CRIU of `scripts/setup`, and not Debian 13's.
    newer_criu: bool,
}

const DEBIAN_12: End = End {
    kernel: "6.1",
    newer_criu: false,
};
const DEBIAN_13: End = End {
    kernel: "6.12",
    newer_criu: false,
};

/// A redis under load makes `moves` between two guests, beginning at the first.
fn between(first: End, second: End, moves: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let wire = directory.path().join("wire");
    let program = built(
        "guest-end",
        &["build", "--package", "rig", "--bin", "guest-end"],
    )?;
    let boot = |end: &End, name: &str, wire_end| -> Result<_> {
        let job = Job::new(&format!("{} {name} {moves}", program.display()))?;
        job.program(migrate())?;
        job.program(&program)?;
        if end.newer_criu {
            job.newer_criu()?;
        }
        let guest = Guest {
            memory_mib: 1536,
            limit: LIMIT,
            wire: Some((wire.clone(), wire_end)),
            ..Guest::new(end.kernel)
        };
        guest.start(job)
    };
    let _permits = Permits::take(2);
    // In the order that is harder for the wire.
    let connecting = boot(&second, "second", WireEnd::Connects)?;
    let listening = boot(&first, "first", WireEnd::Listens)?;
    let (first, second) = (listening.wait(), connecting.wait());
    for end in [&first, &second] {
        match end {
            Ok(finished) => println!("{}", finished.output),
            Err(error) => println!("{error:?}"),
        }
    }
    first.and(second).map(drop)
}

#[test]
fn redis_moves_between_two_6_12_guests_and_back() -> Result<()> {
    between(DEBIAN_13, DEBIAN_13, "moves moves")
}

#[test]
fn redis_moves_from_6_1_to_6_12_and_back() -> Result<()> {
    between(DEBIAN_12, DEBIAN_13, "moves moves")
}

/// A newer CRIU reads an older one's images; the other way round it is not tried.
#[test]
fn redis_moves_to_a_newer_criu_and_is_refused_on_the_way_back() -> Result<()> {
    let newer = End {
        newer_criu: true,
        ..DEBIAN_13
    };
    between(DEBIAN_12, newer, "moves refused")
}

//! The dirty trackers against real processes: a mirror kept from scans and reads alone must, once the processes are in the
//! cgroup freezer, equal their memory byte for byte.
//!
//! Every test runs with each tracker the kernel offers; those of making a userfaultfd in another process need uffd-wp.
//! Needs root, a cgroup freezer (v1 or v2), a kernel with a tracker, and a C compiler or the built program; fails without.
//! See tests/support/offer.rs and program.rs for the variables by which a machine is described.

mod support {
    pub mod agreement;
    pub mod freezer;
    pub mod mirror;
    pub mod offer;
    pub mod program;
}

use migrate::kernel::inject::{self, InjectError};
use migrate::kernel::maps::VmaKind;
use migrate::kernel::ptrace::{StopError, living_threads};
use migrate::kernel::userfaultfd::WriteTracker;
use migrate::memory::{PageNumber, PageRange, PageSet, VirtAddr};
#[cfg(feature = "measure")]
use migrate::runtime::threads_of_cgroup;
use migrate::source::tracker::{Motion, TrackerKind, Untracked, is_tracked};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};
use support::agreement;
use support::freezer::Freezer;
use support::mirror::Mirror;
use support::offer::{injects, offered, opened, slowness, stretched, with_each};
use support::program::{Commanded, Name, program};

/// How long to wait for a thread that stops as soon as it may run.
fn patience() -> Duration {
    stretched(Duration::from_secs(10))
}

/// Makes a userfaultfd in process `pid` while its threads stand still.
fn attach(pid: i32, patience: Duration) -> Result<OwnedFd, InjectError> {
    let threads = move || Ok(living_threads(pid).unwrap_or_default());
    let injected = inject::userfaultfds(vec![vec![pid]], Box::new(threads), patience)?;
    injected.each.into_iter().next().expect("one was asked for")
}

/// How long a `vfork` lasts that something is done in, however busy this machine is.
fn long_vfork() -> String {
    format!("vfork {}", 5000.max(1500 * slowness()))
}

/// Follows a program through `commands`, scanning and reading before and after each; then freezes it and compares.
fn follow(name: &str, commands: &[&str]) {
    with_each(|kind| {
        let freezer = Freezer::new(name);
        let mut dirtier = Commanded::start(&freezer);
        let mut mirror = Mirror::new(opened(kind));
        for command in commands {
            mirror.round(&freezer, Motion::Running);
            dirtier.obey(command);
            mirror.round(&freezer, Motion::Running);
        }
        freezer.freeze();
        mirror.round(&freezer, Motion::Frozen);
        mirror.compare();
        freezer.thaw();
    });
}

/// The pages of `first..first + pages` of a block at `block`.
fn block_pages(block: u64, first: u64, pages: u64) -> PageRange {
    let start = VirtAddr(block).page().0 + first;
    PageRange::from_start_len(PageNumber(start), pages).unwrap()
}

fn in_block(dirty: &PageSet, block: u64, pages: u64) -> PageSet {
    dirty
        .intersecting(block_pages(block, 0, pages))
        .into_iter()
        .collect()
}

#[test]
fn exactly_the_written_pages_of_a_block_are_dirty() {
    with_each(|kind| {
        let freezer = Freezer::new("exact");
        let mut dirtier = Commanded::start(&freezer);
        let block = dirtier.address("fill 16 0");
        let mut tracker = opened(kind);
        let mut scan = || {
            let mut scans = tracker.scan(&freezer.tasks(), Motion::Running).unwrap();
            assert_eq!(scans.len(), 1);
            let scan = scans.remove(0);
            assert!(scan.untracked.is_none(), "{:?}", scan.untracked);
            in_block(&scan.dirty, block, 4096)
        };
        assert_eq!(
            scan().pages(),
            4096,
            "all that is populated is dirty at first"
        );
        assert_eq!(scan().pages(), 0);
        dirtier.obey("poke 100 3");
        dirtier.obey("poke 4000 1");
        let written = scan();
        let expected: PageSet = [block_pages(block, 100, 3), block_pages(block, 4000, 1)]
            .into_iter()
            .collect();
        assert_eq!(written, expected);
        // Dropped and read again: a page of zeros where there was data.
        dirtier.obey("drop-and-read 7 2");
        assert_eq!(scan(), [block_pages(block, 7, 2)].into_iter().collect());
        assert_eq!(scan().pages(), 0);
    });
}

#[test]
fn a_moved_block_is_dirty_as_a_whole_at_its_new_place() {
    with_each(|kind| {
        let freezer = Freezer::new("moved");
        let mut dirtier = Commanded::start(&freezer);
        dirtier.address("fill 4 0");
        let mut tracker = opened(kind);
        tracker.scan(&freezer.tasks(), Motion::Running).unwrap();
        let block = dirtier.address("move");
        let scan = tracker
            .scan(&freezer.tasks(), Motion::Running)
            .unwrap()
            .remove(0);
        assert_eq!(in_block(&scan.dirty, block, 1024).pages(), 1024);
        dirtier.obey("poke 5 1");
        let scan = tracker
            .scan(&freezer.tasks(), Motion::Running)
            .unwrap()
            .remove(0);
        assert_eq!(
            in_block(&scan.dirty, block, 1024),
            [block_pages(block, 5, 1)].into_iter().collect()
        );
    });
}

/// Memory that is not there is not written, and may become zeros while the program is frozen: what was sent of it before it was
/// given back must not be taken for its content.
#[test]
fn what_khugepaged_makes_of_frozen_memory_is_not_what_was_there_before() {
    with_each(|kind| {
        let mut ways = vec![vec!["renew"]];
        // A userfaultfd keeps khugepaged away from what it tracks. Wherever 2 MiB begin, some of their pages are not there, and one
        // was written since the last scan: khugepaged leaves memory alone that is all write-protected.
        if kind == TrackerKind::SoftDirty {
            ways.push(vec![
                "drop 8 300",
                "drop 520 300",
                "poke 400 1",
                "poke 860 1",
            ]);
        }
        for commands in ways {
            let freezer = Freezer::new("collapse");
            let mut dirtier = Commanded::start(&freezer);
            let block = dirtier.address("fill 4 1");
            let mut mirror = Mirror::new(opened(kind));
            mirror.round(&freezer, Motion::Running);
            mirror.round(&freezer, Motion::Running);
            for command in commands {
                dirtier.obey(command);
            }
            freezer.freeze();
            mirror.round(&freezer, Motion::Frozen);
            let collapsed = Command::new(program(Name::Dirtier))
                .args([
                    "collapse",
                    &dirtier.pid().to_string(),
                    &format!("{block:x}"),
                ])
                .status();
            // What is new at the freeze is registered then, to see whether another has it: khugepaged is kept away from it, too.
            let may_collapse = kind == TrackerKind::SoftDirty;
            assert_eq!(collapsed.unwrap().success(), may_collapse);
            mirror.compare();
            freezer.thaw();
        }
    });
}

/// CRIU's parasite makes a page where executable memory begins, also where there was none.
#[test]
fn a_hole_in_frozen_executable_memory_has_no_copy_that_counts() {
    with_each(|kind| {
        let freezer = Freezer::new("hole");
        let mut dirtier = Commanded::start(&freezer);
        let block = dirtier.address("fill 1 0");
        dirtier.obey("executable");
        let mut mirror = Mirror::new(opened(kind));
        mirror.round(&freezer, Motion::Running);
        mirror.round(&freezer, Motion::Running);
        dirtier.obey("drop 0 2");
        freezer.freeze();
        let stale = &mirror.round(&freezer, Motion::Frozen)[0].stale;
        let in_it = in_block(stale, block, 256);
        assert_eq!(in_it, [block_pages(block, 0, 2)].into_iter().collect());
        freezer.thaw();
    });
}

#[test]
fn no_page_is_missed_when_a_program_changes_its_memory_in_every_way() {
    follow(
        "steps",
        &[
            "fill 8 0",
            "steps 300",
            "poke 0 50",
            "steps 3000",
            "steps 1",
            "steps 10000",
        ],
    );
}

#[test]
fn no_page_is_missed_of_huge_pages() {
    follow(
        "thp",
        &[
            "fill 16 1",
            "poke 3 1",
            "poke 600 700",
            "drop-and-read 1024 512",
            "poke 1030 1",
            "steps 500",
        ],
    );
}

/// Where the copies of a file's pages are dropped, the file's own content is back.
#[test]
fn no_page_is_missed_of_a_privately_mapped_file_whose_copies_are_dropped() {
    follow(
        "file",
        &["file", "poke 0 64", "drop 3 10", "poke 5 2", "drop 40 1"],
    );
}

#[test]
fn no_page_is_missed_of_threads_that_write_without_pause() {
    follow(
        "threads",
        &[
            "threads 4",
            "steps 100",
            "steps 100",
            "steps 100",
            "steps 100",
        ],
    );
}

#[test]
fn no_page_is_missed_of_forks_and_execs() {
    follow(
        "forks",
        &[
            "fork 5 200",
            "steps 50",
            "fork 5 50",
            "exec",
            "steps 200",
            "vfork 0",
            "exec",
            "fork 2 10",
        ],
    );
}

#[test]
fn no_page_is_missed_of_a_tree_of_workers_that_never_rest() {
    with_each(|kind| {
        let freezer = Freezer::new("workers");
        let mut dirtier = Commanded::start(&freezer);
        dirtier.obey("threads 2");
        dirtier.obey("workers 6");
        let mut mirror = Mirror::new(opened(kind));
        let start = Instant::now();
        let mut rounds = 0;
        // Several freezes: after each the processes go on, as after a rolled back migration.
        for _freeze in 0..3 {
            let (until, enough) = (Instant::now() + Duration::from_secs(2), rounds + 5);
            while Instant::now() < until || rounds < enough {
                mirror.round(&freezer, Motion::Running);
                rounds += 1;
            }
            freezer.freeze();
            let spaces = mirror.round(&freezer, Motion::Frozen).len();
            assert!(
                spaces >= 7,
                "of the program and its six workers only {spaces} are left"
            );
            mirror.compare();
            freezer.thaw();
        }
        println!(
            "workers: {rounds} rounds in {:?}, {}",
            start.elapsed(),
            mirror.summary()
        );
    });
}

#[test]
fn a_process_that_execs_is_a_new_space_and_all_dirty() {
    with_each(|kind| {
        let freezer = Freezer::new("exec");
        let mut dirtier = Commanded::start(&freezer);
        let mut tracker = opened(kind);
        let before = tracker
            .scan(&freezer.tasks(), Motion::Running)
            .unwrap()
            .remove(0);
        dirtier.obey("exec");
        let after = tracker
            .scan(&freezer.tasks(), Motion::Running)
            .unwrap()
            .remove(0);
        assert_eq!(before.pid, after.pid);
        assert_ne!(before.space, after.space);
        assert!(after.untracked.is_none(), "{:?}", after.untracked);
        let again = tracker
            .scan(&freezer.tasks(), Motion::Running)
            .unwrap()
            .remove(0);
        assert_eq!(again.space, after.space);
        assert!(again.dirty.pages() < after.dirty.pages() / 2);
    });
}

/// A system call that ends under CRIU's hands, or whoever else writes to frozen memory.
#[test]
fn what_is_written_to_a_frozen_program_is_told_by_the_next_scan() {
    with_each(|kind| {
        let freezer = Freezer::new("rescan");
        let mut dirtier = Commanded::start(&freezer);
        let block = dirtier.address("fill 4 0");
        let mut tracker = opened(kind);
        let mut scan = |motion| {
            let mut scans = tracker.scan(&freezer.tasks(), motion).unwrap();
            scans.remove(0)
        };
        scan(Motion::Running);
        dirtier.obey("poke 100 3");
        freezer.freeze();
        let at_freeze = scan(Motion::Frozen);
        let poked = [block_pages(block, 100, 3)].into_iter().collect();
        assert_eq!(in_block(&at_freeze.dirty, block, 1024), poked);
        assert_eq!(in_block(&at_freeze.unwatched, block, 1024).pages(), 0);
        let memory = format!("/proc/{}/mem", dirtier.pid());
        let memory = std::fs::File::options().write(true).open(memory).unwrap();
        for page in [7, 101] {
            let at = block + page * 4096;
            std::os::unix::fs::FileExt::write_all_at(&memory, &[1; 16], at).unwrap();
        }
        let later = in_block(&scan(Motion::Frozen).dirty, block, 1024);
        let written: PageSet = [block_pages(block, 7, 1), block_pages(block, 101, 1)]
            .into_iter()
            .collect();
        match kind {
            TrackerKind::UffdWp => assert_eq!(later, written),
            // Its bits are cleared, and then read, by CRIU: nothing asks this tracker again.
            TrackerKind::SoftDirty => {
                assert!(written.iter().all(|run| later.contains(run.start())))
            }
        }
        freezer.thaw();
    });
}

/// What was mapped since the last scan is all reported at each scan of the frozen program, and said to be so.
#[test]
fn what_came_to_be_mapped_before_the_freeze_is_left_to_the_last_scan() {
    with_each(|kind| {
        if kind == TrackerKind::SoftDirty {
            return;
        }
        let freezer = Freezer::new("unwatched");
        let mut dirtier = Commanded::start(&freezer);
        let mut tracker = opened(kind);
        let tasks = || freezer.tasks();
        tracker.scan(&tasks(), Motion::Running).unwrap();
        let block = dirtier.address("fill 4 0");
        freezer.freeze();
        let scan = tracker.scan(&tasks(), Motion::Frozen).unwrap().remove(0);
        assert_eq!(in_block(&scan.dirty, block, 1024).pages(), 1024);
        assert_eq!(in_block(&scan.unwatched, block, 1024).pages(), 1024);
        let scan = tracker.scan(&tasks(), Motion::Frozen).unwrap().remove(0);
        assert_eq!(in_block(&scan.dirty, block, 1024).pages(), 1024);
        freezer.thaw();
    });
}

#[test]
fn a_process_first_seen_frozen_is_taken_whole_without_attaching() {
    with_each(|kind| {
        let freezer = Freezer::new("late");
        let mut dirtier = Commanded::start(&freezer);
        dirtier.obey("steps 500");
        let mut mirror = Mirror::new(opened(kind));
        freezer.freeze();
        let scans = mirror.round(&freezer, Motion::Frozen);
        assert!(
            matches!(scans[0].untracked, Some(Untracked::Frozen)),
            "{:?}",
            scans[0].untracked
        );
        mirror.compare();
        freezer.thaw();
    });
}

#[test]
fn a_vfork_child_shares_its_parents_space() {
    with_each(|kind| {
        let freezer = Freezer::new("vfork");
        let mut dirtier = Commanded::start(&freezer);
        let parent = dirtier.pid();
        dirtier.obey(&long_vfork());
        let tasks = freezer.tasks_when(|tasks| tasks.len() == 2);
        let mut tracker = opened(kind);
        let scans = tracker.scan(&tasks, Motion::Running).unwrap();
        assert_eq!(scans.len(), 1, "one memory, one space");
        assert_eq!(scans[0].pid, parent);
        assert_eq!(scans[0].sharers.len(), 1);
        assert!(scans[0].untracked.is_none(), "{:?}", scans[0].untracked);
        let tasks = freezer.tasks_when(|tasks| tasks.len() == 1);
        let later = tracker.scan(&tasks, Motion::Running).unwrap().remove(0);
        assert_eq!(
            later.space, scans[0].space,
            "the parent's space outlives the child's exec"
        );
        dirtier.obey("steps 10");
    });
}

#[test]
fn a_vfork_child_is_the_way_in_while_its_parent_waits() {
    if !injects("a_vfork_child_is_the_way_in_while_its_parent_waits") {
        return;
    }
    let freezer = Freezer::new("vfork-way-in");
    let mut dirtier = Commanded::start(&freezer);
    dirtier.obey(&long_vfork());
    let tasks = freezer.tasks_when(|tasks| tasks.len() == 2);
    // It does not stop, however long it is waited for.
    let impatience = stretched(Duration::from_millis(100));
    let attached = attach(dirtier.pid(), impatience);
    assert!(
        matches!(
            attached,
            Err(InjectError::Stop(StopError::Uninterruptible { .. }))
        ),
        "{attached:?}"
    );
    let child = tasks.iter().find(|task| task.pid != dirtier.pid()).unwrap();
    let made = attach(child.pid, patience()).unwrap();
    WriteTracker::new(made).unwrap();
    freezer.tasks_when(|tasks| tasks.len() == 1);
    dirtier.obey("steps 10");
}

/// Sibling threads, a process that shares the table and one that may trace it look for the descriptor all the time, and put
/// another in its place.
#[test]
fn nothing_in_a_container_gets_hold_of_a_descriptor_of_the_engine() {
    if !injects("nothing_in_a_container_gets_hold_of_a_descriptor_of_the_engine") {
        return;
    }
    let freezer = Freezer::new("thief");
    let mut thief = Commanded::start_program(&freezer, Name::Thief, []);
    for _ in 0..100 {
        let mut tracker = opened(TrackerKind::UffdWp);
        tracker.set_container(&freezer.of_the_engine());
        let scans = tracker.scan(&freezer.tasks(), Motion::Running).unwrap();
        assert_eq!(scans.len(), 2, "the program and the process it has forked");
        for scan in scans {
            assert!(scan.untracked.is_none(), "{:?}", scan.untracked);
        }
    }
    assert_eq!(thief.ask("caught"), "0", "descriptors were caught");
}

/// An exec waits until the other threads of its process are gone, and whoever seizes a thread waits for the exec.
#[test]
fn a_process_whose_threads_exec_all_the_time_neither_hangs_nor_holds_up_the_engine() {
    with_each(|kind| {
        let freezer = Freezer::new("execs");
        let process = Commanded::start_program(&freezer, Name::Thief, ["exec".as_ref()]);
        let round = || {
            let line = std::fs::read(format!("/proc/{}/cmdline", process.pid())).unwrap();
            let mut words = line
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty());
            let last = String::from_utf8(words.next_back().unwrap_or_default().to_vec()).unwrap();
            last.parse::<u64>().unwrap_or(0)
        };
        let mut tracker = opened(kind);
        tracker.set_container(&freezer.of_the_engine());
        let mut attached = 0;
        for _ in 0..200 {
            let scans = tracker.scan(&freezer.tasks(), Motion::Running).unwrap();
            attached += scans.iter().filter(|scan| scan.untracked.is_none()).count();
        }
        println!("{attached} of 200 scans found it attached to");
        let (before, until) = (round(), Instant::now() + patience());
        while round() <= before {
            assert!(Instant::now() < until, "it does not exec any more");
            std::thread::yield_now();
        }
    });
}

/// The figures of docs/kernels.md: cargo test --features measure --test tracker -- --nocapture measured
#[test]
#[cfg(feature = "measure")]
fn measured_standstill_of_an_attach() {
    for processes in [0, 10, 100, 1000] {
        let freezer = Freezer::new("standstill");
        let mut dirtier = Commanded::start(&freezer);
        if processes > 0 {
            dirtier.obey(&format!("fork {processes} 0"));
        }
        let mut stopped = Vec::new();
        for _ in 0..5 {
            let memories: Vec<Vec<i32>> = freezer
                .tasks()
                .into_iter()
                .map(|task| vec![task.pid])
                .collect();
            let container = freezer.of_the_engine();
            let everyone = move || threads_of_cgroup(container.path());
            let injected = inject::userfaultfds(memories, Box::new(everyone), patience()).unwrap();
            let made = injected.each.iter().filter(|made| made.is_ok()).count();
            stopped.push((injected.stopped, made));
        }
        stopped.sort();
        println!("{processes} + 1 processes: median {:?}", stopped[2]);
    }
}

#[test]
fn a_paused_container_is_taken_whole_and_stays_paused() {
    with_each(|kind| {
        let freezer = Freezer::new("paused");
        let mut dirtier = Commanded::start(&freezer);
        let mut tracker = opened(kind);
        tracker.set_container(&freezer.of_the_engine());
        freezer.freeze();
        let scans = tracker.scan(&freezer.tasks(), Motion::Running).unwrap();
        // Soft-dirty bits are read from outside, whether it runs or not.
        let needs_it_to_run = kind == TrackerKind::UffdWp;
        assert_eq!(scans[0].untracked.is_some(), needs_it_to_run);
        assert!(freezer.is_frozen());
        freezer.thaw();
        dirtier.obey("steps 10");
        let scans = tracker.scan(&freezer.tasks(), Motion::Running).unwrap();
        assert!(scans[0].untracked.is_none(), "{:?}", scans[0].untracked);
    });
}

#[test]
fn hugetlb_is_told_apart_and_left_to_criu() {
    with_each(|kind| {
        let freezer = Freezer::new("hugetlb");
        let mut dirtier = Commanded::start(&freezer);
        let answer = dirtier.ask("hugetlb 2 0");
        let Ok(start) = u64::from_str_radix(&answer, 16) else {
            panic!("this kernel maps no huge pages at all (CONFIG_HUGETLBFS): {answer}");
        };
        let touched = dirtier.ask("hugetlb 1 1");
        if touched == "none" {
            println!(
                "NOTE: no huge page is free (vm.nr_hugepages), so hugetlb was tested mapped but not touched"
            );
        }
        let mut tracker = opened(kind);
        for _ in 0..2 {
            let scan = tracker
                .scan(&freezer.tasks(), Motion::Running)
                .unwrap()
                .remove(0);
            let huge = VirtAddr(start).page();
            let vma = scan
                .vmas
                .iter()
                .find(|vma| vma.range.contains(huge))
                .unwrap();
            assert_eq!(vma.kind, VmaKind::Hugetlb);
            assert!(!is_tracked(vma));
            for vma in scan.vmas.iter().filter(|vma| vma.kind == VmaKind::Hugetlb) {
                assert!(scan.dirty.intersecting(vma.range).is_empty());
            }
        }
    });
}

#[test]
fn a_jailed_process_without_privileges_is_tracked_and_never_notices() {
    with_each(|kind| {
        let freezer = Freezer::new("jail");
        let mut dirtier = Commanded::start(&freezer);
        let block = dirtier.address("fill 4 0");
        dirtier.obey("jail");
        let descriptors = format!("/proc/{}/fd", dirtier.pid());
        let descriptors = || std::fs::read_dir(&descriptors).unwrap().count();
        let (open_before, mappings_before) = (descriptors(), dirtier.mappings());
        let mut mirror = Mirror::new(opened(kind));
        for index in 0..20 {
            let scans = mirror.round(&freezer, Motion::Running);
            assert!(scans[0].untracked.is_none(), "{:?}", scans[0].untracked);
            if index > 1 {
                assert_eq!(in_block(&scans[0].dirty, block, 1024).pages(), 3);
            }
            dirtier.obey(&format!("poke {} 3", index * 7));
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", dirtier.pid())).unwrap();
        assert!(status.contains("Seccomp:\t2") && status.contains("CapEff:\t0000000000000000"));
        assert_eq!(descriptors(), open_before, "nothing is left open in it");
        assert_eq!(
            dirtier.mappings(),
            mappings_before,
            "nothing is left mapped in it"
        );
        freezer.freeze();
        mirror.round(&freezer, Motion::Frozen);
        mirror.compare();
        freezer.thaw();
    });
}

#[test]
fn an_interrupted_sleep_and_sigsuspend_go_on_after_an_attach() {
    if !injects("an_interrupted_sleep_and_sigsuspend_go_on_after_an_attach") {
        return;
    }
    let freezer = Freezer::new("sleep");
    let mut dirtier = Commanded::start(&freezer);
    let milliseconds = u64::from(400 * slowness());
    dirtier.obey(&format!("nap {milliseconds}"));
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(20));
        attach(dirtier.pid(), patience()).unwrap();
    }
    let nap = dirtier.reply();
    let took: u64 = nap
        .strip_prefix("0 ")
        .unwrap_or_else(|| panic!("nanosleep failed: {nap}"))
        .parse()
        .unwrap();
    assert!(took >= milliseconds, "the sleep was cut to {took} ms");

    dirtier.obey("listen");
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(10));
        attach(dirtier.pid(), patience()).unwrap();
    }
    kill(Pid::from_raw(dirtier.pid()), Signal::SIGUSR1).unwrap();
    assert_eq!(
        dirtier.reply(),
        "1 1",
        "one signal caught in sigsuspend, blocked again after it"
    );
}

#[test]
fn no_signal_is_lost_while_a_process_is_attached_to() {
    if !injects("no_signal_is_lost_while_a_process_is_attached_to") {
        return;
    }
    let freezer = Freezer::new("signals");
    let mut dirtier = Commanded::start(&freezer);
    dirtier.obey("threads 1");
    dirtier.obey("count");
    let (mut attached, mut sent) = (0, 0);
    // One flood is over before there were enough attaches where making processes is slow.
    while attached < 20 {
        let count = 3000;
        let mut flood = Command::new(program(Name::Dirtier))
            .args(["flood", &dirtier.pid().to_string(), &count.to_string()])
            .spawn()
            .unwrap();
        while flood.try_wait().unwrap().is_none() {
            attach(dirtier.pid(), patience()).unwrap();
            attached += 1;
        }
        sent += count;
    }
    println!("attached {attached} times while {sent} signals arrived");
    assert_eq!(dirtier.ask("counted"), sent.to_string());
}

#[test]
fn a_stopped_process_can_be_attached_to_and_stays_stopped() {
    if !injects("a_stopped_process_can_be_attached_to_and_stays_stopped") {
        return;
    }
    let freezer = Freezer::new("stopped");
    let mut dirtier = Commanded::start(&freezer);
    let pid = Pid::from_raw(dirtier.pid());
    kill(pid, Signal::SIGSTOP).unwrap();
    for _ in 0..20 {
        attach(dirtier.pid(), patience()).unwrap();
    }
    dirtier.wait_for_state('T');
    kill(pid, Signal::SIGCONT).unwrap();
    dirtier.obey("steps 10");
    // Stop and continue while attaching: whatever the order, it obeys again after the last SIGCONT.
    for _ in 0..100 {
        kill(pid, Signal::SIGSTOP).unwrap();
        attach(dirtier.pid(), patience()).unwrap();
        kill(pid, Signal::SIGCONT).unwrap();
        attach(dirtier.pid(), patience()).unwrap();
    }
    dirtier.obey("steps 10");
}

#[test]
fn a_process_that_dies_while_it_is_attached_to_is_told_as_such() {
    if !injects("a_process_that_dies_while_it_is_attached_to_is_told_as_such") {
        return;
    }
    let (mut attached, mut died) = (0, 0);
    for index in 0..u64::MAX {
        // Ever later, until some were attached to.
        if index >= 300 && attached > 0 && died > 0 {
            break;
        }
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let killer = std::thread::spawn(move || {
            let until = Instant::now() + stretched(Duration::from_micros(index * 5));
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        });
        match attach(pid, patience()) {
            Ok(_) => attached += 1,
            Err(error) if error.exited() => died += 1,
            Err(error) => panic!("a dying process gave {error:?}"),
        }
        killer.join().unwrap();
        child.wait().unwrap();
    }
    println!("attached {attached} times before the death, {died} times not");
    assert!(attached > 0 && died > 0);
}

#[test]
fn a_process_whose_leader_has_exited_is_attached_to_through_another_thread() {
    if !injects("a_process_whose_leader_has_exited_is_attached_to_through_another_thread") {
        return;
    }
    let freezer = Freezer::new("headless");
    let mut dirtier = Commanded::start(&freezer);
    dirtier.obey("headless");
    dirtier.wait_for_state('Z');
    let made = attach(dirtier.pid(), patience()).unwrap();
    WriteTracker::new(made).unwrap();
    dirtier.obey("steps 10");
}

/// All trackers of the kernel follow the same program at the same time.
#[test]
fn every_page_a_program_knows_it_has_written_is_found_by_each_tracker() {
    let outcome = agreement::run(offered(), 30, 200);
    if let Some((first, second)) = outcome.reported_by_one {
        println!("{first} pages were reported by the first tracker alone, {second} by the second");
    }
    for agreement in &outcome.agreements {
        println!(
            "{agreement:#?}: {} pages over",
            agreement.over_reported.pages()
        );
        assert!(agreement.recorded_pages > 10_000, "{agreement:?}");
        assert_eq!(agreement.missed_pages, 0, "{agreement:#?}");
    }
}

/// Whoever scans takes from the other, so neither is asked for what another has.
#[test]
fn memory_that_another_userfaultfd_tracks_is_neither_armed_nor_consumed() {
    let name = "memory_that_another_userfaultfd_tracks_is_neither_armed_nor_consumed";
    if !injects(name) {
        return;
    }
    let freezer = Freezer::new("taken");
    let mut dirtier = Commanded::start(&freezer);
    let block = dirtier.address("fill 4 0");
    let mut first = opened(TrackerKind::UffdWp);
    let mut first_scan = |motion| first.scan(&freezer.tasks(), motion).unwrap().remove(0);
    first_scan(Motion::Running);
    dirtier.obey("poke 100 3");

    let pid = freezer.tasks()[0].pid;
    assert!(migrate::source::tracker::is_tracked_already(pid));
    let mut second = opened(TrackerKind::UffdWp);
    for _ in 0..2 {
        let scanned = second.scan(&freezer.tasks(), Motion::Running);
        let refused = scanned.expect_err("it took what another tracks");
        assert!(
            refused.to_string().contains("another userfaultfd"),
            "{refused}"
        );
    }
    let written: PageSet = [block_pages(block, 100, 3)].into_iter().collect();
    let scan = first_scan(Motion::Running);
    assert_eq!(
        in_block(&scan.dirty, block, 1024),
        written,
        "what the first tracker waited for was taken from it"
    );

    // The other way round: new memory that another registers meanwhile ends the first one's rounds.
    drop(second);
    let other = WriteTracker::new(attach(dirtier.pid(), patience()).unwrap()).unwrap();
    let new = dirtier.address("fill 4 0");
    other.register(block_pages(new, 0, 1024)).unwrap();
    freezer.freeze();
    let ended = first.scan(&freezer.tasks(), Motion::Frozen);
    assert!(ended.is_err(), "it took what another tracks");
    freezer.thaw();
}

//! The pager against real userfaultfds: a task that hands its memory over as CRIU does, and every way in which the
//! processes around it die. Needs root and a C compiler; fails without them.

mod owed;

use migrate::criu::lazy_pages::SOCKET_NAME;
use migrate::memory::{PAGE_SIZE, PageNumber, PageRange, SpaceId};
use migrate::target::page_store::{PageRun, PageStore, PageStoreLimits, RunContent};
use migrate::target::pager::{FillSummary, PagerEvent, PagerHandle, PagerHandleError, TaskMemory};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const BASE: u64 = 0x1000_0000_0000;

/// A migration up to the point where CRIU is about to restore: directories, the store and a listening pager.
struct Scene {
    directory: tempfile::TempDir,
    store: Arc<PageStore>,
    pager: PagerHandle,
    criu: UnixStream,
    tasks: Vec<Task>,
}

struct Task {
    vpid: i32,
    pages: u64,
    process: Child,
    commands: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Scene {
    fn new() -> Scene {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_migrate"));
        command.arg("pager");
        let work = directory.path().join("work");
        std::fs::create_dir(&work).expect("CRIU's work directory");
        let pager = PagerHandle::spawn(command, &work, directory.path(), PATIENCE)
            .expect("a listening pager");
        let criu = UnixStream::connect(work.join(SOCKET_NAME)).expect("CRIU connects");
        let store = Arc::new(PageStore::new(PageStoreLimits {
            spaces: 64,
            bytes: 8 << 30,
        }));
        Scene {
            directory,
            store,
            pager,
            criu,
            tasks: Vec::new(),
        }
    }

    /// One task of `pages` pages, registered, served and armed; the restore is not finished yet.
    fn armed(pages: u64) -> Scene {
        let mut scene = Scene::new();
        scene.receive_memory(1, pages);
        scene.restore_task(1, pages, 0);
        scene.serve();
        scene.pager.wait_armed(PATIENCE).expect("armed");
        scene
    }

    /// Places the memory of a task in the store, as if it had come from the source.
    fn receive_memory(&self, vpid: i32, pages: u64) {
        let first = PageNumber(BASE / PAGE_SIZE);
        let all = PageRange::from_start_len(first, pages).expect("valid");
        for chunk in all.chunks(256) {
            let (mut runs, mut payload) = (Vec::new(), Vec::new());
            for page in chunk.chunks(1) {
                let content = page_content(page.start().0 - first.0, pages);
                let zero = content.iter().all(|&byte| byte == 0);
                runs.push(PageRun {
                    pages: page,
                    content: if zero {
                        RunContent::Zero
                    } else {
                        RunContent::Data
                    },
                });
                if !zero {
                    payload.extend_from_slice(&content);
                }
            }
            self.store
                .place(SpaceId(vpid as u32), &runs, &payload)
                .expect("placed");
        }
    }

    fn restore_task(&mut self, vpid: i32, pages: u64, delay_ms: u64) {
        let (commands, theirs) = UnixStream::pair().expect("a socket pair");
        let criu = self.criu.try_clone().expect("CRIU's connection");
        let process = Command::new(task_program())
            .args([vpid.to_string(), format!("{BASE:x}"), pages.to_string()])
            .arg(delay_ms.to_string())
            .stdin(Stdio::from(OwnedFd::from(criu)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .expect("a task");
        let answers = BufReader::new(commands.try_clone().expect("a clone"));
        commands
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout");
        let mut task = Task {
            vpid,
            pages,
            process,
            commands,
            answers,
        };
        assert_eq!(task.answer(), "registered");
        self.tasks.push(task);
    }

    fn memory_of(&self, vpid: i32, pages: u64) -> TaskMemory {
        let lazy = PageRange::from_start_len(PageNumber(BASE / PAGE_SIZE), pages).expect("valid");
        TaskMemory {
            vpid,
            memfd: self.store.memfd(SpaceId(vpid as u32)).expect("a memfd"),
            lazy: vec![lazy],
            hot: Vec::new(),
            owed: None,
        }
    }

    fn serve(&mut self) {
        let memory = self
            .tasks
            .iter()
            .map(|task| self.memory_of(task.vpid, task.pages))
            .collect();
        self.pager
            .serve(memory, &[], PATIENCE)
            .expect("the pager serves");
    }

    /// CRIU has restored and registered everything.
    fn finish_restore(&self) {
        (&self.criu)
            .write_all(&0x5253_5446u32.to_ne_bytes())
            .expect("the end marker");
    }

    fn release(&mut self) {
        self.pager.release(PATIENCE).expect("released");
        self.finish_restore();
    }

    fn task(&mut self) -> &mut Task {
        &mut self.tasks[0]
    }

    fn done(&mut self) -> FillSummary {
        self.pager.wait_done(PATIENCE).expect("done")
    }

    fn pager_pid(&self) -> i32 {
        self.pager.pid().expect("a pager") as i32
    }

    fn standby_pid(&self) -> i32 {
        child_of(self.pager_pid())
    }
}

impl Task {
    fn tell(&mut self, command: &str) -> String {
        self.say(command);
        self.answer()
    }

    fn say(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("the task listens");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the task answers");
        line.trim_end().to_owned()
    }

    fn check_everything(&mut self) {
        let pages = self.pages;
        assert_eq!(self.tell(&format!("check 0 {pages} 0")), "ok");
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What task.c expects at `page` of `pages`.
fn page_content(page: u64, pages: u64) -> Vec<u8> {
    if page % 7 == 3 || page >= pages - pages / 8 {
        return vec![0; PAGE_SIZE as usize];
    }
    (0..PAGE_SIZE / 8)
        .flat_map(|i| {
            let word = page
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(i.wrapping_mul(0xbf58_476d_1ce4_e5b9));
            (word | 1).to_ne_bytes()
        })
        .collect()
}

fn data_pages(pages: u64) -> u64 {
    (0..pages - pages / 8).filter(|page| page % 7 != 3).count() as u64
}

fn task_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("pager-task-{}", std::process::id()));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pager_task/task.c");
        let status = Command::new("cc")
            .args(["-O2", "-Wall", "-o"])
            .arg(&program)
            .arg(source)
            .status()
            .expect("a C compiler");
        assert!(status.success());
        program
    })
}

fn child_of(parent: i32) -> i32 {
    let children = std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            after_name.split(' ').nth(1) == Some(&parent.to_string())
        });
    let children: Vec<i32> = children.collect();
    assert_eq!(children.len(), 1, "one child of {parent}");
    children[0]
}

fn kill(pid: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("killed");
}

/// Waits until `pid` is gone or only a zombie.
fn assert_ends(pid: i32) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        assert!(Instant::now() < deadline, "process {pid} did not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[test]
fn every_byte_arrives_and_the_store_gives_its_memory_back() {
    let pages = 131_072;
    let mut scene = Scene::armed(pages);
    let standby = scene.standby_pid();
    scene.release();
    let summary = scene.done();
    assert_eq!(summary.pages, data_pages(pages));
    assert_eq!(summary.unregistered, 0);
    scene.task().check_everything();
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
    assert_ends(scene.pager_pid());
    assert_ends(standby);
    println!(
        "fill: {} MiB in {} ms: {:.2} GB/s",
        summary.pages / 256,
        summary.micros / 1000,
        (summary.pages * PAGE_SIZE) as f64 / summary.micros as f64 / 1000.0
    );
}

#[test]
fn faults_are_answered_while_the_fill_goes_on() {
    let pages = 131_072;
    let mut scene = Scene::armed(pages);
    scene.release();
    let answer = scene.task().tell("latency 3000 12345");
    scene.task().check_everything();
    let summary = scene.done();
    println!(
        "faults, p50, p99, longest (ns): {answer}; {} answered",
        summary.faults
    );
    assert!(answer.starts_with("latency "), "{answer}");
    assert!(summary.faults > 0);
}

#[test]
fn registration_may_come_long_after_the_userfaultfd() {
    let pages = 4096;
    let mut scene = Scene::new();
    scene.receive_memory(5, pages);
    let memory = scene.memory_of(5, pages);
    scene
        .pager
        .serve(vec![memory], &[], PATIENCE)
        .expect("serving before CRIU comes");
    scene.restore_task(5, pages, 40);
    scene.pager.wait_armed(PATIENCE).expect("armed");
    scene.release();
    scene.task().check_everything();
    let summary = scene.done();
    assert_eq!(summary.unregistered, 0);
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn several_tasks_and_a_zombie_share_the_connection() {
    let mut scene = Scene::new();
    for vpid in 1..=5 {
        scene.receive_memory(vpid, 2048 * vpid as u64);
        scene.restore_task(vpid, 2048 * vpid as u64, 1);
        (&scene.criu)
            .write_all(&(-100 - vpid).to_ne_bytes())
            .expect("a zombie");
    }
    scene.serve();
    assert_eq!(scene.pager.wait_armed(PATIENCE).expect("armed"), 5);
    scene.release();
    for task in &mut scene.tasks {
        task.check_everything();
    }
    assert_eq!(scene.done().tasks, 5);
}

#[test]
fn pages_outside_the_lazy_set_are_zero_whatever_the_store_holds() {
    let pages = 1024;
    let mut scene = Scene::new();
    scene.receive_memory(1, pages);
    scene.restore_task(1, pages, 0);
    let mut memory = scene.memory_of(1, pages);
    let first = BASE / PAGE_SIZE;
    memory.lazy = vec![
        PageRange::from_start_len(PageNumber(first), 100).expect("valid"),
        PageRange::from_start_len(PageNumber(first + 200), 100).expect("valid"),
    ];
    scene
        .pager
        .serve(vec![memory], &[], PATIENCE)
        .expect("serving");
    scene.pager.wait_armed(PATIENCE).expect("armed");
    scene.release();
    for command in [
        "check 0 100 0",
        "check 100 100 -1",
        "check 200 100 200",
        "check 300 724 -1",
    ] {
        assert_eq!(scene.task().tell(command), "ok", "{command}");
    }
    scene.done();
}

#[test]
fn thrown_away_moved_and_unmapped_pages_follow_the_process() {
    let pages = 65_536;
    let mut scene = Scene::armed(pages);
    scene.release();
    let task = scene.task();
    // At the far end, where the fill has not been.
    assert_eq!(task.tell("dontneed 50000 300"), "ok");
    assert_eq!(task.tell("remap 51000 500 40000"), "ok");
    assert_eq!(task.tell("unmap 52000 100"), "ok");
    assert_eq!(task.tell("remap 40100 100 52000"), "ok");
    for command in [
        "check 50000 300 -1",
        "check 40000 100 51000",
        "check 52000 100 51100",
        "check 40200 300 51200",
        "check 0 40000 0",
        "check 40500 9500 40500",
        "check 52100 13436 52100",
    ] {
        assert_eq!(task.tell(command), "ok", "{command}");
    }
    scene.done();
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn a_child_gets_the_pages_its_parent_threw_away_after_the_fork() {
    let pages = 65_536;
    let mut scene = Scene::armed(pages);
    scene.release();
    let task = scene.task();
    for from in [50_000, 51_000, 30_000, 5] {
        assert_eq!(task.tell(&format!("forkdrop {from} 400")), "ok");
    }
    assert_eq!(task.tell("check 52000 4000 52000"), "ok");
    let PagerEvent::Filled(fill) = wait_filled(&mut scene.pager) else {
        unreachable!("wait_filled returns Filled")
    };
    assert!(fill.spaces > 1, "{fill:?}");
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

fn wait_filled(pager: &mut PagerHandle) -> PagerEvent {
    loop {
        let event = pager
            .next_event(PATIENCE)
            .expect("an event")
            .expect("in time");
        if matches!(event, PagerEvent::Filled(_)) {
            return event;
        }
    }
}

#[test]
fn random_changes_during_the_fill_never_show_a_wrong_byte() {
    for seed in 1..=6 {
        let mut scene = Scene::armed(16_384);
        scene.release();
        assert_eq!(
            scene.task().tell(&format!("stress 3000 {seed}")),
            "ok",
            "seed {seed}"
        );
        scene.done();
        assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
    }
}

/// UFFDIO_COPY finds no mapping, or another one's page, between a change and the reading of its event.
#[test]
fn whole_mappings_on_the_move_lose_and_mix_up_nothing() {
    for seed in 1..=4 {
        let mut scene = Scene::armed(32_768);
        scene.release();
        let answer = scene.task().tell(&format!("shuffle 8000 {seed}"));
        assert_eq!(answer, "ok", "seed {seed}");
        let summary = scene.done();
        assert_eq!(summary.unregistered, 0, "seed {seed}");
        assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
    }
}

#[test]
fn pages_that_have_no_place_are_an_error_that_is_counted() {
    let (pages, nowhere) = (1024, 5);
    let mut scene = Scene::new();
    // The source knows more pages than the task has here.
    scene.receive_memory(1, (pages + nowhere) * 2);
    scene.restore_task(1, pages, 0);
    let memory = scene.memory_of(1, pages + nowhere);
    let served = scene.pager.serve(vec![memory], &[], PATIENCE);
    served.expect("the pager serves");
    scene.pager.wait_armed(PATIENCE).expect("armed");
    scene.release();
    let summary = scene.done();
    let data = (pages..pages + nowhere).filter(|page| page % 7 != 3);
    assert_eq!(summary.unregistered, data.count() as u64);
    assert!(!summary.is_whole());
}

#[test]
fn a_mapping_that_a_child_has_no_copy_of_is_no_loss() {
    let mut scene = Scene::armed(65_536);
    scene.release();
    assert_eq!(scene.task().tell("forkwithout 50000 2000"), "ok");
    scene.task().check_everything();
    let summary = scene.done();
    assert!(summary.is_whole(), "{summary:?}");
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn a_pager_killed_midway_is_replaced_by_its_standby() {
    for wait_ms in [0, 5, 20, 60] {
        let pages = 131_072;
        let mut scene = Scene::armed(pages);
        let (pager, standby) = (scene.pager_pid(), scene.standby_pid());
        scene.pager.release(PATIENCE).expect("released");
        std::thread::sleep(Duration::from_millis(wait_ms));
        kill(pager);
        scene.finish_restore();
        scene.task().check_everything();
        let summary = scene.done();
        println!(
            "killed after {wait_ms} ms: the standby copied {} of {} pages",
            summary.pages,
            data_pages(pages)
        );
        assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
        assert_ends(standby);
        assert!(!scene.directory.path().join("pager-death.json").exists());
    }
}

#[test]
fn a_standby_follows_changes_made_before_the_pager_died() {
    let pages = 131_072;
    let mut scene = Scene::armed(pages);
    let pager = scene.pager_pid();
    scene.release();
    let task = scene.task();
    assert_eq!(task.tell("dontneed 110000 300"), "ok");
    assert_eq!(task.tell("remap 111000 500 90000"), "ok");
    // This page is zero, so only a fault brings it; the answer shows that all events before it were dealt with. (Killed
    // while it reads them, the pager would leave a container to be killed, which is another test.)
    assert_eq!(task.tell("check 130000 1 130000"), "ok");
    kill(pager);
    for command in [
        "check 110000 300 -1",
        "check 90000 500 111000",
        "check 0 90000 0",
        "check 90500 19500 90500",
    ] {
        assert_eq!(scene.task().tell(command), "ok", "{command}");
    }
    scene.done();
}

#[test]
fn a_pager_killed_among_events_leaves_the_right_bytes_or_no_container() {
    for seed in 1..=8u64 {
        let cgroup = Cgroup::new(&format!("events-{seed}"));
        let mut scene = Scene::new();
        scene.receive_memory(1, 32_768);
        scene.restore_task(1, 32_768, 0);
        cgroup.take_in(&scene.task().process);
        let memory = scene.memory_of(1, 32_768);
        scene
            .pager
            .serve(vec![memory], std::slice::from_ref(&cgroup.0), PATIENCE)
            .expect("serving");
        scene.pager.wait_armed(PATIENCE).expect("armed");
        let (pager, standby) = (scene.pager_pid(), scene.standby_pid());
        scene.release();
        scene.task().say(&format!("stress 4000 {seed}"));
        std::thread::sleep(Duration::from_millis(seed * 3));
        kill(pager);
        // The task's own model of its memory decides. If events were lost it is killed; only a child whose userfaultfd was
        // lost with the fork may have looked before that.
        let answer = scene.task().answer();
        assert_ends(standby);
        let killed = scene.directory.path().join("pager-death.json").exists();
        println!("seed {seed}: {answer:?}, events lost: {killed}");
        if killed {
            assert!(
                ["", "wrong in a child"].contains(&&*answer),
                "seed {seed}: {answer}"
            );
        } else {
            assert_eq!(answer, "ok", "seed {seed}");
        }
    }
}

/// A cgroup of its own, wherever this host keeps them.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Cgroup {
        let name = format!("migrate-pager-test-{}-{name}", std::process::id());
        let made = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup"]
            .map(|root| Path::new(root).join(&name))
            .into_iter()
            .find(|path| std::fs::create_dir(path).is_ok());
        Cgroup(made.expect("root may make a cgroup"))
    }

    /// Whether every process in it stands still, by either version's freezer.
    fn is_frozen(&self) -> bool {
        let read = |file| std::fs::read_to_string(self.0.join(file)).unwrap_or_default();
        read("freezer.state").trim() == "FROZEN" || read("cgroup.events").contains("frozen 1")
    }

    fn take_in(&self, process: &Child) {
        std::fs::write(self.0.join("cgroup.procs"), process.id().to_string())
            .expect("the process moves into the cgroup");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Empty only when its last process has been waited for.
        let deadline = Instant::now() + PATIENCE;
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn an_agent_that_dies_before_release_takes_everything_with_it() {
    let scene = Scene::armed(16_384);
    let (pager, standby) = (scene.pager_pid(), scene.standby_pid());
    let Scene { pager: handle, .. } = scene;
    drop(handle);
    assert_ends(pager);
    assert_ends(standby);
}

#[test]
fn an_agent_that_dies_after_release_is_not_missed() {
    let pages = 65_536;
    let mut scene = Scene::armed(pages);
    let (pager, standby) = (scene.pager_pid(), scene.standby_pid());
    scene.pager.release(PATIENCE).expect("released");
    let Scene {
        pager: handle,
        criu,
        mut tasks,
        store,
        ..
    } = scene;
    drop(handle);
    std::thread::sleep(Duration::from_millis(20));
    assert!(alive(pager) && alive(standby));
    (&criu)
        .write_all(&0x5253_5446u32.to_ne_bytes())
        .expect("the end marker");
    tasks[0].check_everything();
    assert_ends(pager);
    assert_ends(standby);
    assert_eq!(store.memory_in_use().expect("measured"), 0);
}

#[test]
fn without_a_standby_nothing_is_released_and_after_release_it_is_only_reported() {
    let mut scene = Scene::armed(1024);
    kill(scene.standby_pid());
    assert!(matches!(
        scene.pager.release(PATIENCE),
        Err(PagerHandleError::Failed { .. }
            | PagerHandleError::Gone
            | PagerHandleError::Channel(_))
    ));

    let mut scene = Scene::armed(65_536);
    scene.pager.release(PATIENCE).expect("released");
    let standby = scene.standby_pid();
    kill(standby);
    // Only a death that comes before the end of the service has to be reported.
    assert_ends(standby);
    scene.finish_restore();
    scene.task().check_everything();
    let mut lost = false;
    while let Some(event) = scene.pager.next_event(PATIENCE).expect("an event") {
        match event {
            PagerEvent::StandbyLost => lost = true,
            PagerEvent::Done(_) => break,
            _ => {}
        }
    }
    assert!(lost);
}

#[test]
fn a_task_that_is_killed_ends_the_service() {
    let mut scene = Scene::armed(131_072);
    scene.pager.release(PATIENCE).expect("released");
    scene.tasks.clear();
    scene.finish_restore();
    scene.done();
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn a_restore_that_fails_before_release_is_reported() {
    let mut scene = Scene::armed(1024);
    scene.tasks.clear();
    let Scene {
        criu, mut pager, ..
    } = scene;
    drop(criu);
    let failed = pager.wait_done(PATIENCE);
    assert!(
        matches!(&failed, Err(PagerHandleError::Failed { reason }) if reason.contains("restore")),
        "{failed:?}"
    );
}

#[test]
fn a_task_nobody_named_is_refused() {
    let mut scene = Scene::new();
    scene.receive_memory(1, 64);
    scene.receive_memory(2, 64);
    scene.restore_task(1, 64, 0);
    let other = scene.memory_of(2, 64);
    let refused = scene
        .pager
        .serve(vec![other], &[], PATIENCE)
        .and_then(|()| scene.pager.wait_armed(PATIENCE).map(|_| ()));
    assert!(
        matches!(&refused, Err(PagerHandleError::Failed { reason }) if reason.contains("task 1")),
        "{refused:?}"
    );
}

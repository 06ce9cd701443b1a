//! Pages that come after the container runs: the test is the agent, and brings them when it is asked, unasked, or not at all.

use super::*;
use migrate::target::arrivals::Arrivals;
use migrate::target::pager::{
    Adopted, Heard, OwedMemory, STALL_RECORD, SUPPLY_SOCKET, SupplyLine, SupplyMessage, adopt,
};
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

const FIRST: u64 = BASE / PAGE_SIZE;

/// Pages `from` on of a task, by their numbers in the store.
fn pages(from: u64, pages: u64) -> PageRange {
    PageRange::from_start_len(PageNumber(FIRST + from), pages).expect("valid")
}

/// What an agent knows of a task.
struct Ledger {
    vpid: i32,
    pages: u64,
    owed: Vec<PageRange>,
    arrivals: Arrivals,
}

impl Ledger {
    /// The same task, with the records that an adopted pager handed over.
    fn adopted(&self, owed: &OwedMemory) -> Ledger {
        Ledger {
            owed: owed.pages.clone(),
            arrivals: owed.arrivals.try_clone().expect("cloned"),
            ..*self
        }
    }
}

/// One end of the supply line and all that is needed to bring pages.
struct Bringer {
    store: Arc<PageStore>,
    ledgers: Vec<Ledger>,
    line: SupplyLine,
}

impl Bringer {
    /// The next request; `None` if none comes in time or the line has ended.
    fn next_want(&self, timeout: Duration) -> Option<(i32, PageRange)> {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            match self.line.receive().expect("a sound line") {
                Heard::Message(SupplyMessage::Want { vpid, pages }) => return Some((vpid, pages)),
                Heard::Message(other) => panic!("the pager says {other:?}"),
                Heard::Nothing => self.listen(),
                Heard::End => return None,
            }
        }
        None
    }

    /// Waits a moment for a message.
    fn listen(&self) {
        let moment = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        let line = rustix::event::PollFd::new(&self.line, rustix::event::PollFlags::IN);
        // Interrupted or not, the caller looks again.
        let _ = rustix::event::poll(&mut [line], Some(&moment));
    }

    /// Places the contents and puts them on record.
    fn place(&self, vpid: i32, range: PageRange) {
        let ledger = self.ledger(vpid);
        for page in range.chunks(1) {
            if !ledger.arrivals.among(page).expect("read").is_empty() {
                continue;
            }
            place_page(&self.store, vpid, page, ledger.pages);
            ledger.arrivals.mark(page).expect("marked");
        }
    }

    fn say_came(&self, vpid: i32, pages: PageRange) {
        // The pager may be done, if the task has no use for the page any more.
        while let Ok(false) = self.line.send(SupplyMessage::Came { vpid, pages }) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn bring(&self, vpid: i32, pages: PageRange) {
        self.place(vpid, pages);
        self.say_came(vpid, pages);
    }

    fn ledger(&self, vpid: i32) -> &Ledger {
        let ledger = self.ledgers.iter().find(|ledger| ledger.vpid == vpid);
        ledger.expect("a task that is owed pages")
    }

    /// Brings what is asked for, and unasked a few pages at a time if `push`, until it is stopped or the pager is done.
    fn work(self, push: bool) -> Working {
        self.work_with(push, Duration::ZERO)
    }

    /// [`Bringer::work`] as over a link: the changes of an address space are many, compared with what comes unasked.
    fn work_slowly(self) -> Working {
        self.work_with(true, Duration::from_millis(1))
    }

    fn work_with(self, push: bool, pause: Duration) -> Working {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut wants = Vec::new();
            let mut unasked: Vec<(i32, PageRange)> = Vec::new();
            for ledger in self.ledgers.iter().filter(|_| push) {
                let parts = ledger.owed.iter().flat_map(|run| run.chunks(24));
                unasked.extend(parts.map(|part| (ledger.vpid, part)));
            }
            // From the far end, so that it meets the faults of a scan in the middle.
            while !stopped.load(Ordering::Relaxed) {
                match self.line.receive() {
                    Ok(Heard::Message(SupplyMessage::Want { vpid, pages })) => {
                        wants.push((vpid, pages));
                        self.bring(vpid, pages);
                    }
                    Ok(Heard::Nothing) => match unasked.pop() {
                        Some((vpid, pages)) => {
                            self.bring(vpid, pages);
                            std::thread::sleep(pause);
                        }
                        None => self.listen(),
                    },
                    _ => break,
                }
            }
            (self, wants)
        });
        Working { stop, thread }
    }
}

struct Working {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Bringer, Vec<(i32, PageRange)>)>,
}

impl Working {
    /// Stops it; says what was asked for.
    fn stop(self) -> (Bringer, Vec<(i32, PageRange)>) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic")
    }
}

fn place_page(store: &PageStore, vpid: i32, page: PageRange, pages: u64) {
    let content = page_content(page.start().0 - FIRST, pages);
    let zero = content.iter().all(|&byte| byte == 0);
    let run = PageRun {
        pages: page,
        content: if zero {
            RunContent::Zero
        } else {
            RunContent::Data
        },
    };
    let payload = if zero { &[][..] } else { &content };
    store
        .place(SpaceId(vpid as u32), &[run], payload)
        .expect("placed");
}

/// Tasks of so many pages, released, with `owed` of each still at the source. In the store lies another content there, as an
/// older copy would.
fn owing(
    tasks: &[u64],
    owed: impl Fn(u64) -> Vec<PageRange>,
    prepare: impl Fn(&mut Scene) -> Vec<PathBuf>,
) -> (Scene, Bringer) {
    let mut scene = Scene::new();
    let cgroups = prepare(&mut scene);
    let (mut memories, mut ledgers) = (Vec::new(), Vec::new());
    for (vpid, &count) in (1..).zip(tasks) {
        scene.receive_memory(vpid, count);
        let arrivals = Arrivals::new().expect("a record");
        let owed = owed(count);
        let stale = vec![0xee; PAGE_SIZE as usize];
        for page in owed.iter().flat_map(|run| run.chunks(1)) {
            let run = PageRun {
                pages: page,
                content: RunContent::Data,
            };
            scene
                .store
                .place(SpaceId(vpid as u32), &[run], &stale)
                .expect("placed");
        }
        scene.restore_task(vpid, count, 0);
        let mut memory = scene.memory_of(vpid, count);
        memory.owed = Some(OwedMemory {
            pages: owed.clone(),
            arrivals: arrivals.try_clone().expect("cloned"),
        });
        memories.push(memory);
        ledgers.push(Ledger {
            vpid,
            pages: count,
            owed,
            arrivals,
        });
    }
    let served = scene.pager.serve(memories, &cgroups, PATIENCE);
    served.expect("the pager serves");
    let line = scene.pager.supply().expect("a supply line");
    scene.pager.wait_armed(PATIENCE).expect("armed");
    scene.release();
    let bringer = Bringer {
        store: scene.store.clone(),
        ledgers,
        line,
    };
    (scene, bringer)
}

fn all_of(pages_of_task: u64) -> Vec<PageRange> {
    vec![pages(0, pages_of_task)]
}

fn nothing(_: &mut Scene) -> Vec<PathBuf> {
    Vec::new()
}

impl Task {
    /// Whether an answer is there or comes within `timeout`.
    fn answers_within(&mut self, timeout: Duration) -> bool {
        self.commands
            .set_read_timeout(Some(timeout))
            .expect("a timeout");
        let there = self.answers.fill_buf().is_ok();
        self.commands
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout");
        there
    }
}

/// Clock ticks a process has computed.
fn ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("alive");
    let (_, rest) = stat.rsplit_once(") ").expect("a stat line");
    let fields: Vec<u64> = rest.split(' ').map(|f| f.parse().unwrap_or(0)).collect();
    fields[11] + fields[12]
}

/// What share of a processor a process computes `meanwhile`. Waiting costs a few per cent, a busy loop all it can get; how much
/// that is, and how long it takes, depends on the host.
fn share_computed(pid: i32, meanwhile: impl FnOnce()) -> f64 {
    const TICKS_A_SECOND: f64 = 100.0;
    let (before, start) = (ticks(pid), Instant::now());
    meanwhile();
    let computed = (ticks(pid) - before) as f64 / TICKS_A_SECOND;
    computed / start.elapsed().as_secs_f64()
}

fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_fault_on_an_owed_page_waits_for_it_and_for_nothing_else() {
    let owed = |count| vec![pages(100, 400), pages(count - 50, 50)];
    let (mut scene, bringer) = owing(&[4096], owed, nothing);
    // What is not owed is there, whatever happens to the rest.
    assert_eq!(scene.task().tell("check 0 100 0"), "ok");
    assert_eq!(scene.task().tell("check 500 3546 500"), "ok");
    scene.task().say("check 120 1 120");
    let (vpid, wanted) = bringer.next_want(PATIENCE).expect("a request");
    assert_eq!((vpid, wanted), (1, pages(120, 4)));
    let share = share_computed(scene.pager_pid(), || {
        assert!(!scene.task().answers_within(Duration::from_millis(500)));
    });
    println!("{share:.2} of a processor spent on waiting");
    assert!(share < 0.4, "{share:.2} of a processor spent on waiting");
    // Only the record counts.
    bringer.say_came(1, wanted);
    assert!(!scene.task().answers_within(Duration::from_millis(50)));
    bringer.bring(1, wanted);
    assert_eq!(scene.task().answer(), "ok");
    // What came by itself is no reason to ask.
    bringer.bring(1, pages(130, 370));
    assert_eq!(scene.task().tell("check 130 370 130"), "ok");
    assert_eq!(bringer.next_want(Duration::from_millis(20)), None);
    // On record without a word: found at the fault.
    bringer.place(1, pages(110, 3));
    assert_eq!(scene.task().tell("check 110 3 110"), "ok");
    assert_eq!(bringer.next_want(Duration::from_millis(20)), None);
    let working = bringer.work(true);
    scene.task().check_everything();
    scene.done();
    working.stop();
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn a_scan_asks_for_more_and_more_and_random_faults_for_few() {
    let (mut scene, bringer) = owing(&[8192], all_of, nothing);
    let working = bringer.work(false);
    assert_eq!(scene.task().tell("check 0 188 0"), "ok");
    for page in [7000, 1000, 5000, 3000, 6000, 2000] {
        assert_eq!(scene.task().tell(&format!("check {page} 1 {page}")), "ok");
    }
    let (bringer, wants) = working.stop();
    let asked: Vec<(u64, u64)> = wants
        .iter()
        .map(|(_, run)| (run.start().0 - FIRST, run.pages()))
        .collect();
    let scan = [(0, 4), (4, 8), (12, 16), (28, 32), (60, 64), (124, 64)];
    assert_eq!(asked[..6], scan);
    let random = [7000, 1000, 5000, 3000, 6000, 2000].map(|page| (page, 4));
    assert_eq!(asked[6..], random);
    let working = bringer.work(true);
    scene.done();
    working.stop();
    scene.task().check_everything();
}

#[test]
fn pushed_pages_get_to_their_places_in_several_tasks_without_a_fault() {
    let (mut scene, bringer) = owing(&[1024, 2048, 3072], all_of, nothing);
    for (vpid, count) in [(3, 3072), (1, 1024), (2, 2048)] {
        for part in pages(0, count).chunks(200) {
            bringer.bring(vpid, part);
        }
    }
    let summary = scene.done();
    assert_eq!(summary.tasks, 3);
    assert_eq!(summary.faults, 0);
    assert_eq!(
        summary.pages,
        data_pages(1024) + data_pages(2048) + data_pages(3072)
    );
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
    for task in &mut scene.tasks {
        task.check_everything();
    }
}

#[test]
fn owed_pages_follow_the_process_wherever_it_moves_them() {
    for push in [false, true] {
        let (mut scene, bringer) = owing(&[16_384, 4096], all_of, nothing);
        let working = bringer.work(push);
        let task = scene.task();
        assert_eq!(task.tell("dontneed 10000 300"), "ok");
        assert_eq!(task.tell("remap 11000 500 4000"), "ok");
        assert_eq!(task.tell("unmap 12000 100"), "ok");
        assert_eq!(task.tell("remap 4100 100 12000"), "ok");
        for command in [
            "check 10000 300 -1",
            "check 4000 100 11000",
            "check 12000 100 11100",
            "check 4200 300 11200",
            "check 0 4000 0",
            "check 4500 5500 4500",
            "check 12100 4284 12100",
        ] {
            assert_eq!(task.tell(command), "ok", "{command}");
        }
        scene.tasks[1].check_everything();
        let (bringer, wants) = working.stop();
        if !push {
            // A page that was thrown away or unmapped is asked for by nobody.
            let dropped = [pages(10_000, 300), pages(12_000, 100), pages(4000, 500)];
            for (_, run) in wants.iter().filter(|(vpid, _)| *vpid == 1) {
                let hit = dropped
                    .iter()
                    .any(|range| range.intersection(*run).is_some());
                assert!(!hit, "{run:?}");
            }
        }
        let working = bringer.work(true);
        scene.done();
        working.stop();
    }
}

#[test]
fn random_changes_while_pages_are_owed_never_show_a_wrong_byte() {
    for seed in 1..=6 {
        let (mut scene, bringer) = owing(&[8192], all_of, nothing);
        let working = bringer.work(seed % 2 == 0);
        let answer = scene.task().tell(&format!("stress 2000 {seed}"));
        assert_eq!(answer, "ok", "seed {seed}");
        let (bringer, _) = working.stop();
        let working = bringer.work(true);
        scene.done();
        working.stop();
    }
}

#[test]
fn parent_and_child_share_what_comes_and_it_comes_once() {
    let (mut scene, bringer) = owing(&[8192], all_of, nothing);
    let working = bringer.work(false);
    assert_eq!(scene.task().tell("forkboth 1000 500"), "ok");
    assert_eq!(scene.task().tell("forkdrop 3000 400"), "ok");
    assert_eq!(scene.task().tell("forkboth 5000 300"), "ok");
    let (bringer, wants) = working.stop();
    let mut asked = BTreeSet::new();
    for page in wants.iter().flat_map(|(_, run)| run.chunks(1)) {
        assert!(asked.insert(page.start()), "{page:?} twice");
    }
    let working = bringer.work(true);
    let PagerEvent::Filled(fill) = wait_filled(&mut scene.pager) else {
        unreachable!("wait_filled returns Filled")
    };
    assert_eq!(fill.spaces, 4, "{fill:?}");
    scene.done();
    working.stop();
    assert_eq!(scene.task().tell("check 0 3000 0"), "ok");
    assert_eq!(scene.task().tell("check 3400 4792 3400"), "ok");
}

#[test]
fn more_requests_than_the_line_holds_are_kept_and_sent() {
    let (mut scene, bringer) = owing(&[32_768], all_of, nothing);
    scene.task().say("forkmany 400 64");
    assert!(!scene.task().answers_within(Duration::from_millis(1000)));
    let working = bringer.work(false);
    assert_eq!(scene.task().answer(), "ok");
    let (bringer, wants) = working.stop();
    assert_eq!(wants.len(), 400);
    let working = bringer.work(true);
    scene.done();
    working.stop();
    scene.task().check_everything();
}

#[test]
fn what_comes_and_nobody_wants_any_more_is_freed() {
    let (mut scene, bringer) = owing(&[2048], all_of, nothing);
    assert_eq!(scene.task().tell("dontneed 0 2000"), "ok");
    let used = || scene.store.memory_in_use().expect("measured");
    wait_until("the older copies are freed", || used() <= 48 * PAGE_SIZE);
    bringer.bring(1, pages(0, 1000));
    wait_until("what came is freed", || used() <= 48 * PAGE_SIZE);
    bringer.bring(1, pages(1000, 1048));
    scene.done();
    assert_eq!(scene.task().tell("check 0 2000 -1"), "ok");
    assert_eq!(scene.task().tell("check 2000 48 2000"), "ok");
}

#[test]
fn a_task_that_ends_waits_for_nothing() {
    let (mut scene, _bringer) = owing(&[4096, 2048], all_of, nothing);
    scene.task().say("check 10 1 10");
    assert!(!scene.task().answers_within(Duration::from_millis(50)));
    scene.tasks.clear();
    let summary = scene.done();
    assert_eq!(summary.pages, 0);
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn the_standby_goes_on_with_the_same_supply_line() {
    let (mut scene, bringer) = owing(&[4096, 1024], all_of, nothing);
    assert_eq!(scene.tasks[1].tell("dontneed 100 100"), "ok");
    bringer.bring(1, pages(2000, 500));
    assert_eq!(scene.task().tell("check 2000 500 2000"), "ok");
    scene.task().say("check 10 1 10");
    let first = bringer.next_want(PATIENCE).expect("a request");
    // On record, and the word was lost with the pager.
    bringer.place(2, pages(0, 50));
    kill(scene.pager_pid());
    let again = bringer.next_want(PATIENCE).expect("the standby's request");
    assert_eq!(again, first);
    assert_eq!(scene.tasks[1].tell("check 0 50 0"), "ok");
    assert_eq!(bringer.next_want(Duration::from_millis(20)), None);
    bringer.bring(again.0, again.1);
    assert_eq!(scene.task().answer(), "ok");
    // A new line from the living agent, too.
    let line = scene.pager.supply().expect("a supply line");
    let working = Bringer { line, ..bringer }.work(true);
    scene.task().check_everything();
    assert_eq!(scene.tasks[1].tell("check 0 100 0"), "ok");
    assert_eq!(scene.tasks[1].tell("check 100 100 -1"), "ok");
    assert_eq!(scene.tasks[1].tell("check 200 824 200"), "ok");
    scene.done();
    working.stop();
    assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
}

#[test]
fn a_pager_killed_under_push_is_replaced_without_a_wrong_byte() {
    let mut replaced = 0;
    for wait_ms in [0, 3, 10, 30, 0, 3, 10, 30] {
        let cgroup = Cgroup::new("push");
        let path = cgroup.0.clone();
        let (mut scene, bringer) = owing(&[16_384], all_of, |_| vec![path.clone()]);
        cgroup.take_in(&scene.task().process);
        let pager = scene.pager_pid();
        let working = bringer.work(true);
        scene.task().say("check 0 16384 0");
        std::thread::sleep(Duration::from_millis(wait_ms));
        kill(pager);
        let answer = scene.task().answer();
        // If it died while it read a fault, its standby cannot know that it was nothing else: no container, and no wrong byte.
        if answer.is_empty() {
            let record = scene.directory.path().join("pager-death.json");
            wait_until("a record of the death", || record.exists());
            continue;
        }
        assert_eq!(answer, "ok");
        scene.done();
        working.stop();
        assert_eq!(scene.store.memory_in_use().expect("measured"), 0);
        replaced += 1;
    }
    assert!(replaced > 0, "every pager died while it read events");
}

/// Leaves the pager as an agent that dies does; what is left of the scene goes on.
struct Orphaned {
    directory: tempfile::TempDir,
    tasks: Vec<Task>,
    store: Arc<PageStore>,
    ledgers: Vec<Ledger>,
}

fn orphan(scene: Scene, bringer: Bringer) -> Orphaned {
    let Scene {
        directory,
        store,
        pager,
        tasks,
        ..
    } = scene;
    drop(pager);
    let Bringer { ledgers, .. } = bringer;
    Orphaned {
        directory,
        tasks,
        store,
        ledgers,
    }
}

impl Orphaned {
    fn adopt(&self) -> Adopted {
        let socket = self.directory.path().join(SUPPLY_SOCKET);
        wait_until("an adoption socket", || socket.exists());
        let adopted = adopt(&socket, PATIENCE).expect("adopted");
        assert_eq!(adopted.tasks.len(), self.ledgers.len());
        for (task, ledger) in adopted.tasks.iter().zip(&self.ledgers) {
            assert_eq!(task.vpid, ledger.vpid);
            assert_eq!(task.owed.pages, ledger.owed);
            let inode = |fd: OwnedFd| std::fs::File::from(fd).metadata().expect("stat").ino();
            let ours = self.store.memfd(SpaceId(task.vpid as u32)).expect("memfd");
            let theirs = task.memfd.try_clone().expect("cloned");
            assert_eq!(inode(theirs), inode(ours));
        }
        adopted
    }

    /// The new agent's bringer, which knows what has come from the adopted records.
    fn bringer(&self, adopted: &mut Adopted) -> Bringer {
        let (spare, _) = SupplyLine::pair().expect("a pair");
        let ledgers = self.ledgers.iter().zip(&adopted.tasks);
        Bringer {
            store: self.store.clone(),
            ledgers: ledgers
                .map(|(ledger, task)| ledger.adopted(&task.owed))
                .collect(),
            line: std::mem::replace(&mut adopted.line, spare),
        }
    }
}

#[test]
fn a_pager_whose_agent_died_is_adopted_and_goes_on() {
    for pager_dies_too in [false, true] {
        let (mut scene, bringer) = owing(&[4096, 1024], all_of, nothing);
        bringer.bring(1, pages(2000, 500));
        if pager_dies_too {
            kill(scene.pager_pid());
        }
        scene.task().say("check 10 1 10");
        bringer.next_want(PATIENCE).expect("a request");
        bringer.place(1, pages(3000, 100));
        let mut orphaned = orphan(scene, bringer);
        // What has come is there, with or without a word of it; the rest waits.
        assert!(!orphaned.tasks[0].answers_within(Duration::from_millis(50)));
        let mut adopted = orphaned.adopt();
        let bringer = orphaned.bringer(&mut adopted);
        let asked = bringer.next_want(PATIENCE).expect("asked again");
        assert_eq!(asked, (1, pages(10, 4)));
        bringer.bring(1, asked.1);
        assert_eq!(orphaned.tasks[0].answer(), "ok");
        assert_eq!(orphaned.tasks[0].tell("check 3000 100 3000"), "ok");
        // This agent dies as well, and the next one brings it to an end.
        drop((bringer, adopted));
        let mut adopted = orphaned.adopt();
        let working = orphaned.bringer(&mut adopted).work(true);
        for task in &mut orphaned.tasks {
            task.check_everything();
        }
        adopted.pager.wait_done(PATIENCE).expect("done");
        working.stop();
        assert_eq!(orphaned.store.memory_in_use().expect("measured"), 0);
        assert!(!orphaned.directory.path().join(SUPPLY_SOCKET).exists());
    }
}

#[test]
fn an_agent_that_dies_when_all_has_come_is_not_missed() {
    let (scene, bringer) = owing(&[2048], all_of, nothing);
    let pager = scene.pager_pid();
    // The last of it without a word.
    bringer.bring(1, pages(0, 2000));
    bringer.place(1, pages(2000, 48));
    let mut orphaned = orphan(scene, bringer);
    orphaned.tasks[0].check_everything();
    assert_ends(pager);
    assert!(!orphaned.directory.path().join(SUPPLY_SOCKET).exists());
}

#[test]
fn without_anybody_the_container_is_frozen_and_kept_until_it_is_adopted() {
    for pager_dies_too in [false, true] {
        let cgroup = Cgroup::new(&format!("stall-{pager_dies_too}"));
        let prepare = |scene: &mut Scene| {
            scene.pager.set_supply_patience(Duration::from_millis(300));
            vec![cgroup.0.clone()]
        };
        let (mut scene, bringer) = owing(&[2048], all_of, prepare);
        cgroup.take_in(&scene.task().process);
        scene.task().say("check 0 2048 0");
        let (vpid, asked) = bringer.next_want(PATIENCE).expect("a request");
        bringer.bring(vpid, asked);
        let pager = scene.pager_pid();
        let mut orphaned = orphan(scene, bringer);
        let record = orphaned.directory.path().join(STALL_RECORD);
        let stalled = || -> Option<serde_json::Value> {
            serde_json::from_str(&std::fs::read_to_string(&record).ok()?).ok()
        };
        wait_until("a record", || {
            stalled().is_some_and(|record| record["frozen"] == true)
        });
        let record_now = stalled().expect("a record");
        assert_eq!(record_now["missing_pages"], 2044);
        assert_eq!(record_now["cgroups"][0], cgroup.0.to_str().expect("UTF-8"));
        assert!(cgroup.is_frozen());
        if pager_dies_too {
            kill(pager);
        }
        assert!(!orphaned.tasks[0].answers_within(Duration::from_millis(100)));
        let mut adopted = orphaned.adopt();
        let working = orphaned.bringer(&mut adopted).work(true);
        assert_eq!(orphaned.tasks[0].answer(), "ok");
        adopted.pager.wait_done(PATIENCE).expect("done");
        working.stop();
        assert!(!cgroup.is_frozen());
        assert!(!record.exists());
        orphaned.tasks.clear();
    }
}

#[test]
fn a_supply_line_that_ends_before_release_is_replaced_by_the_agent() {
    let mut scene = Scene::new();
    scene.receive_memory(1, 512);
    scene.restore_task(1, 512, 0);
    let arrivals = Arrivals::new().expect("a record");
    let mut memory = scene.memory_of(1, 512);
    memory.owed = Some(OwedMemory {
        pages: all_of(512),
        arrivals: arrivals.try_clone().expect("cloned"),
    });
    let served = scene.pager.serve(vec![memory], &[], PATIENCE);
    served.expect("the pager serves");
    drop(scene.pager.supply().expect("a supply line"));
    scene.pager.wait_armed(PATIENCE).expect("armed");
    scene.task().say("check 0 512 0");
    scene.release();
    let socket = scene.directory.path().join(SUPPLY_SOCKET);
    wait_until("an adoption socket", || socket.exists());
    let line = scene.pager.supply().expect("a supply line");
    let ledgers = vec![Ledger {
        vpid: 1,
        pages: 512,
        owed: all_of(512),
        arrivals,
    }];
    let store = scene.store.clone();
    let working = Bringer {
        store,
        ledgers,
        line,
    }
    .work(false);
    assert_eq!(scene.task().answer(), "ok");
    wait_until("the socket is closed", || !socket.exists());
    let (bringer, _) = working.stop();
    let working = bringer.work(true);
    scene.done();
    working.stop();
}

#[test]
fn what_is_no_message_ends_the_line_and_another_is_asked_for_the_same() {
    let (mut scene, bringer) = owing(&[512], all_of, nothing);
    scene.task().say("check 0 512 0");
    let asked = bringer.next_want(PATIENCE).expect("a request");
    rustix::net::send(&bringer.line, b"nonsense", rustix::net::SendFlags::empty()).expect("sent");
    assert_eq!(bringer.next_want(PATIENCE), None);
    let line = scene.pager.supply().expect("a supply line");
    let bringer = Bringer { line, ..bringer };
    assert_eq!(bringer.next_want(PATIENCE), Some(asked));
    assert!(bringer.line.send(SupplyMessage::AskAgain).expect("open"));
    assert_eq!(bringer.next_want(PATIENCE), Some(asked));
    bringer.bring(asked.0, asked.1);
    let working = bringer.work(true);
    assert_eq!(scene.task().answer(), "ok");
    scene.done();
    working.stop();
}

#[test]
fn mappings_on_the_move_get_what_comes_late() {
    for seed in 1..=4 {
        let (mut scene, bringer) = owing(&[16_384], all_of, nothing);
        let working = bringer.work_slowly();
        let answer = scene.task().tell(&format!("shuffle 10000 {seed}"));
        assert_eq!(answer, "ok", "seed {seed}");
        let summary = scene.done();
        assert!(summary.is_whole(), "seed {seed}: {summary:?}");
        working.stop();
    }
}

#[test]
fn a_stranger_cannot_adopt_a_pager() {
    let (scene, bringer) = owing(&[512], all_of, nothing);
    let mut orphaned = orphan(scene, bringer);
    let directory = orphaned.directory.path();
    let socket = directory.join(SUPPLY_SOCKET);
    wait_until("an adoption socket", || socket.exists());
    // In the way of nobody's process is only the pager itself.
    let program = directory.join("task");
    std::fs::copy(task_program(), &program).expect("copied");
    for open in [directory, &socket] {
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(open, everybody).expect("opened");
    }
    let stranger = std::os::unix::process::CommandExt::uid(&mut Command::new(&program), 65_534)
        .arg("connect")
        .arg(&socket)
        .status()
        .expect("run");
    assert_eq!(stranger.code(), Some(0));
    let mut adopted = orphaned.adopt();
    let working = orphaned.bringer(&mut adopted).work(true);
    orphaned.tasks[0].check_everything();
    adopted.pager.wait_done(PATIENCE).expect("done");
    working.stop();
}

#[test]
fn a_pager_without_a_standby_is_adopted_and_a_task_that_ended_is_no_concern() {
    let (mut scene, bringer) = owing(&[512, 1024], all_of, nothing);
    kill(scene.standby_pid());
    // The first task ends, and only the second is handed over.
    drop(scene.tasks.remove(0));
    wait_filled(&mut scene.pager);
    let mut orphaned = orphan(scene, bringer);
    orphaned.ledgers.remove(0);
    let mut adopted = orphaned.adopt();
    let working = orphaned.bringer(&mut adopted).work(true);
    orphaned.tasks[0].check_everything();
    adopted.pager.wait_done(PATIENCE).expect("done");
    working.stop();
}

#[test]
fn faults_are_answered_under_full_push() {
    for push in [false, true] {
        let (mut scene, bringer) = owing(&[32_768], all_of, nothing);
        let working = bringer.work(push);
        let answer = scene.task().tell("latency 400 4711");
        println!("push {push}: faults, p50, p99, longest (ns): {answer}");
        assert!(answer.starts_with("latency "), "{answer}");
        let (bringer, _) = working.stop();
        let working = bringer.work(true);
        scene.task().check_everything();
        let summary = scene.done();
        println!("{summary:?}");
        working.stop();
    }
}

#[test]
fn a_pager_that_dies_while_it_is_adopted_is_adopted_in_its_standby() {
    let mut replaced = 0;
    for delay_us in [0, 200, 500, 1000, 2000, 5000] {
        let cgroup = Cgroup::new("adopted");
        let path = cgroup.0.clone();
        let (mut scene, bringer) = owing(&[2048], all_of, |_| vec![path.clone()]);
        cgroup.take_in(&scene.task().process);
        scene.task().say("check 0 2048 0");
        let pager = scene.pager_pid();
        let mut orphaned = orphan(scene, bringer);
        let socket = orphaned.directory.path().join(SUPPLY_SOCKET);
        wait_until("an adoption socket", || socket.exists());
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(delay_us));
            // Late, it finds a pager that is done: then there was no death to survive.
            let pager = nix::unistd::Pid::from_raw(pager);
            nix::sys::signal::kill(pager, nix::sys::signal::Signal::SIGKILL).is_ok()
        });
        let mut adopted = orphaned.adopt();
        let working = orphaned.bringer(&mut adopted).work(true);
        let killed = killer.join().expect("no panic");
        let answer = orphaned.tasks[0].answer();
        // As above: it may have died while it read a fault.
        if answer.is_empty() {
            let record = orphaned.directory.path().join("pager-death.json");
            wait_until("a record of the death", || record.exists());
            continue;
        }
        assert_eq!(answer, "ok", "{delay_us} µs");
        adopted.pager.wait_done(PATIENCE).expect("done");
        working.stop();
        assert_eq!(orphaned.store.memory_in_use().expect("measured"), 0);
        replaced += u32::from(killed);
    }
    assert!(replaced > 0, "every pager died while it read events");
}

#[test]
fn a_signal_while_the_kernel_waits_for_a_page_keeps_the_pager_from_nothing() {
    let (mut scene, bringer) = owing(&[512, 512], all_of, nothing);
    scene.task().say("signalwrite 10");
    let asked = bringer.next_want(PATIENCE).expect("a request");
    // The kernel lets the thread fault without end from the signal on.
    std::thread::sleep(Duration::from_millis(300));
    let share = share_computed(scene.pager_pid(), || {
        assert!(!scene.task().answers_within(Duration::from_millis(1000)));
    });
    println!("{share:.2} of a processor spent on waiting");
    assert!(share < 0.4, "{share:.2} of a processor spent on waiting");
    assert_eq!(bringer.next_want(Duration::from_millis(20)), None);
    scene.tasks[1].say("check 20 1 20");
    let other = bringer.next_want(PATIENCE).expect("a request");
    assert_eq!(other, (2, pages(20, 4)));
    bringer.bring(2, other.1);
    assert_eq!(scene.tasks[1].answer(), "ok");
    bringer.bring(asked.0, asked.1);
    assert_eq!(scene.task().answer(), "ok");
    let working = bringer.work(true);
    scene.done();
    working.stop();
}

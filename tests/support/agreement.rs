//! Trackers held to a program's own record of what it wrote (tests/programs/recorder.c).
//!
//! Trackers enter; for each leaves how many pages it missed, which must be none, and how many it reported that the program had
//! not written. All of them follow the same processes and scan at the same moments, when these rest or are frozen, so their
//! answers can also be compared with each other.

use super::freezer::Freezer;
use super::offer::opened;
use super::program::{Commanded, Name};
use migrate::kernel::maps::{Vma, VmaKind};
use migrate::memory::{PageNumber, PageRange, PageSet, SpaceId};
use migrate::source::tracker::{Motion, SpaceScan, Tracker, TrackerKind};
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// For each tracker, in the order they were given.
    pub agreements: Vec<Agreement>,
    /// Where there were two trackers: pages that only the first and that only the second reported.
    pub reported_by_one: Option<(u64, u64)>,
}

/// How a tracker's scans and the record agree.
#[derive(Debug)]
pub struct Agreement {
    /// The tracker.
    pub kind: TrackerKind,
    /// Scans of an address space.
    pub scans: u64,
    /// Pages the program wrote between scans, summed over the scans.
    pub recorded_pages: u64,
    /// Of these, pages that the scan after did not report.
    pub missed_pages: u64,
    /// The first of them, each with its mapping.
    pub missed: Vec<String>,
    /// Pages reported but not recorded, by cause; not counted at the first sight of a space, which takes all.
    pub over_reported: OverReported,
    /// Scans of spaces that were not fully tracked (see `SpaceScan::untracked`), whose next answer is larger.
    pub untracked_scans: u64,
}

/// Pages reported but not recorded, by cause.
#[derive(Clone, Copy, Debug, Default)]
pub struct OverReported {
    /// Where huge pages are allowed, in the same 2 MiB as a written page.
    pub huge_page: u64,
    /// Of the stack: it is written by every call, and only deliberate writes are recorded.
    pub stack: u64,
    /// Of the data of the program and its libraries.
    pub program: u64,
    /// Dropped or unmapped since the last scan, perhaps read since: zeros as before, or the file's content.
    pub dropped: u64,
    /// Reported by the last scan, which found the program frozen and so armed nothing.
    pub not_armed: u64,
    /// Any other.
    pub other: u64,
}

impl OverReported {
    /// All of them.
    pub fn pages(&self) -> u64 {
        self.huge_page + self.stack + self.program + self.dropped + self.not_armed + self.other
    }
}

/// Lets the program take `rounds` times `steps` random steps, and holds the trackers to its record after each. After some
/// rounds the program is joined by children; every fifth scan finds it frozen.
///
/// # Panics
/// If the program or a tracker fails.
pub fn run(kinds: &[TrackerKind], rounds: u32, steps: u32) -> Outcome {
    let directory = Directory::new();
    let freezer = Freezer::new("agreement");
    let mut program =
        Commanded::start_program(&freezer, Name::Recorder, [directory.path.as_os_str()]);
    let mut judges: Vec<Judge> = kinds.iter().map(|&kind| Judge::new(kind)).collect();
    let mut records = Records::default();
    let mut differing = (0, 0);
    for round in 0..rounds {
        if round == rounds / 4 {
            program.obey("fork 3");
        }
        program.obey(&format!("step {steps}"));
        let motion = if round % 5 == 4 {
            freezer.freeze();
            Motion::Frozen
        } else {
            Motion::Running
        };
        records.read(&directory.path, &freezer);
        let scans: Vec<Vec<SpaceScan>> = judges
            .iter_mut()
            .map(|judge| judge.scan(&freezer, motion, &records))
            .collect();
        if let [first, second] = scans.as_slice() {
            differing.0 += only_in(first, second);
            differing.1 += only_in(second, first);
        }
        records.begin_anew();
        if motion == Motion::Frozen {
            freezer.thaw();
        }
    }
    Outcome {
        agreements: judges.into_iter().map(|judge| judge.agreement).collect(),
        reported_by_one: (kinds.len() == 2).then_some(differing),
    }
}

/// A tracker and what is thought of it.
struct Judge {
    tracker: Box<dyn Tracker>,
    agreement: Agreement,
    /// Spaces that have been seen and tracked since.
    tracked: HashSet<SpaceId>,
    /// What the last scan reported, of each space, if nothing was armed then.
    not_armed: HashMap<SpaceId, PageSet>,
}

impl Judge {
    fn new(kind: TrackerKind) -> Judge {
        Judge {
            tracker: opened(kind),
            agreement: Agreement {
                kind,
                scans: 0,
                recorded_pages: 0,
                missed_pages: 0,
                missed: Vec::new(),
                over_reported: OverReported::default(),
                untracked_scans: 0,
            },
            tracked: HashSet::new(),
            not_armed: HashMap::new(),
        }
    }

    fn scan(&mut self, freezer: &Freezer, motion: Motion, records: &Records) -> Vec<SpaceScan> {
        let scans = self.tracker.scan(&freezer.tasks(), motion).unwrap();
        assert_eq!(
            scans.len(),
            records.of.len(),
            "each process is one address space"
        );
        for scan in &scans {
            let record = &records.of[&scan.pid];
            self.agreement.scans += 1;
            self.agreement.recorded_pages += record.written.pages();
            self.find_missed(scan, record);
            if self.tracked.contains(&scan.space) {
                self.count_over_reported(scan, record);
            }
            if scan.untracked.is_some() {
                self.agreement.untracked_scans += 1;
                self.tracked.remove(&scan.space);
            } else {
                self.tracked.insert(scan.space);
            }
        }
        self.not_armed = match motion {
            Motion::Running => HashMap::new(),
            Motion::Frozen => scans
                .iter()
                .map(|scan| (scan.space, scan.dirty.clone()))
                .collect(),
        };
        scans
    }

    fn find_missed(&mut self, scan: &SpaceScan, record: &Record) {
        let mut missed = record.written.clone();
        missed.subtract(&scan.dirty);
        self.agreement.missed_pages += missed.pages();
        for run in missed.iter() {
            if self.agreement.missed.len() < 10 {
                let vma = vma_of(scan, run.start());
                let (kind, space, pid) = (self.agreement.kind, scan.space, scan.pid);
                self.agreement.missed.push(format!(
                    "{kind}: {run} of {space:?} (process {pid}), in {vma:?}"
                ));
            }
        }
    }

    fn count_over_reported(&mut self, scan: &SpaceScan, record: &Record) {
        let mut over = scan.dirty.clone();
        over.subtract(&record.written);
        let counted = &mut self.agreement.over_reported;
        let not_armed = self.not_armed.get(&scan.space);
        for page in over.iter().flat_map(|run| run.start().0..run.end().0) {
            let page = PageNumber(page);
            let kind = vma_of(scan, page).map(|vma| vma.kind);
            *match kind {
                _ if not_armed.is_some_and(|pages| pages.contains(page)) => &mut counted.not_armed,
                _ if record.gone.contains(page) => &mut counted.dropped,
                _ if record.written_beside(page) => &mut counted.huge_page,
                Some(VmaKind::Stack) => &mut counted.stack,
                Some(VmaKind::File { .. }) => &mut counted.program,
                _ => &mut counted.other,
            } += 1;
        }
    }
}

fn vma_of(scan: &SpaceScan, page: PageNumber) -> Option<&Vma> {
    scan.vmas.iter().find(|vma| vma.range.contains(page))
}

/// Pages of `these` that are not in `those`, space by space.
fn only_in(these: &[SpaceScan], those: &[SpaceScan]) -> u64 {
    let mut pages = 0;
    for this in these {
        let mut dirty = this.dirty.clone();
        if let Some(that) = those.iter().find(|that| that.pid == this.pid) {
            dirty.subtract(&that.dirty);
        }
        pages += dirty.pages();
    }
    pages
}

/// Page numbers and the stamps of what the pages hold; a page that does not exist holds zeros as well as one that does.
type Contents = HashMap<u64, u64>;

/// The stamp of zeros.
const ZEROS: u64 = 1;

/// What the processes have recorded.
#[derive(Default)]
struct Records {
    of: HashMap<i32, Record>,
}

/// What one process has recorded since its record was last emptied.
struct Record {
    file: File,
    /// The stamps of what the process's pages held when the record was emptied, and hold now.
    before: Contents,
    now: Contents,
    /// Pages that hold something else than before.
    written: PageSet,
    /// Pages dropped or unmapped, and not written since.
    gone: PageSet,
    /// Pages that may be part of huge pages.
    huge: PageSet,
}

impl Records {
    /// Reads the record of every process in `freezer`. They must rest.
    fn read(&mut self, directory: &Path, freezer: &Freezer) {
        let known = std::mem::take(&mut self.of);
        // A child begins with its parent's memory.
        let parent = known.values().next();
        for task in freezer.tasks() {
            let (before, huge) = known
                .get(&task.pid)
                .or(parent)
                .map(|record| (record.before.clone(), record.huge.clone()))
                .unwrap_or_default();
            let path = directory.join(format!("record-{}", task.pid));
            self.of.insert(task.pid, Record::read(&path, before, huge));
        }
    }

    /// Empties the records, for the next round.
    fn begin_anew(&mut self) {
        for record in self.of.values_mut() {
            record.before = record.now.clone();
            record.file.write_all_at(&[0; 8], 0).unwrap();
        }
    }
}

impl Record {
    /// Replays the log of struct self in recorder.c: two counts, then entries of a letter, a length, a first page, a stamp.
    fn read(path: &Path, before: Contents, mut huge: PageSet) -> Record {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let number = |at: u64, bytes: usize| {
            let mut number = [0; 8];
            file.read_exact_at(&mut number[..bytes], at).unwrap();
            u64::from_le_bytes(number)
        };
        let (entries, lost) = (number(0, 8), number(8, 8));
        assert_eq!(
            lost, 0,
            "the record has no room for so many steps between two scans"
        );
        let (mut touched, mut gone) = (PageSet::new(), PageSet::new());
        let mut now = before.clone();
        for entry in (0..entries).map(|index| 16 + index * 24) {
            let pages = number(entry + 4, 4);
            let range = PageRange::from_start_len(PageNumber(number(entry + 8, 8)), pages)
                .expect("the record names pages");
            match number(entry, 4) as u8 {
                b'w' => {
                    now.insert(range.start().0, number(entry + 16, 8));
                    touched.insert(range);
                    gone.remove(range);
                }
                b'g' => {
                    for page in range.start().0..range.end().0 {
                        now.remove(&page);
                    }
                    gone.insert(range);
                }
                b'h' => huge.insert(range),
                b's' => huge.remove(range),
                other => panic!("{path:?} has an entry of kind {other}"),
            }
        }
        let mut written = PageSet::new();
        for page in touched.iter().flat_map(|run| run.start().0..run.end().0) {
            let was = before.get(&page).unwrap_or(&ZEROS);
            if now.get(&page).is_some_and(|is| is != was)
                && let Some(page) = PageRange::from_start_len(PageNumber(page), 1)
            {
                written.insert(page);
            }
        }
        Record {
            file,
            before,
            now,
            written,
            gone,
            huge,
        }
    }

    /// Whether `page` may be in one huge page with a page written.
    fn written_beside(&self, page: PageNumber) -> bool {
        const HUGE_PAGE: u64 = 512;
        let around =
            PageRange::from_start_len(PageNumber(page.0 / HUGE_PAGE * HUGE_PAGE), HUGE_PAGE);
        self.huge.contains(page)
            && around.is_some_and(|around| !self.written.intersecting(around).is_empty())
    }
}

/// A directory for the records, removed when dropped.
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn new() -> Directory {
        let path =
            std::env::temp_dir().join(format!("migrate-test-agreement-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        Directory { path }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

//! A copy of processes' memory kept from a tracker's scans and reads alone, as the target keeps one.

use super::freezer::Freezer;
use migrate::kernel::process_memory::{ProcessMemory, ReadError};
use migrate::memory::{PageNumber, PageRange, SpaceId};
use migrate::source::tracker::{Motion, SpaceScan, Tracker, is_tracked};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

type Page = Box<[u8]>;

pub struct Mirror {
    tracker: Box<dyn Tracker>,
    spaces: HashMap<SpaceId, HashMap<PageNumber, Page>>,
    last: Vec<SpaceScan>,
    copied: u64,
    compared: u64,
}

impl Mirror {
    pub fn new(tracker: Box<dyn Tracker>) -> Mirror {
        Mirror {
            tracker,
            spaces: HashMap::new(),
            last: Vec::new(),
            copied: 0,
            compared: 0,
        }
    }

    /// Scans, then reads what is dirty.
    pub fn round(&mut self, freezer: &Freezer, motion: Motion) -> &[SpaceScan] {
        let scans = self.tracker.scan(&freezer.tasks(), motion).unwrap();
        self.spaces
            .retain(|id, _| scans.iter().any(|scan| scan.space == *id));
        for scan in &scans {
            let pages = self.spaces.entry(scan.space).or_default();
            pages.retain(|&page, _| !scan.stale.contains(page));
            match copy(scan, pages) {
                Ok(copied) => self.copied += copied,
                // It may exit or exec between scan and read; not when it is frozen.
                Err(ReadError::Exited { .. }) if motion == Motion::Running => {}
                Err(error) => panic!("{scan:?}: {error}"),
            }
        }
        self.last = scans;
        &self.last
    }

    /// Compares with the memory of the processes of the last scan, which must be frozen.
    pub fn compare(&mut self) {
        let mut compared = 0;
        for scan in &self.last {
            let mirror = &self.spaces[&scan.space];
            let pagemap = File::open(format!("/proc/{}/pagemap", scan.pid)).unwrap();
            let mem = File::open(format!("/proc/{}/mem", scan.pid)).unwrap();
            let mut now = [0; 4096];
            for vma in scan.vmas.iter().filter(|vma| is_tracked(vma)) {
                for page in vma.range.start().0..vma.range.end().0 {
                    let mut entry = [0; 8];
                    pagemap.read_exact_at(&mut entry, page * 8).unwrap();
                    let entry = u64::from_ne_bytes(entry);
                    let (exists, file) = (entry >> 62 != 0, entry >> 61 & 1 == 1);
                    if !exists || file {
                        continue;
                    }
                    let address = page * 4096;
                    // A marker of the userfaultfd shows as swapped; there is no page behind it.
                    let marker = entry >> 63 == 0 && entry >> 57 & 1 == 1;
                    mem.read_exact_at(&mut now, address).unwrap();
                    match mirror.get(&PageNumber(page)) {
                        None if marker => {}
                        // khugepaged made it after the scan; CRIU's page map names it, and then it is sent.
                        None if now == [0; 4096] => {}
                        None => panic!(
                            "{address:#x} of process {} was never sent ({vma:?}, pagemap {entry:#x})",
                            scan.pid
                        ),
                        Some(copy) => assert!(
                            **copy == now,
                            "{address:#x} of process {} was sent with other content ({vma:?}, pagemap {entry:#x})",
                            scan.pid
                        ),
                    }
                    compared += 1;
                }
            }
        }
        assert!(compared > 0);
        self.compared += compared;
        println!("{}", self.summary());
    }

    pub fn summary(&self) -> String {
        format!(
            "{} spaces, {} pages copied, {} compared and equal",
            self.spaces.len(),
            self.copied,
            self.compared
        )
    }
}

fn copy(scan: &SpaceScan, mirror: &mut HashMap<PageNumber, Page>) -> Result<u64, ReadError> {
    let memory = ProcessMemory::open(scan.pid)?;
    let mut copied = 0;
    for run in scan
        .dirty
        .iter()
        .flat_map(|run| run.chunks(256).collect::<Vec<PageRange>>())
    {
        let mut buffer = vec![0xa5; run.bytes() as usize];
        let missing = memory.read_runs(&[run], &mut buffer)?;
        for (index, bytes) in buffer.chunks(4096).enumerate() {
            let page = PageNumber(run.start().0 + index as u64);
            if missing.iter().any(|gone| gone.contains(page)) {
                mirror.remove(&page);
            } else {
                mirror.insert(page, bytes.into());
                copied += 1;
            }
        }
    }
    Ok(copied)
}

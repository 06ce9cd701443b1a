//! While nothing runs: from the order to freeze until everything the target needs has been sent.
//!
//! ```text
//!  freeze ─▶ send_delta: last scan ∥ CRIU looks, last pages, last files ─▶ freeze_again, under CRIU's hold
//!         ─▶ send_images: the residue, CRIU's images, the manifest       ─▶ confirm_hold, before the decision
//! ```

use super::{FREEZE_PATIENCE, Handover};
use crate::criu::hook::WaitingHook;
use crate::criu::options::NetworkLock;
use crate::criu::skeleton::Claim;
use crate::kernel::interruption::pages_of_time_left;
use crate::kernel::maps::{Vma, VmaKind};
use crate::memory::{PAGE_SIZE, PageSet, SpaceId};
use crate::migration::event::Event;
use crate::migration::handoff::{SourceEvent, SourceState};
use crate::migration::phase::Mark;
use crate::migration::report::{DumpKind, RoundReport, Sent};
use crate::runtime::stopped::make_seizable;
use crate::runtime::{FreezeError, Task};
use crate::source::going_on::{traced_by, tracer_of};
use crate::source::preflight;
use crate::source::residue::{residue, take_lazy};
use crate::source::rootfs::FileId;
use crate::source::send::{FrameSink, PagesToSend, Progress, Sender};
use crate::source::tracker::{Bystander, Motion, SpaceScan, Tracker, TrackerKind};
use crate::wire::message::{ImageFile, Manifest, SpaceOwner};
use crate::wire::path::RelativePath;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

impl<S: FrameSink> Handover<'_, S> {
    pub(super) fn freeze(&mut self) -> Option<SourceEvent> {
        self.mark(Mark::FreezeBegan);
        let start = Instant::now();
        let window = self.window;
        let freezer = &self.container.freezer;
        self.paused = freezer.is_frozen().unwrap_or(false);
        let frozen = match self.paused {
            true => Err(FreezeError::Paused),
            false => freezer.freeze(FREEZE_PATIENCE, || window.over().is_some()),
        };
        Some(match frozen {
            Ok(frozen) => {
                self.frozen = Some(frozen);
                self.mark(Mark::Frozen);
                (self.emit)(Event::Frozen {
                    duration: start.elapsed(),
                });
                SourceEvent::CgroupFrozen
            }
            Err(FreezeError::CalledOff) => {
                let wanted = self.heard_cancel().or_else(|| self.stood_still_too_long());
                wanted.unwrap_or(SourceEvent::FreezeFailed)
            }
            Err(error) => {
                self.because(error.to_string());
                SourceEvent::FreezeFailed
            }
        })
    }

    /// The last scan, the parent for CRIU, the last pages and the last files.
    pub(super) fn send_delta(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let text = |error: &dyn std::fmt::Display| error.to_string();
        if self.network_lock == NetworkLock::Skip
            && preflight::is_connected(self.container.init_pid)
        {
            // CRIU was started without a lock: between dumping one end and the other, bytes could be lost.
            return Err(
                "a TCP connection was opened after the container was looked at: try again".into(),
            );
        }
        let tasks = self.container.tasks().map_err(|error| text(&error))?;
        for task in tasks.iter().filter(|task| !task.zombie) {
            if let Some(tracer) = tracer_of(task.pid) {
                return Err(traced_by(task.vpid, &self.container.id, tracer));
            }
        }
        self.stopped = make_seizable(&self.container.freezer, &tasks);
        // Before CRIU may look: once it has taken hold of a thread, the call the thread waited in is no longer to be seen.
        let mut time_left = BTreeMap::new();
        for task in tasks.iter().filter(|task| !task.zombie) {
            let pages = pages_of_time_left(task.pid).map_err(|error| text(&error))?;
            time_left.insert(task.vpid, pages);
        }
        // CRIU's work grows with the container as the scan's does: where one does not disturb the other they run side by
        // side. Soft-dirty bits are cleared before CRIU looks, so there the scan has to come first.
        let side_by_side = self
            .tracker
            .as_ref()
            .is_some_and(|tracker| tracker.kind() == TrackerKind::UffdWp);
        if side_by_side {
            let spaces = Bystander.scan(&tasks, Motion::Frozen);
            let spaces = spaces.map_err(|error| text(&error))?;
            let claims: Vec<Claim> = spaces.iter().map(claim).collect();
            self.let_dump_look(claims)?;
        }
        if let Some(tracker) = &mut self.tracker {
            self.scans = tracker
                .scan(&tasks, Motion::Frozen)
                .map_err(|error| text(&error))?;
        }
        if let Some(rootfs) = &mut self.rootfs {
            rootfs
                .begin_pass(mapped_files(&self.scans))
                .map_err(|error| text(&error))?;
        }
        if !side_by_side {
            let claims: Vec<Claim> = self.scans.iter().map(claim).collect();
            self.let_dump_look(claims)?;
        }
        self.ended.memory_bytes = resident_bytes(&tasks);
        let mut to_send = Vec::with_capacity(self.scans.len());
        let sender = self.sender.as_mut().ok_or("the page streams are gone")?;
        for scan in &self.scans {
            sender.forget(scan.space, &scan.stale);
        }
        for scan in &self.scans {
            let executable: PageSet = scan
                .vmas
                .iter()
                .filter(|vma| vma.executable)
                .map(|vma| vma.range)
                .collect();
            let mut pages = self.unsent.remove(&scan.space).unwrap_or_default();
            pages.extend(&scan.dirty);
            let mut held_back: PageSet = executable
                .iter()
                .flat_map(|range| pages.intersecting(range))
                .collect();
            for vpid in std::iter::once(&scan.vpid).chain(&scan.sharers) {
                if let Some(pages) = time_left.get(vpid) {
                    held_back.extend(pages);
                }
            }
            pages.subtract(&held_back);
            self.held_back.insert(scan.space, held_back);
            if self.is_post_copy() {
                let later: PageSet = scan
                    .vmas
                    .iter()
                    .filter(|vma| may_be_lazy(vma))
                    .flat_map(|vma| pages.intersecting(vma.range))
                    .collect();
                pages.subtract(&later);
                self.put_off.insert(scan.space, later);
            }
            to_send.push(PagesToSend {
                space: scan.space,
                pid: scan.pid,
                pages,
            });
        }
        let sent = self.send_in_window(&to_send)?;
        if let Some(rootfs) = &mut self.rootfs {
            let pass = rootfs.finish_pass(&self.window);
            let (summary, duration) = pass.map_err(|error| text(&error))?;
            (self.emit)(rootfs.event(summary, true, duration));
            // Not the container, which is frozen. What arrived is no state that its files ever had.
            if summary.skipped > 0 {
                return Err(format!(
                    "somebody else writes to {}: {} entries changed while the container was frozen",
                    self.container.rootfs.display(),
                    summary.skipped
                ));
            }
        }
        self.add_to_delta(sent, start.elapsed());
        self.mark(Mark::DeltaSent);
        if let Some(event) = self.hold_reached() {
            self.queue.push_back(event);
        }
        Ok(())
    }

    /// Tells CRIU what the target has a copy of, and lets it begin.
    pub(super) fn let_dump_look(&self, claims: Vec<Claim>) -> Result<(), String> {
        match &self.dump {
            Some(dump) => dump
                .let_look(claims, &self.window)
                .map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    /// Sends pages as long as the container may stand still for it.
    fn send_in_window(&mut self, pages: &[PagesToSend]) -> Result<Sent, String> {
        let progress = Progress::default();
        let sent = self.with_sender(
            &progress,
            |sender| sender.send(pages, &progress),
            |handover| handover.window.over().is_some(),
        );
        sent.map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    /// The dump is held and nothing of the delta is under way any more.
    pub(super) fn hold_reached(&mut self) -> Option<SourceEvent> {
        let ready = self.course.state() == SourceState::Frozen
            && self.hold.is_some()
            && self.timeline.at(Mark::DeltaSent).is_some();
        ready.then_some(SourceEvent::HoldReached)
    }

    /// CRIU thawed the cgroup to work on the tasks. Frozen again, nothing runs even if CRIU is killed.
    pub(super) fn freeze_again(&mut self) -> Result<(), String> {
        self.mark(Mark::DumpHeld);
        // The guard that is replaced must not thaw.
        if let Some(frozen) = self.frozen.take() {
            frozen.give_away();
        }
        let window = self.window;
        let frozen = self
            .container
            .freezer
            .freeze(FREEZE_PATIENCE, || window.over().is_some());
        self.frozen = Some(frozen.map_err(|error| error.to_string())?);
        // A task that CRIU let go of in between has run: what was sent is not what it holds now.
        let tasks = self.container.tasks().map_err(|error| error.to_string())?;
        match tasks
            .iter()
            .find(|task| !task.zombie && !is_traced(task.pid))
        {
            Some(task) => Err(format!(
                "CRIU lost hold of process {} before it could be frozen again",
                task.vpid
            )),
            None => Ok(()),
        }
    }

    /// Pages that only CRIU knew of, CRIU's images, and what there must be at the target.
    pub(super) fn send_images(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let images = self.dump.as_ref().ok_or("there is no dump")?.images();
        let mut to_send = Vec::new();
        let mut owed = Vec::new();
        let sender = self.sender.as_ref().ok_or("the page streams are gone")?;
        for scan in &self.scans {
            let none = PageSet::new();
            let held_back = self.held_back.get(&scan.space).unwrap_or(&none);
            let mut there = sender.sent(scan.space).cloned().unwrap_or_default();
            there.subtract(self.put_off.get(&scan.space).unwrap_or(&none));
            let mut pages = residue(&images, scan.vpid, Some(&there), held_back)
                .map_err(|error| text(&error))?;
            if self.is_post_copy() {
                // What is held back is little, and what threads touch first when they go on.
                let now: PageSet = held_back
                    .iter()
                    .flat_map(|range| pages.intersecting(range))
                    .collect();
                pages.subtract(&now);
                let later =
                    take_lazy(&images, scan.vpid, &mut pages).map_err(|error| text(&error))?;
                pages.extend(&now);
                if !later.is_empty() {
                    owed.push(PagesToSend {
                        space: scan.space,
                        pid: scan.pid,
                        pages: later,
                    });
                }
            }
            if !pages.is_empty() {
                to_send.push(PagesToSend {
                    space: scan.space,
                    pid: scan.pid,
                    pages,
                });
            }
        }
        let sent = self.send_in_window(&to_send)?;
        self.add_to_delta(sent, start.elapsed());
        let spaces = owed_spaces(&owed);
        self.with_sender(
            &Progress::default(),
            |sender| sender.owe(&spaces),
            |handover| handover.window.over().is_some(),
        )
        .map_err(|error| text(&error))?
        .map_err(|error| text(&error))?;
        let owed_pages = owed.iter().map(|owed| owed.pages.pages()).sum();
        self.owed = owed;
        self.owing = self.take_down_owing();
        self.ended.owed_pages = owed_pages;

        let image_files = list_images(&images).map_err(|error| text(&error))?;
        let pages_dumped = image_files
            .iter()
            .filter(|file| file.name.as_str().starts_with("pages-"))
            .map(|file| file.size / PAGE_SIZE)
            .sum();
        let names: Vec<RelativePath> = image_files.iter().map(|file| file.name.clone()).collect();
        let manifest = Manifest {
            spaces: self
                .scans
                .iter()
                .map(|scan| owner(scan.space, scan.vpid))
                .collect(),
            image_files,
            frames_per_stream: self.pages()?.frames(),
            owed_pages,
            reconnect_s: u32::try_from(self.plan.reconnect_timeout.as_secs()).unwrap_or(u32::MAX),
        };
        let link = self
            .link
            .as_mut()
            .ok_or("the connection to the target is gone")?;
        link.say_within(manifest, &self.window)
            .map_err(|error| text(&error))?;
        let bytes_images = link
            .send_files(&images, &names, &self.window)
            .map_err(|error| text(&error))?;
        self.start_service()?;
        self.mark(Mark::ImagesSent);
        let dump = if self.tracker.is_some() {
            DumpKind::Skeleton
        } else {
            DumpKind::Full
        };
        self.ended.dump = Some(dump);
        let since = |mark| self.timeline.at(mark).unwrap_or_default();
        (self.emit)(Event::Hold {
            dump,
            bytes_images,
            pages_dumped,
            duration: since(Mark::DumpHeld).saturating_sub(since(Mark::Frozen)),
        });
        if let Some(delta) = &self.delta {
            (self.emit)(Event::Delta(delta.clone()));
        }
        Ok(())
    }

    pub(super) fn pages(&mut self) -> Result<&mut Sender<S>, String> {
        self.sender
            .as_mut()
            .ok_or_else(|| "the page streams are gone".to_string())
    }

    pub(super) fn confirm_hold(&mut self) -> SourceEvent {
        let still_frozen = self.container.freezer.is_frozen().unwrap_or(false);
        let hook_waits = self.hold.as_ref().is_some_and(WaitingHook::is_waiting);
        if still_frozen && hook_waits {
            SourceEvent::HoldConfirmed
        } else {
            self.because(format!(
                "the hold broke (frozen: {still_frozen}, hook: {hook_waits})"
            ));
            SourceEvent::HoldBroken
        }
    }

    pub(super) fn add_to_delta(&mut self, sent: Sent, duration: Duration) {
        let round = self.round + 1;
        let delta = self.delta.get_or_insert_with(|| RoundReport {
            round,
            sent: Sent::default(),
            duration: Duration::ZERO,
            pages_dirty: 0,
            pages_left: 0,
            pages_held: 0,
            dirty_rate: 0.0,
            throughput: None,
            expected_downtime: None,
        });
        delta.sent = delta.sent.plus(sent);
        delta.duration += duration;
    }
}

fn owed_spaces(owed: &[PagesToSend]) -> Vec<(SpaceId, PageSet)> {
    owed.iter()
        .map(|owed| (owed.space, owed.pages.clone()))
        .collect()
}

/// Whether CRIU may be able to restore a mapping through userfaultfd. Its images have the last word ([`take_lazy`]): locked
/// memory cannot be told from other memory here.
fn may_be_lazy(vma: &Vma) -> bool {
    let anonymous = matches!(
        vma.kind,
        VmaKind::Anonymous | VmaKind::Heap | VmaKind::Stack
    );
    anonymous && !vma.shared
}

/// What the synthetic parent has of a scanned process.
fn claim(scan: &SpaceScan) -> Claim {
    Claim {
        pid: scan.pid,
        vpid: scan.vpid,
        areas: scan.vmas.iter().map(|vma| vma.range).collect(),
    }
}

/// Files that tasks can change without a trace in their times.
pub fn mapped_files(scans: &[SpaceScan]) -> BTreeSet<FileId> {
    let vmas = scans.iter().flat_map(|scan| &scan.vmas);
    vmas.filter(|vma| vma.shared && vma.writable)
        .filter_map(|vma| match vma.kind {
            VmaKind::File {
                dev: (major, minor),
                inode,
            } => Some(FileId {
                device: libc::makedev(major, minor),
                inode,
            }),
            _ => None,
        })
        .collect()
}

fn owner(space: SpaceId, vpid: i32) -> SpaceOwner {
    SpaceOwner {
        space,
        vpid: vpid.cast_unsigned(),
    }
}

/// The files of a dump, without the link to its parent.
fn list_images(images: &std::path::Path) -> std::io::Result<Vec<ImageFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let name = entry.file_name();
        let invalid = || {
            std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!("CRIU wrote a file named {name:?}"),
            )
        };
        if metadata.is_file() {
            files.push(ImageFile {
                name: name
                    .to_str()
                    .ok_or_else(invalid)?
                    .parse()
                    .map_err(|_| invalid())?,
                size: metadata.len(),
            });
        }
    }
    Ok(files)
}

/// Whether a process is held by a tracer, as CRIU holds every task from seizing it to letting it go.
fn is_traced(pid: i32) -> bool {
    let status = procfs::process::Process::new(pid).and_then(|process| process.status());
    status.is_ok_and(|status| status.tracerpid != 0)
}

fn resident_bytes(tasks: &[Task]) -> u64 {
    tasks
        .iter()
        .map(|task| preflight::resident_bytes(task.pid))
        .sum()
}

//! The copy: its restore started, held, released, looked at or taken away again.

use super::owed::owed_memory;
use super::{ARRIVAL_PATIENCE, Arrival, DISCARD_PAUSE, PAGER_PATIENCE, RESTORE_PATIENCE, Signal};
use crate::criu::environment::Environment;
use crate::criu::hook::HookServer;
use crate::criu::options::Options;
use crate::fault;
use crate::migration::handoff::{TargetEvent, TargetState};
use crate::migration::journal::{Leftover, ProcessName, Record};
use crate::runtime::home::Home;
use crate::runtime::instance::inode_of;
use crate::runtime::runc::MARK;
use crate::runtime::{Task, cgroup};
use crate::target::compose::{Delivery, compose};
use crate::target::pager::{
    FillSummary, Life, PagerEvent, PagerHandle, PagerHandleError, TaskMemory,
};
use crate::target::receive::Receiver;
use crate::target::remains::Found;
use crate::target::restore::{INVENTORY, Restore, RestoreError};
use crate::target::stdio;
use crate::wire::message::{Manifest, Prestart, Requirements};
use crate::wire::peer_error::PeerError;
use std::fs::{self};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

impl Arrival<'_> {
    /// Starts what needs time to start: the pager, and a restore that waits for its inventory.
    pub(super) fn prestart(&mut self, prestart: &Prestart) -> Result<(), (PeerError, String)> {
        if self.restore.is_some() {
            return Err((PeerError::Unexpected, "a second prestart".into()));
        }
        let fail = |doing: &str, error: &dyn std::fmt::Display| {
            (PeerError::RestoreFailed, format!("{doing}: {error}"))
        };
        self.pages_apart = prestart.pages_apart;
        let lazy = self.is_lazy();
        let (images, work) = (self.work.join("images"), self.work.join("work"));
        let config = config_for(prestart, &self.home, self.requirements)
            .map_err(|error| fail("config.json", &error))?;
        fs::write(self.home.path().join("config.json"), config.to_string())
            .map_err(|error| fail("writing config.json", &error))?;
        let id = self.container.as_str();
        if self.host.runc.knows(id) {
            let text = format!("{id} was started here meanwhile, and is left alone");
            return Err((PeerError::ContainerExists, text));
        }
        self.all_cgroups = cgroup::of_container(&config, id)
            .map_err(|error| fail("looking at the cgroups", &error))?;
        self.make_cgroups()?;
        fs::write(
            images.join("descriptors.json"),
            stdio::descriptors(&prestart.stdio),
        )
        .map_err(|error| fail("writing descriptors.json", &error))?;
        let streams = stdio::open(&self.host.program, &prestart.stdio, self.home.path())
            .map_err(|error| fail("opening the standard streams", &error))?;
        if lazy {
            let mut command = Command::new(&self.host.program);
            command.arg("pager");
            let pager = PagerHandle::spawn(command, &work, &self.host.state_dir, PAGER_PATIENCE);
            self.pager = Some(pager.map_err(|error| fail("starting the pager", &error))?);
            self.journal
                .append(&Record::Paged)
                .map_err(|error| fail("journal", &error))?;
        }
        let signal = self.signal.clone();
        let hooks = HookServer::start(
            &self.host.program,
            &self.work,
            self.journal.path(),
            signal.clone(),
            move |hook| {
                if let Ok(watch) = hook.watch() {
                    let signal = signal.clone();
                    thread::spawn(move || {
                        watch();
                        let _ = signal.send(Signal::HookGone);
                    });
                }
                Some(Signal::Hook(hook))
            },
        );
        let hooks = hooks.map_err(|error| fail("installing the hook", &error))?;
        let options_file = self.work.join("criu.conf");
        let options = Options {
            hook: &hooks.script(),
            network_lock: None,
            lazy_pages: lazy,
        };
        fs::write(&options_file, options.text())
            .map_err(|error| fail("writing CRIU's options", &error))?;
        let early_file = self.work.join("criu-early.conf");
        fs::write(&early_file, options.early_text())
            .map_err(|error| fail("writing CRIU's options", &error))?;
        self.hooks = Some(hooks);
        let annotated = annotated_config(&prestart.config);
        let environment = Environment::new(
            self.host.criu.clone(),
            &early_file,
            &options_file,
            annotated.as_deref(),
            Some(&self.host.cache.file),
        );
        let restore = Restore::prestart(
            &self.host.runc,
            &environment,
            self.container.as_str(),
            self.home.path(),
            &images,
            &work,
            streams,
        );
        let restore = restore.map_err(|error| fail("starting the restore", &error))?;
        let pid = restore.pid().cast_signed();
        self.restore = Some(restore);
        let task = Task::read(pid).map_err(|error| fail("looking at the restore", &error))?;
        let leftover = Leftover::Process {
            what: "runc restore".into(),
            process: ProcessName {
                pid,
                start_time: task.map_or(0, |task| task.start_time),
            },
        };
        self.journal
            .append(&Record::Leftover(leftover))
            .map_err(|error| fail("journal", &error))
    }

    /// Makes the container's cgroups, except those that are there and empty. On record before and after: whichever step is the
    /// last, it is known what was made.
    fn make_cgroups(&mut self) -> Result<(), (PeerError, String)> {
        let failed = |path: &Path, error: &dyn std::fmt::Display| {
            let text = format!("making the cgroup {}: {error}", path.display());
            (PeerError::RestoreFailed, text)
        };
        let mut missing = Vec::new();
        for path in &self.all_cgroups {
            if !path.exists() {
                missing.push(path.clone());
            } else if cgroup::is_occupied(path).map_err(|error| failed(path, &error))? {
                let text = format!(
                    "processes that are not its own are in its cgroup {}: end or move them, or give the container another                      linux.cgroupsPath",
                    path.display()
                );
                return Err((PeerError::RestoreFailed, text));
            }
        }
        for path in &missing {
            let path_on_record = Leftover::Cgroup { path: path.clone() };
            self.journal
                .append(&Record::Leftover(path_on_record))
                .map_err(|error| failed(path, &error))?;
        }
        for path in missing {
            match cgroup::make(&path).map_err(|error| failed(&path, &error))? {
                Some(made) => self.made.cgroups.push(made),
                None => return Err(failed(&path, &"somebody else made it in this moment")),
            }
        }
        let cgroups = self.made.cgroups.clone();
        self.journal
            .append(&Record::Leftover(Leftover::MadeCgroups { cgroups }))
            .map_err(|error| (PeerError::StorageFull, error.to_string()))
    }

    fn receiver(&self) -> Result<&Receiver, (PeerError, String)> {
        let none = || (PeerError::Unexpected, "the copy runs already".to_string());
        self.receiver.as_ref().ok_or_else(none)
    }

    /// Waits until every announced frame is in the page store.
    pub(super) fn frames_are_here(&self, frames: &[u64]) -> Result<(), (PeerError, String)> {
        self.receiver()?
            .wait_for_frames(frames, fault::patience(ARRIVAL_PATIENCE))
            .map_err(|error| (PeerError::ReceiveFailed, error.to_string()))
    }

    pub(super) fn everything_is_here(
        &mut self,
        manifest: Manifest,
    ) -> Result<(), (PeerError, String)> {
        self.frames_are_here(&manifest.frames_per_stream)?;
        self.receiver()?
            .wait_for_files(&manifest.image_files, fault::patience(ARRIVAL_PATIENCE))
            .map_err(|error| (PeerError::ImagesUnusable, error.to_string()))?;
        self.manifest = Some(manifest);
        Ok(())
    }

    /// Composes the images and lets CRIU begin.
    pub(super) fn start_restore(&mut self) -> Result<(), (PeerError, String)> {
        let start = Instant::now();
        // Minutes have passed since they were proven, and the restore goes by paths.
        if let Some(moved) = self.shared.iter().find(|proven| !proven.holds()) {
            let path = moved.path().display().to_string();
            return Err((PeerError::BindSourceDiffers, path));
        }
        let images = self.work.join("images");
        let lazy = self.is_lazy();
        let delivery = if lazy {
            Delivery::Lazy
        } else {
            Delivery::InImages
        };
        let manifest = self
            .manifest
            .take()
            .ok_or((PeerError::Unexpected, "no manifest".to_string()))?;
        let mut tasks = Vec::new();
        let mut debts = Vec::new();
        for owner in &manifest.spaces {
            let composed = compose(&images, owner.vpid, owner.space, &self.store, delivery);
            let pages = composed.map_err(|error| (PeerError::PagesMissing, error.to_string()))?;
            if lazy {
                let memfd = self.store.memfd_or_new(owner.space);
                let debt = self.debt_of(owner)?;
                tasks.push(TaskMemory {
                    vpid: owner.vpid.cast_signed(),
                    memfd: memfd.map_err(|error| (PeerError::StorageFull, error.to_string()))?,
                    lazy: pages,
                    hot: Vec::new(),
                    owed: debt.as_ref().map(owed_memory).transpose()?,
                });
                debts.extend(debt);
            }
        }
        self.check_debts(&manifest, &debts)?;
        let fill_failed =
            |error: &dyn std::fmt::Display| (PeerError::FillFailed, error.to_string());
        if let Some(pager) = &mut self.pager {
            pager.set_supply_patience(Duration::from_secs(manifest.reconnect_s.into()));
            pager
                .serve(tasks, &self.all_cgroups, PAGER_PATIENCE)
                .map_err(|error| fill_failed(&error))?;
        }
        let inventory_file = self.work.join(INVENTORY);
        let inventory = fs::read(&inventory_file).map_err(|error| {
            (
                PeerError::ImagesUnusable,
                format!("{}: {error}", inventory_file.display()),
            )
        })?;
        let restore_failed = |error: RestoreError| (PeerError::RestoreFailed, error.to_string());
        let Some(restore) = &mut self.restore else {
            return Err((PeerError::Unexpected, "a manifest without prestart".into()));
        };
        let ready = restore.wait_ready().map_err(restore_failed)?;
        if self.made.record.is_none() {
            // CRIU waits, so the runtime's record is its own.
            let directory = self.host.runc.directory(self.container.as_str());
            self.made.record = inode_of(&directory).ok().flatten();
        }
        if !debts.is_empty() {
            // Asked only now: a slow runtime makes them late.
            if !self.all_cgroups.iter().any(|path| path.is_dir()) {
                let none = "the container has no cgroup of its own to be stopped by".to_string();
                return Err((PeerError::FillFailed, none));
            }
            self.take_in_debts(debts)?;
        }
        self.times.compose = start.elapsed();
        self.times.restore_began = Some(Instant::now());
        self.deadline = Some(Instant::now() + RESTORE_PATIENCE);
        let restore = self.restore.as_mut().expect("it waits for the inventory");
        restore.let_go(ready, &inventory).map_err(restore_failed)
    }

    /// Every page the images name was received: composing proved it. Now the pager must hold all that is to be filled.
    pub(super) fn verify_copy(&mut self) -> Result<(), String> {
        let Some(pager) = &mut self.pager else {
            return Ok(());
        };
        if !self.armed {
            pager
                .wait_armed(PAGER_PATIENCE)
                .map_err(|error| error.to_string())?;
        }
        // Sound before the commit: if the hook fails the restore, CRIU kills the tasks and the pager ends with them.
        pager
            .release(PAGER_PATIENCE)
            .map_err(|error| error.to_string())
    }

    pub(super) fn release_copy(&mut self) -> Option<TargetEvent> {
        self.released = Some(Instant::now());
        self.deadline = Some(Instant::now() + RESTORE_PATIENCE);
        let Some(hook) = self.hook.take() else {
            return Some(TargetEvent::HookLost);
        };
        if self.pager_is_gone() {
            // Without it every missing page would be zero.
            let _ = hook.refuse();
            return Some(TargetEvent::PagerLost);
        }
        hook.go().err().map(|error| {
            self.because(PeerError::RestoreFailed, error.to_string());
            TargetEvent::HookLost
        })
    }

    /// Whether the pager and its standby are gone with pages missing.
    fn pager_is_gone(&mut self) -> bool {
        while let Some(pager) = &mut self.pager {
            match pager.next_event(Duration::ZERO) {
                Ok(None) => break,
                Ok(Some(PagerEvent::Done(summary))) if !summary.is_whole() => {
                    self.miss_pages(&summary);
                }
                Ok(Some(PagerEvent::Done(_))) => {
                    self.pager = None;
                    self.filled = true;
                }
                Ok(Some(event)) => tracing::debug!(?event, "pager"),
                Err(error) => {
                    self.lose_pager(&error);
                }
            }
        }
        self.pager_lost
    }

    /// The socket to the pager has ended. Whether the missing pages are lost with it.
    pub(super) fn lose_pager(&mut self, error: &PagerHandleError) -> bool {
        self.pager = None;
        let released = self.course.state() == TargetState::Released;
        let owed = self.owing.as_ref().is_some_and(|owing| !owing.is_whole());
        match Life::of(&self.work) {
            Life::Done => self.have_filled(),
            // It needs nothing of us: its files will say when it is done, or dead after all.
            Life::Filling if released && !owed => self.watched = true,
            Life::Filling | Life::Dead => {
                self.because(PeerError::FillFailed, error.to_string());
                self.pager_lost = true;
            }
        }
        self.pager_lost
    }

    /// The pager is done, and pages got to no place: they are lost as if it had died.
    pub(super) fn miss_pages(&mut self, summary: &FillSummary) {
        let words = format!(
            "{} pages of the container have no place in its memory here",
            summary.unregistered
        );
        tracing::error!(container = %self.container, ?summary, "{words}");
        self.because(PeerError::FillFailed, words);
        self.pager = None;
        self.pager_lost = true;
    }

    /// Stopped is better than wrong.
    pub(super) fn kill_copy(&mut self) -> TargetEvent {
        tracing::error!(container = %self.container, "its missing pages are lost: the copy is killed, and the source goes on with what it has kept");
        if let Some(owing) = &mut self.owing {
            owing.detach();
        }
        if self.copy().kill() {
            TargetEvent::CopyKilled
        } else {
            thread::sleep(DISCARD_PAUSE);
            TargetEvent::KillFailed
        }
    }

    pub(super) fn inspect_copy(&mut self) -> TargetEvent {
        if let Some(mut restore) = self.restore.take() {
            let deadline = Instant::now() + RESTORE_PATIENCE;
            while matches!(restore.poll(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
        }
        match self.copy().inspect() {
            Found::Running | Found::Gone if self.pager_is_gone() => {
                self.kill_copy();
                TargetEvent::FoundGone
            }
            Found::Running => TargetEvent::FoundRunning,
            Found::NeverRan => TargetEvent::FoundNeverRan,
            Found::Gone => TargetEvent::FoundGone,
            // The source still has it, as it was at the switch.
            Found::Forgotten if self.copy().kill_forgotten() => TargetEvent::FoundLost,
            Found::Forgotten => {
                thread::sleep(DISCARD_PAUSE);
                TargetEvent::LocalFailure
            }
        }
    }

    pub(super) fn discard_copy(&mut self) -> TargetEvent {
        self.deadline = None;
        if let Some(hook) = self.hook.take() {
            let _ = hook.refuse();
        }
        // Ends a restore that waits, holds or works.
        self.restore = None;
        self.pager = None;
        match self.copy().discard() {
            Ok(()) => TargetEvent::CopyDiscarded,
            Err(error) => {
                tracing::warn!(%error, "something of the copy is still there");
                thread::sleep(DISCARD_PAUSE);
                TargetEvent::DiscardFailed
            }
        }
    }
}

/// The source's `config.json` with the place of the root filesystem here, and the mark of this migration.
fn config_for(
    prestart: &Prestart,
    home: &Home,
    requirements: Option<&Requirements>,
) -> Result<serde_json::Value, String> {
    let mut config: serde_json::Value =
        serde_json::from_str(&prestart.config).map_err(|error| error.to_string())?;
    let path = match requirements.and_then(|needs| needs.shared_rootfs.as_ref()) {
        Some(shared) => shared.as_str().to_string(),
        None => home.path().join("rootfs").display().to_string(),
    };
    let root = config
        .get_mut("root")
        .and_then(serde_json::Value::as_object_mut)
        .ok_or("it has no root")?;
    root.insert("path".into(), path.into());
    let annotations = config
        .as_object_mut()
        .ok_or("it is no object")?
        .entry("annotations")
        .or_insert_with(|| serde_json::json!({}));
    // An empty list may be written as null.
    if annotations.is_null() {
        *annotations = serde_json::json!({});
    }
    annotations
        .as_object_mut()
        .ok_or("its annotations are no object")?
        .insert(MARK.into(), home.migration().to_string().into());
    Ok(config)
}

/// The options file that the container's annotation makes the runtime use.
fn annotated_config(config: &str) -> Option<PathBuf> {
    let config: serde_json::Value = serde_json::from_str(config).ok()?;
    let path = config
        .get("annotations")?
        .get("org.criu.config")?
        .as_str()?;
    (!path.is_empty()).then(|| PathBuf::from(path))
}

//! What works on this host, found by trying: `migrate check`.

use crate::criu::binary::Criu;
use crate::criu::kernel_cache::{KernelCache, Skeleton};
use crate::kernel::bugs::{self, By, Feature, Reports, Standing};
use crate::kernel::probe::Missing;
use crate::migration::event::{Finding, Verdict};
use crate::migration::report::Tracker;
use crate::runtime::apart;
use crate::runtime::runc::Runc;
use crate::source::tracker::{TrackerKind, Trackers};
use crate::transport::Identity;
use serde::Serialize;
use std::path::Path;

/// The command that installs what is missing.
const SETUP: &str = "scripts/setup";

/// What was found.
#[derive(Debug, Serialize)]
pub struct HostCheck {
    /// The tracker a migration from here will use.
    pub tracker: Option<Tracker>,
    /// How a container will be frozen here.
    pub freeze: &'static str,
    /// Each thing that was looked at.
    pub findings: Vec<Finding>,
    /// Each known kernel bug, whether it is here or not (`docs/kernel-bugs.md`).
    pub kernel_bugs: Vec<KernelBug>,
}

/// A known kernel bug on this host.
#[derive(Debug, Serialize)]
pub struct KernelBug {
    /// Which.
    pub bug: bugs::Bug,
    /// A few words.
    pub name: &'static str,
    /// Its CVE, the commit that mends it, or where it is described.
    pub reference: &'static str,
    /// Whether it is here.
    pub standing: Standing,
    /// What told so.
    pub by: By,
    /// The kernel's version, as far as it could be read.
    pub kernel: Option<String>,
    /// What it is in the way of.
    pub touches: &'static [Feature],
    /// What goes wrong, one line.
    pub wrong: &'static str,
    /// What is done about it, one line.
    pub remedy: &'static str,
    /// What that needs and does not have here: the trackers touched are avoided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lacks: Option<String>,
}

impl HostCheck {
    /// Whether containers can move from or to here.
    pub fn passes(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.verdict != Verdict::Refused)
    }
}

/// Looks at this host. Makes the identity and CRIU's kernel cache in `state_dir` if they are missing.
pub fn check(state_dir: &Path, runtime_root: &Path) -> HostCheck {
    let mut findings = Vec::new();
    findings.push(privileges());
    let trackers = Trackers::find();
    let kernel = &trackers.kernel;
    tracking(&trackers, &mut findings);
    findings.push(from_result(
        "read memory",
        &kernel.read_memory,
        "process_vm_readv works",
        Verdict::Refused,
    ));
    let freeze = freezer(&mut findings);
    findings.push(match apart::try_out() {
        Ok(()) => found(
            "pager cgroup",
            Verdict::Ok,
            "pagers have a cgroup of their own".into(),
            None,
        ),
        Err(error) => found(
            "pager cgroup",
            Verdict::Warning,
            format!("pagers stay in the agent's cgroup ({error}): what runs the agent must not kill that with it"),
            Some("systemd: KillMode=process"),
        ),
    });
    criu(state_dir, &mut findings);
    findings.push(match Runc::version() {
        Ok(version) => found(
            "runc",
            Verdict::Ok,
            format!("{version}, state in {}", runtime_root.display()),
            None,
        ),
        Err(error) => found("runc", Verdict::Refused, error.to_string(), Some(SETUP)),
    });
    findings.push(match Identity::load_or_create(state_dir) {
        Ok(identity) => found(
            "identity",
            Verdict::Ok,
            identity.fingerprint().to_string(),
            None,
        ),
        Err(error) => found("identity", Verdict::Refused, error.to_string(), None),
    });
    HostCheck {
        tracker: trackers.preferred().map(|kind| match kind {
            TrackerKind::UffdWp => Tracker::UffdWp,
            TrackerKind::SoftDirty => Tracker::SoftDirty,
        }),
        freeze,
        findings,
        kernel_bugs: kernel_bugs(&trackers.bugs),
    }
}

fn privileges() -> Finding {
    if nix::unistd::geteuid().is_root() {
        match crate::kernel::has_sys_resource() {
            Ok(true) => found("privileges", Verdict::Ok, "root".into(), None),
            _ => {
                let text = "root without CAP_SYS_RESOURCE: a container with processes of another user cannot leave, and none with higher resource limits than here can come";
                found("privileges", Verdict::Warning, text.into(), None)
            }
        }
    } else {
        let text = "not root: tracing, freezing and restoring containers need it".into();
        found(
            "privileges",
            Verdict::Refused,
            text,
            Some("sudo migrate check"),
        )
    }
}

fn tracking(trackers: &Trackers, findings: &mut Vec<Finding>) {
    // One tracker is enough: the lack of the other is only worth knowing.
    let lack = if trackers.preferred().is_some() {
        Verdict::Warning
    } else {
        Verdict::Refused
    };
    for (what, kind, works) in [
        (
            "tracker uffd-wp",
            TrackerKind::UffdWp,
            "userfaultfd write tracking works",
        ),
        (
            "tracker soft-dirty",
            TrackerKind::SoftDirty,
            "the soft-dirty bit works",
        ),
    ] {
        findings.push(match trackers.usable(kind) {
            Ok(()) => found(what, Verdict::Ok, works.into(), None),
            Err(objection) => found(what, lack, objection.to_string(), None),
        });
    }
    findings.push(from_result(
        "userfaultfd",
        &trackers.kernel.userfaultfd,
        "userfaultfd(2) works",
        Verdict::Warning,
    ));
    findings.push(from_result(
        "page map scan",
        &trackers.kernel.pagemap_scan,
        "PAGEMAP_SCAN works",
        Verdict::Warning,
    ));
}

fn kernel_bugs(reports: &Reports) -> Vec<KernelBug> {
    let kernel = reports.release.map(|release| release.to_string());
    let reports = reports.each.iter();
    reports
        .map(|report| KernelBug {
            bug: report.known.bug,
            name: report.known.name,
            reference: report.known.reference,
            standing: report.standing,
            by: report.by,
            kernel: kernel.clone(),
            touches: report.known.touches,
            wrong: report.known.wrong,
            remedy: report.known.remedy.does,
            lacks: report.lacks.map(|need| need.to_string()),
        })
        .collect()
}

fn freezer(findings: &mut Vec<Finding>) -> &'static str {
    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let v1 = Path::new("/sys/fs/cgroup/freezer").is_dir();
    let (method, verdict) = match (v2, v1) {
        (true, _) => ("cgroup v2 freezer", Verdict::Ok),
        (false, true) => ("cgroup v1 freezer", Verdict::Ok),
        (false, false) => ("none", Verdict::Refused),
    };
    let fix = (verdict == Verdict::Refused)
        .then_some("mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer");
    findings.push(found("freezer", verdict, method.into(), fix));
    method
}

fn criu(state_dir: &Path, findings: &mut Vec<Finding>) {
    let criu = match Criu::find() {
        Ok(criu) => criu,
        Err(error) => {
            findings.push(found(
                "criu",
                Verdict::Refused,
                error.to_string(),
                Some(SETUP),
            ));
            return;
        }
    };
    let text = format!("{} at {}", criu.version_text(), criu.path().display());
    findings.push(found("criu", Verdict::Ok, text, None));
    findings.push(match KernelCache::prepare(&criu, &state_dir.join("criu")) {
        Ok(cache) => match cache.skeleton {
            Skeleton::Native => found(
                "skeleton dump",
                Verdict::Ok,
                "native: the kernel has soft-dirty".into(),
                None,
            ),
            Skeleton::Prepared => found(
                "skeleton dump",
                Verdict::Ok,
                "with a prepared kernel cache, proven by a canary".into(),
                None,
            ),
            Skeleton::Unavailable(why) => found(
                "skeleton dump",
                Verdict::Warning,
                format!("dumps are full and downtime grows with memory: {why}"),
                None,
            ),
        },
        Err(error) => found("skeleton dump", Verdict::Refused, error.to_string(), None),
    });
    findings.push(if criu.restores_lazily() {
        found("lazy restore", Verdict::Ok, "CRIU restores through userfaultfd".into(), None)
    } else {
        let text = "the kernel lacks userfaultfd events: memory is restored from images, downtime grows with it".into();
        found("lazy restore", Verdict::Warning, text, None)
    });
}

fn from_result<T>(what: &str, result: &Result<T, Missing>, works: &str, lack: Verdict) -> Finding {
    match result {
        Ok(_) => found(what, Verdict::Ok, works.into(), None),
        Err(missing) => found(what, lack, missing.to_string(), None),
    }
}

fn found(what: &str, verdict: Verdict, detail: String, fix: Option<&str>) -> Finding {
    Finding {
        what: what.into(),
        verdict,
        detail,
        fix: fix.map(str::to_owned),
    }
}

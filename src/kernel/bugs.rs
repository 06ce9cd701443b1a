//! The known kernel bugs near dirty tracking, and the rule that says of each whether it is here.
//!
//! The kernel's release, what works and what the probes saw enter; for each bug a [`Report`] leaves: present, possible,
//! fixed or not applicable, and what the engine does about it. Pure: nothing is tried here ([`super::bug_probes`] does).
//!
//! ```text
//!  feature missing ───────────────▶ not applicable
//!  a probe tried it ──────────────▶ present | fixed          (a probe is believed before any version)
//!  release ≥ a release with the fix ▶ fixed
//!  release older than the bug ────▶ not applicable           (only where the release is upstream's own number)
//!  otherwise ─────────────────────▶ possible
//! ```
//!
//! Versions are those of the CVE records of the kernel's CNA, or of the stable release that carried the fix. A distribution
//! that backports fixes without raising the number shows as "possible": what is done about a bug costs little, so that
//! errs on the safe side.

use super::bug_probes::Sightings;
use super::ksm::Ksm;
use super::probe::KernelFeatures;
use serde::Serialize;
use std::fmt;

/// A bug, or a behaviour that a tracker must know about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bug {
    /// Arming a hole in hugetlb memory hangs the scanning thread for ever.
    HugetlbHoleHangs,
    /// `mremap` leaves write protection on memory that is no longer tracked.
    MremapKeepsProtection,
    /// Closing a userfaultfd leaves its write protection behind.
    CloseKeepsProtection,
    /// Pages that become the page of zeros when a huge page is split lose their bits.
    ZeroSplitLosesBits,
    /// A dropped private copy of a file's page looks swapped and not written.
    DroppedCopyLooksSwapped,
    /// A scan does not flag the huge page of zeros.
    HugeZeroNotFlagged,
    /// A scan cannot report soft-dirty.
    ScanLacksSoftDirty,
    /// `mremap` of whole page tables does not set soft-dirty.
    MremapLosesSoftDirty,
    /// Merging mappings loses the soft-dirty mark of a new one.
    MergeLosesSoftDirty,
    /// KSM loses the soft-dirty bit of a page that it merges.
    KsmLosesSoftDirty,
    /// Walking the page tables of huge device memory that is being split crashes the kernel.
    DeviceWalkCrashes,
}

/// What a bug is in the way of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Feature {
    /// The uffd-wp tracker.
    #[serde(rename = "tracker uffd-wp")]
    UffdWp,
    /// The soft-dirty tracker.
    #[serde(rename = "tracker soft-dirty")]
    SoftDirty,
    /// Reading page tables, which both trackers do.
    #[serde(rename = "page map")]
    PageMap,
}

/// What is known of a bug and done about it.
#[derive(Debug)]
pub struct KnownBug {
    /// Which.
    pub bug: Bug,
    /// A few words.
    pub name: &'static str,
    /// The CVE, or the commit in mainline that mends it, or where it is described.
    pub reference: &'static str,
    /// What goes wrong, one line.
    pub wrong: &'static str,
    /// What it is in the way of; it does not apply where none of these works.
    pub touches: &'static [Feature],
    /// How it is found here.
    pub found: Found,
    /// What the engine does about it.
    pub remedy: Remedy,
}

/// How a bug is found.
#[derive(Debug)]
pub enum Found {
    /// It is tried; the versions only count where that was not possible.
    Probe(Option<Versions>),
    /// By version, because trying it is not possible or not safe.
    Version {
        /// Why it is not tried.
        untried: &'static str,
        /// The versions.
        versions: Versions,
    },
}

/// The releases that have a bug.
#[derive(Clone, Copy, Debug)]
pub struct Versions {
    /// The first, if known; else any may have it.
    pub since: Option<[u16; 3]>,
    /// The first without it in each stable series, mainline last: any later series has the fix too. Empty: none is mended.
    pub fixed: &'static [[u16; 3]],
}

/// What the engine does about a bug.
#[derive(Debug)]
pub struct Remedy {
    /// What it does, one line.
    pub does: &'static str,
    /// What it needs for that. Where this is missing, the trackers that the bug touches are not used.
    pub needs: Option<Need>,
}

/// What a remedy may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The kernel shows the physical frames of pages (`CAP_SYS_ADMIN`).
    Frames,
    /// KSM does not merge pages.
    KsmStopped,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Need::Frames => "the frames of pages, shown to CAP_SYS_ADMIN",
            Need::KsmStopped => "KSM stopped: echo 2 > /sys/kernel/mm/ksm/run",
        })
    }
}

const BOTH: &[Feature] = &[Feature::UffdWp, Feature::SoftDirty];

/// All that are known.
pub const KNOWN: &[KnownBug] = &[
    KnownBug {
        bug: Bug::HugetlbHoleHangs,
        name: "hugetlb hole hangs",
        reference: "CVE-2026-72174",
        wrong: "arming a hole in hugetlb memory with PM_SCAN_WP_MATCHING hangs the scanning thread for ever",
        touches: &[Feature::UffdWp],
        found: Found::Version {
            untried: "the thread that tries it cannot be killed",
            versions: Versions {
                since: Some([6, 7, 0]),
                fixed: &[[6, 12, 97], [6, 18, 40], [7, 1, 5], [7, 2, 0]],
            },
        },
        remedy: Remedy {
            does: "hugetlb is never armed: what was registered is looked at again before it is scanned",
            needs: None,
        },
    },
    KnownBug {
        bug: Bug::MremapKeepsProtection,
        name: "mremap keeps protection",
        reference: "CVE-2025-21696",
        wrong: "pages moved by mremap stay write-protected in memory that is not tracked, and look unwritten when it is",
        touches: &[Feature::UffdWp],
        found: Found::Probe(Some(Versions {
            since: Some([5, 7, 0]),
            fixed: &[[6, 12, 11], [6, 13, 0]],
        })),
        remedy: Remedy {
            does: "memory is disarmed when it is registered",
            needs: None,
        },
    },
    KnownBug {
        bug: Bug::CloseKeepsProtection,
        name: "close keeps protection",
        reference: "CVE-2024-36881",
        wrong: "pages stay write-protected when a tracker is closed, and look unwritten to the next one",
        touches: &[Feature::UffdWp],
        found: Found::Probe(Some(Versions {
            since: Some([6, 0, 0]),
            fixed: &[[6, 6, 31], [6, 8, 10], [6, 9, 0]],
        })),
        remedy: Remedy {
            does: "memory is disarmed when it is registered",
            needs: None,
        },
    },
    KnownBug {
        bug: Bug::ZeroSplitLosesBits,
        name: "split to zeros loses bits",
        reference: "commit 9658d698a8a8",
        wrong: "pages that become the page of zeros when a huge page is split lose the written and the soft-dirty bit",
        touches: BOTH,
        found: Found::Probe(Some(Versions {
            since: Some([6, 12, 0]),
            fixed: &[[6, 12, 54], [6, 17, 4], [6, 18, 0]],
        })),
        remedy: Remedy {
            does: "uffd-wp: such a page counts as written; soft-dirty: every page that newly is zeros is sent",
            needs: None,
        },
    },
    KnownBug {
        bug: Bug::DroppedCopyLooksSwapped,
        name: "dropped copy looks swapped",
        reference: "seen on 6.12 and 6.18",
        wrong: "a private copy of a file's page, dropped while armed, leaves a marker: swapped, not written, the file's content",
        touches: &[Feature::UffdWp],
        found: Found::Probe(None),
        remedy: Remedy {
            does: "what looks swapped in a mapping of a file is sent again in every round",
            needs: None,
        },
    },
    KnownBug {
        bug: Bug::HugeZeroNotFlagged,
        name: "huge zeros not flagged",
        reference: "commit 4a5e85f4eb8f",
        wrong: "a scan does not say that the huge page of zeros is zeros: pages dropped and read again look unchanged",
        touches: &[Feature::SoftDirty],
        found: Found::Probe(Some(Versions {
            since: Some([6, 7, 0]),
            fixed: &[[6, 12, 36], [6, 15, 5], [6, 16, 0]],
        })),
        remedy: Remedy {
            does: "the classic page map is read instead, and zeros are told by their frames",
            needs: Some(Need::Frames),
        },
    },
    KnownBug {
        bug: Bug::ScanLacksSoftDirty,
        name: "scan lacks soft-dirty",
        reference: "CRIU issue 2334",
        wrong: "PAGEMAP_SCAN of 6.7 refuses to report the soft-dirty bit",
        touches: &[Feature::SoftDirty],
        found: Found::Probe(Some(Versions {
            since: Some([6, 7, 0]),
            fixed: &[[6, 8, 0]],
        })),
        remedy: Remedy {
            does: "the classic page map is read instead",
            needs: Some(Need::Frames),
        },
    },
    KnownBug {
        bug: Bug::MremapLosesSoftDirty,
        name: "mremap loses soft-dirty",
        reference: "seen on 6.1 and 6.12",
        wrong: "mremap that moves a whole page table (2 MiB, aligned) does not set the soft-dirty bit of its pages",
        touches: &[Feature::SoftDirty],
        found: Found::Probe(None),
        remedy: Remedy {
            does: "a moved page table is known by a frame of it, and all its pages are sent",
            needs: Some(Need::Frames),
        },
    },
    KnownBug {
        bug: Bug::MergeLosesSoftDirty,
        name: "merge loses soft-dirty",
        reference: "commit 6707915e030a",
        wrong: "when mappings merge, the mark that the whole of a new one is soft-dirty may be lost",
        touches: &[Feature::SoftDirty],
        found: Found::Version {
            untried: "nothing depends on it",
            versions: Versions {
                since: None,
                fixed: &[[6, 18, 37], [6, 19, 0]],
            },
        },
        remedy: Remedy {
            does: "not relied on: pages that are new since the last scan are sent, whatever their mapping says",
            needs: None,
        },
    },
    KnownBug {
        bug: Bug::KsmLosesSoftDirty,
        name: "ksm loses soft-dirty",
        reference: "replace_page in mm/ksm.c",
        wrong: "when KSM merges a written page, its new entry lacks the soft-dirty bit: the write is never reported",
        touches: &[Feature::SoftDirty],
        found: Found::Version {
            untried: "that would switch KSM on for the whole host",
            versions: Versions {
                since: None,
                fixed: &[],
            },
        },
        remedy: Remedy {
            does: "KSM is asked at every scan: where it may have merged since the last, all pages are sent",
            needs: Some(Need::KsmStopped),
        },
    },
    KnownBug {
        bug: Bug::DeviceWalkCrashes,
        name: "device walk crashes",
        reference: "CVE-2026-31456",
        wrong: "walking the page tables of huge device memory (VFIO) while it is being split crashes the kernel",
        touches: &[Feature::PageMap],
        found: Found::Version {
            untried: "it crashes the kernel",
            versions: Versions {
                since: Some([6, 12, 0]),
                fixed: &[[6, 18, 21], [6, 19, 11], [7, 0, 0]],
            },
        },
        remedy: Remedy {
            does: "not sought: only private mappings of ordinary memory are walked, no devices",
            needs: None,
        },
    },
];

/// What a kernel calls itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Upstream's number, the stable level last.
    pub version: [u16; 3],
    /// Whether the stable level is known. Where a distribution puts a number of its own in its place, it is not, and the
    /// kernel may have more than the number says.
    pub exact: bool,
}

impl Release {
    /// Reads `uname -r` and `uname -v`. Debian's `-r` (`6.1.0-41-amd64`) has no stable level, its `-v`
    /// (`… Debian 6.1.158-1`) has. `None` if neither begins with a version.
    pub fn parse(release: &str, version: &str) -> Option<Release> {
        let mut words = version.split_whitespace();
        let debian = words
            .find(|word| *word == "Debian")
            .and_then(|_| words.next())
            .and_then(numbers);
        if let Some((version, _)) = debian {
            return Some(Release {
                version,
                exact: true,
            });
        }
        let (version, rest) = numbers(release)?;
        // 6.8.0-45-generic, 5.14.0-503.el9: level 0 and a build number stand for no stable release.
        let vendor = version[2] == 0 && rest.starts_with('-');
        Some(Release {
            version,
            exact: !vendor,
        })
    }

    /// The running kernel's.
    pub fn here() -> Option<Release> {
        let uname = nix::sys::utsname::uname().ok()?;
        Release::parse(uname.release().to_str()?, uname.version().to_str()?)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, level] = self.version;
        write!(f, "{major}.{minor}.{level}")
    }
}

/// `major.minor[.level]` at the start of a text, and what follows.
fn numbers(text: &str) -> Option<([u16; 3], &str)> {
    let mut version = [0; 3];
    let mut rest = text;
    for (index, number) in version.iter_mut().enumerate() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        *number = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        match rest.strip_prefix('.') {
            Some(more) if index < 2 && more.starts_with(|c: char| c.is_ascii_digit()) => {
                rest = more
            }
            _ if index == 0 => return None,
            _ => break,
        }
    }
    Some((version, rest))
}

/// Whether a bug is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It showed when it was tried.
    Present,
    /// It was not tried, and by its version this kernel may have it.
    Possible,
    /// It did not show, or by its version this kernel has the fix.
    Fixed,
    /// What it is in the way of does not work here, or this kernel is older than the bug.
    NotApplicable,
}

/// What told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Trying it.
    Probe,
    /// The kernel's version.
    Version,
    /// The lack of what it is in the way of.
    Feature,
}

/// What works here, as far as the rule asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// The uffd-wp tracker's mechanism.
    pub uffd_wp: bool,
    /// The soft-dirty bit.
    pub soft_dirty: bool,
    /// The frames of pages are shown.
    pub frames: bool,
    /// KSM does not merge pages.
    pub ksm_stopped: bool,
}

impl Abilities {
    fn has(self, feature: Feature) -> bool {
        match feature {
            Feature::UffdWp => self.uffd_wp,
            Feature::SoftDirty => self.soft_dirty,
            Feature::PageMap => true,
        }
    }

    fn meets(self, need: Need) -> bool {
        match need {
            Need::Frames => self.frames,
            Need::KsmStopped => self.ksm_stopped,
        }
    }
}

/// Whether `known` is here, and what told so.
pub fn standing(
    known: &KnownBug,
    release: Option<Release>,
    abilities: Abilities,
    seen: Option<bool>,
) -> (Standing, By) {
    if !known.touches.iter().any(|feature| abilities.has(*feature)) {
        return (Standing::NotApplicable, By::Feature);
    }
    match seen {
        Some(true) => return (Standing::Present, By::Probe),
        Some(false) => return (Standing::Fixed, By::Probe),
        None => {}
    }
    let versions = match &known.found {
        Found::Probe(versions) => *versions,
        Found::Version { versions, .. } => Some(*versions),
    };
    let standing = match (versions, release) {
        (Some(versions), Some(release)) => versions.standing(release),
        _ => Standing::Possible,
    };
    (standing, By::Version)
}

impl Versions {
    fn standing(self, release: Release) -> Standing {
        let series = |version: [u16; 3]| (version[0], version[1]);
        let has_fix = |fix: &[u16; 3]| {
            series(*fix) == series(release.version) && release.version[2] >= fix[2]
        };
        let past_mainline = |fix: &[u16; 3]| series(release.version) > series(*fix);
        if self.fixed.iter().any(has_fix) || self.fixed.last().is_some_and(past_mainline) {
            Standing::Fixed
        } else if release.exact && self.since.is_some_and(|since| release.version < since) {
            Standing::NotApplicable
        } else {
            Standing::Possible
        }
    }
}

/// One bug on this kernel.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// The bug.
    pub known: &'static KnownBug,
    /// Whether it is here.
    pub standing: Standing,
    /// What told.
    pub by: By,
    /// What its remedy needs and does not have: the trackers it touches are then not used.
    pub lacks: Option<Need>,
}

impl Report {
    /// Whether it is here, or may be.
    pub fn threatens(&self) -> bool {
        matches!(self.standing, Standing::Present | Standing::Possible)
    }
}

/// All known bugs on one kernel.
#[derive(Debug)]
pub struct Reports {
    /// The kernel's release, if it could be read.
    pub release: Option<Release>,
    /// One for each of [`KNOWN`], in that order.
    pub each: Vec<Report>,
}

impl Reports {
    /// Of the running kernel, by its release and by trying.
    pub fn here(kernel: &KernelFeatures) -> Reports {
        let abilities = Abilities {
            uffd_wp: kernel.write_tracking.is_ok(),
            soft_dirty: kernel.soft_dirty.is_ok(),
            frames: super::bug_probes::shows_frames().unwrap_or(false),
            ksm_stopped: !Ksm::here().state().merges(),
        };
        Reports::new(Release::here(), abilities, &Sightings::look(kernel))
    }

    /// Of a kernel with this release, these abilities and these sightings.
    pub fn new(release: Option<Release>, abilities: Abilities, seen: &Sightings) -> Reports {
        let report = |known: &'static KnownBug| {
            let (standing, by) = standing(known, release, abilities, seen.of(known.bug));
            let mut report = Report {
                known,
                standing,
                by,
                lacks: None,
            };
            if report.threatens() {
                report.lacks = known.remedy.needs.filter(|need| !abilities.meets(*need));
            }
            report
        };
        Reports {
            release,
            each: KNOWN.iter().map(report).collect(),
        }
    }

    /// Whether a bug is here, or may be.
    pub fn threatens(&self, bug: Bug) -> bool {
        let mut reports = self.each.iter();
        reports.any(|report| report.known.bug == bug && report.threatens())
    }

    /// The bug for which a tracker must not be used, if there is one, and what its remedy needs and does not have here.
    pub fn against(&self, tracker: Feature) -> Option<(&'static KnownBug, Need)> {
        let mut touching = self
            .each
            .iter()
            .filter(|report| report.known.touches.contains(&tracker));
        touching.find_map(|report| report.lacks.map(|need| (report.known, need)))
    }
}

#[cfg(test)]
#[path = "bugs/tests.rs"]
mod tests;

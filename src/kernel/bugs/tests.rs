use super::*;

const ALL: Abilities = Abilities {
    uffd_wp: true,
    soft_dirty: true,
    frames: true,
    ksm_stopped: true,
};

const DEBIAN_12: &str = "6.1.0-41-cloud-amd64";
const DEBIAN_12_VERSION: &str = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.158-1 (2025-11-09)";

fn known(bug: Bug) -> &'static KnownBug {
    let mut all = KNOWN.iter();
    all.find(|known| known.bug == bug).expect("it is listed")
}

/// Whether a bug is on a kernel by its version alone.
fn on(bug: Bug, release: &str) -> Standing {
    let release = Release::parse(release, "#1 SMP PREEMPT_DYNAMIC");
    standing(known(bug), release, ALL, None).0
}

#[test]
fn a_release_is_read_as_its_maker_writes_it() {
    let cases = [
        (DEBIAN_12, DEBIAN_12_VERSION, Some(([6, 1, 158], true))),
        (
            "6.12.48+deb13-cloud-amd64",
            "#1 SMP PREEMPT_DYNAMIC Debian 6.12.48-1 (2025-09-20)",
            Some(([6, 12, 48], true)),
        ),
        ("6.12.48+deb13-cloud-amd64", "", Some(([6, 12, 48], true))),
        (
            "6.18.44-fc-v657",
            "#1 SMP PREEMPT_DYNAMIC @0",
            Some(([6, 18, 44], true)),
        ),
        ("6.18.44", "", Some(([6, 18, 44], true))),
        ("7.2", "", Some(([7, 2, 0], true))),
        (
            "6.8.0-45-generic",
            "#45-Ubuntu SMP PREEMPT_DYNAMIC",
            Some(([6, 8, 0], false)),
        ),
        ("5.14.0-503.el9.x86_64", "#1 SMP", Some(([5, 14, 0], false))),
        (
            "6.19.0-rc3",
            "#1 SMP Debian unofficial",
            Some(([6, 19, 0], false)),
        ),
        ("6.12.", "", Some(([6, 12, 0], true))),
        ("6", "", None),
        ("6.", "", None),
        ("", "", None),
        ("linux", "Debian", None),
        ("6.99999.1", "", None),
        (".1.2", "", None),
        ("6.x.1", "", None),
    ];
    for (release, version, expected) in cases {
        let parsed = Release::parse(release, version).map(|parsed| (parsed.version, parsed.exact));
        assert_eq!(parsed, expected, "{release:?} {version:?}");
    }
    assert!(Release::here().is_some());
}

#[test]
fn the_fix_of_a_stable_series_counts_in_that_series_only() {
    use Bug::{DeviceWalkCrashes, HugetlbHoleHangs, MremapKeepsProtection, ZeroSplitLosesBits};
    use Standing::{Fixed, NotApplicable, Possible};
    for (bug, release, expected) in [
        (HugetlbHoleHangs, "6.6.120", NotApplicable),
        (HugetlbHoleHangs, "6.7.0", Possible),
        (HugetlbHoleHangs, "6.12.96", Possible),
        (HugetlbHoleHangs, "6.12.97", Fixed),
        (HugetlbHoleHangs, "6.17.99", Possible),
        (HugetlbHoleHangs, "6.18.39", Possible),
        (HugetlbHoleHangs, "6.18.44", Fixed),
        (HugetlbHoleHangs, "7.0.30", Possible),
        (HugetlbHoleHangs, "7.1.5", Fixed),
        (HugetlbHoleHangs, "7.2", Fixed),
        (HugetlbHoleHangs, "8.0.1", Fixed),
        (MremapKeepsProtection, "6.12.10", Possible),
        (MremapKeepsProtection, "6.12.48+deb13-cloud-amd64", Fixed),
        (MremapKeepsProtection, "6.13.0", Fixed),
        (ZeroSplitLosesBits, "6.11.9", NotApplicable),
        (ZeroSplitLosesBits, "6.12.48+deb13-cloud-amd64", Possible),
        (ZeroSplitLosesBits, "6.12.54", Fixed),
        (ZeroSplitLosesBits, "6.16.12", Possible),
        (ZeroSplitLosesBits, "6.18.44", Fixed),
        (DeviceWalkCrashes, "6.12.97", Possible),
        (DeviceWalkCrashes, "6.18.44", Fixed),
    ] {
        assert_eq!(on(bug, release), expected, "{bug:?} on {release}");
    }
}

#[test]
fn a_distributions_own_number_never_says_that_a_kernel_is_older_than_a_bug() {
    // RHEL 9 calls itself 5.14 and has PAGEMAP_SCAN.
    for release in ["5.14.0-503.el9.x86_64", "6.8.0-45-generic"] {
        let stands = on(Bug::HugetlbHoleHangs, release);
        assert_eq!(stands, Standing::Possible, "{release}");
    }
    // What mainline had before the number was given is in it.
    assert_eq!(
        on(Bug::CloseKeepsProtection, "6.11.0-9-generic"),
        Standing::Fixed
    );
}

#[test]
fn without_a_release_every_bug_that_has_not_been_tried_is_possible() {
    for known in KNOWN {
        let stands = standing(known, None, ALL, None);
        assert_eq!(stands, (Standing::Possible, By::Version), "{:?}", known.bug);
    }
}

#[test]
fn a_probe_is_believed_before_any_version() {
    for known in KNOWN {
        for release in ["4.19.0", "6.12.9", "6.18.44", "99.0", "odd"] {
            let release = Release::parse(release, "");
            let with = |seen| standing(known, release, ALL, Some(seen));
            assert_eq!(with(true), (Standing::Present, By::Probe));
            assert_eq!(with(false), (Standing::Fixed, By::Probe));
        }
    }
}

#[test]
fn where_a_feature_is_missing_its_bugs_do_not_apply() {
    let debian_12 = Release::parse(DEBIAN_12, DEBIAN_12_VERSION);
    let abilities = Abilities {
        uffd_wp: false,
        ..ALL
    };
    let reports = Reports::new(debian_12, abilities, &Sightings::default());
    for report in &reports.each {
        if report.known.touches == [Feature::UffdWp] {
            let told = (report.standing, report.by);
            assert_eq!(told, (Standing::NotApplicable, By::Feature));
        }
    }
    assert!(!reports.threatens(Bug::MremapKeepsProtection));
    assert!(reports.threatens(Bug::MergeLosesSoftDirty));
}

#[test]
fn a_tracker_is_not_used_where_the_remedy_for_its_bug_does_not_work() {
    let mut seen = Sightings::default();
    seen.add(Bug::MremapLosesSoftDirty, Some(true));
    let release = Release::parse("6.18.44", "");
    let blind = Abilities {
        frames: false,
        ..ALL
    };
    let reports = Reports::new(release, blind, &seen);
    let against = reports.against(Feature::SoftDirty).expect("avoided");
    assert_eq!(
        (against.0.bug, against.1),
        (Bug::MremapLosesSoftDirty, Need::Frames)
    );
    assert!(reports.against(Feature::UffdWp).is_none());

    let sighted = Reports::new(release, ALL, &seen);
    assert!(sighted.against(Feature::SoftDirty).is_none());
    assert!(sighted.threatens(Bug::MremapLosesSoftDirty));

    // Where the bug is not, nothing is needed.
    let mut seen = Sightings::default();
    seen.add(Bug::MremapLosesSoftDirty, Some(false));
    assert!(
        Reports::new(release, blind, &seen)
            .against(Feature::SoftDirty)
            .is_none()
    );
}

#[test]
fn soft_dirty_is_not_used_while_ksm_merges_and_the_remedy_is_told() {
    let merging = Abilities {
        ksm_stopped: false,
        ..ALL
    };
    for release in ["6.1.158", "6.18.44", "99.0"] {
        let release = Release::parse(release, "");
        let reports = Reports::new(release, merging, &Sightings::default());
        let (bug, need) = reports.against(Feature::SoftDirty).expect("avoided");
        assert_eq!(bug.bug, Bug::KsmLosesSoftDirty);
        assert!(need.to_string().contains("echo 2 > /sys/kernel/mm/ksm/run"));
        // A lost bit of uffd-wp means "written".
        assert!(reports.against(Feature::UffdWp).is_none());
        let stopped = Reports::new(release, ALL, &Sightings::default());
        assert!(stopped.against(Feature::SoftDirty).is_none());
    }
}

#[test]
fn every_bug_is_listed_once_with_a_source_a_harm_and_a_remedy() {
    for (index, known) in KNOWN.iter().enumerate() {
        for text in [known.name, known.reference, known.wrong, known.remedy.does] {
            assert!(!text.is_empty() && !text.contains('\n'), "{:?}", known.bug);
        }
        assert!(!known.touches.is_empty(), "{:?}", known.bug);
        assert!(
            KNOWN[..index].iter().all(|other| other.bug != known.bug),
            "{:?}",
            known.bug
        );
        if let Found::Probe(Some(versions)) | Found::Version { versions, .. } = &known.found {
            assert!(
                versions.fixed.is_sorted() && versions.fixed.first() > versions.since.as_ref()
                    || versions.fixed.is_empty() && versions.since.is_none(),
                "{:?}",
                known.bug
            );
        }
    }
}

#[test]
fn the_document_has_every_bug_as_the_code_has_it() {
    let document = include_str!("../../../docs/kernel-bugs.md");
    let mut lacking = KNOWN.iter().map(row).collect::<Vec<_>>();
    lacking.retain(|row| !document.contains(row));
    assert!(
        lacking.is_empty(),
        "docs/kernel-bugs.md lacks\n{}",
        lacking.join("\n")
    );
    let rows = document
        .lines()
        .filter(|line| line.starts_with("| **"))
        .count();
    assert_eq!(rows, KNOWN.len(), "docs/kernel-bugs.md has other rows");
}

/// A bug's line in the document.
fn row(known: &KnownBug) -> String {
    let number = |[major, minor, level]: [u16; 3]| match level {
        0 => format!("{major}.{minor}"),
        _ => format!("{major}.{minor}.{level}"),
    };
    let releases = |versions: &Versions| {
        let since = versions.since.map_or("any".into(), number);
        let fixed: Vec<String> = versions.fixed.iter().copied().map(number).collect();
        match fixed.as_slice() {
            [] => format!("since {since}, not fixed"),
            fixed => format!("since {since}, fixed in {}", fixed.join(", ")),
        }
    };
    let found = match &known.found {
        Found::Probe(None) => "probe".into(),
        Found::Probe(Some(versions)) => format!("probe; {}", releases(versions)),
        Found::Version { untried, versions } => {
            format!("{}; not tried: {untried}", releases(versions))
        }
    };
    let needs = known
        .remedy
        .needs
        .map_or(String::new(), |need| format!(" (needs {need})"));
    format!(
        "| **{}** {} | {} | {found} | {}{needs} |",
        known.name, known.reference, known.wrong, known.remedy.does
    )
}

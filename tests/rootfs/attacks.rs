//! A source that lies, a destination that is full or mounted over, and the removal of what was received.

use crate::harness::{Dice, Link, ROOMY, Trees, private_mounts, see};
use migrate::source::rootfs::SourceError;
use migrate::target::rootfs::{Limits, RemoveError, RootfsTarget, TargetError, remove_tree};
use migrate::wire::rootfs::{
    ContentHash, Counts, Entry, FrameError, Kind, Owner, Placement, Refusal, Timestamp, ToSource,
    ToTarget, TreePath,
};
use nix::mount::{MsFlags, mount};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;

/// A target with something worth attacking beside it, at `../outside/victim` of the destination.
struct Prey {
    trees: Trees,
    limits: Limits,
}

impl Prey {
    fn new() -> Prey {
        let trees = Trees::new();
        let outside = trees.home.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("victim"), b"untouched").unwrap();
        fs::set_permissions(outside.join("victim"), fs::Permissions::from_mode(0o640)).unwrap();
        Prey {
            trees,
            limits: ROOMY,
        }
    }

    fn outside(&self) -> Vec<u8> {
        use std::os::unix::ffi::OsStrExt;
        self.trees
            .home
            .path()
            .join("outside")
            .as_os_str()
            .as_bytes()
            .to_vec()
    }

    /// Sends raw bytes after a proper `Begin` and returns what the target made of them and what it said,
    /// having checked that nothing beside the destination was touched.
    fn attack(&self, bytes: &[u8]) -> (TargetError, Option<Refusal>) {
        let before = see(&self.trees.home.path().join("outside"));
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut target = RootfsTarget::new(&self.trees.target, self.limits).unwrap();
        let serving = std::thread::spawn(move || target.serve(&mut theirs));
        let mut begin = Vec::new();
        ToTarget::Begin {
            first: true,
            seed: 1,
        }
        .encode(&mut begin);
        ours.write_all(&begin).unwrap();
        // The target may have given up, and closed, before all is sent.
        let _ = ours.write_all(bytes);
        let _ = ours.shutdown(std::net::Shutdown::Write);
        let error = serving
            .join()
            .unwrap()
            .expect_err("the attack was accepted");
        let mut said = None;
        while let Ok(message) = ToSource::read(&mut ours, &mut Vec::new()) {
            if let ToSource::Failed(refusal) = message {
                said = Some(refusal);
            }
        }
        assert_eq!(before, see(&self.trees.home.path().join("outside")));
        let names: Vec<_> = fs::read_dir(self.trees.home.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(
            names.len(),
            3,
            "something was made beside the destination: {names:?}"
        );
        (error, said)
    }

    fn attack_with(&self, messages: &[ToTarget<'_>]) -> (TargetError, Option<Refusal>) {
        let mut bytes = Vec::new();
        messages
            .iter()
            .for_each(|message| message.encode(&mut bytes));
        self.attack(&bytes)
    }
}

fn path(path: &str) -> TreePath {
    TreePath::parse(path.as_bytes()).unwrap()
}

fn entry(at: &str, kind: Kind) -> Entry {
    Entry {
        path: path(at),
        kind,
        mode: 0o755,
        owner: Owner { uid: 0, gid: 0 },
        mtime: Timestamp {
            seconds: 1,
            nanoseconds: 1,
        },
        xattrs: Vec::new(),
    }
}

fn put<'a>(at: &str, kind: Kind) -> ToTarget<'a> {
    ToTarget::Put(entry(at, kind))
}

fn file(size: u64) -> Kind {
    Kind::Regular {
        size,
        placement: Placement::New,
    }
}

fn change(size: u64) -> Kind {
    Kind::Regular {
        size,
        placement: Placement::Update,
    }
}

fn file_end<'a>() -> ToTarget<'a> {
    ToTarget::FileEnd(ContentHash::new().finish())
}

#[test]
fn a_symlink_planted_first_is_never_passed_through() {
    let prey = Prey::new();
    let out = || put("door", Kind::Symlink(prey.outside()));
    let relative = || put("door", Kind::Symlink(b"../outside".to_vec()));
    let time = Timestamp {
        seconds: 5,
        nanoseconds: 5,
    };
    for door in [out(), relative()] {
        let through: [&[ToTarget<'_>]; 9] = [
            &[put("door/planted", file(1))],
            &[put("door/victim", change(0))],
            &[put("door/planted", Kind::Directory)],
            &[put("door/planted", Kind::Fifo)],
            &[ToTarget::Link {
                path: path("stolen"),
                existing: path("door/victim"),
            }],
            &[
                put("mine", file(0)),
                file_end(),
                ToTarget::Link {
                    path: path("door/mine"),
                    existing: path("mine"),
                },
            ],
            &[ToTarget::Remove(path("door/victim"))],
            &[ToTarget::DirTime(path("door"), time)],
            &[ToTarget::DirTime(path("door/x"), time)],
        ];
        for messages in through {
            let all: Vec<_> = std::iter::once(door.clone())
                .chain(messages.iter().cloned())
                .collect();
            let (error, said) = prey.attack_with(&all);
            assert!(
                matches!(error, TargetError::Unreachable { .. }),
                "{messages:?}: {error:?}"
            );
            assert_eq!(said, Some(Refusal::Request));
        }
        // The link itself is no file to be changed either.
        let (error, _) = prey.attack_with(&[door.clone(), put("door", change(0))]);
        assert!(matches!(error, TargetError::WrongType { .. }), "{error:?}");
    }
}

#[test]
fn a_directory_replaced_by_a_symlink_is_not_remembered_as_a_directory() {
    let prey = Prey::new();
    let (error, _) = prey.attack_with(&[
        put("d", Kind::Directory),
        put("d/f", file(0)),
        file_end(),
        ToTarget::Remove(path("d")),
        put("d", Kind::Symlink(prey.outside())),
        put("d/planted", file(0)),
    ]);
    assert!(
        matches!(error, TargetError::Unreachable { .. }),
        "{error:?}"
    );
    // Without removing it first.
    let (error, _) = prey.attack_with(&[
        put("d", Kind::Directory),
        put("d/f", file(0)),
        file_end(),
        put("d", Kind::Symlink(prey.outside())),
        put("d/planted", file(0)),
    ]);
    assert!(
        matches!(error, TargetError::Unreachable { .. }),
        "{error:?}"
    );
}

#[test]
fn removing_a_symlink_or_a_tree_with_one_leaves_what_it_points_to() {
    let prey = Prey::new();
    let (error, _) = prey.attack_with(&[
        put("d", Kind::Directory),
        put("d/door", Kind::Symlink(prey.outside())),
        put("door", Kind::Symlink(prey.outside())),
        ToTarget::Remove(path("door")),
        ToTarget::Remove(path("d")),
        ToTarget::Done,
    ]);
    assert!(matches!(error, TargetError::OutOfTurn { .. }), "{error:?}");
    assert_eq!(fs::read_dir(&prey.trees.target).unwrap().count(), 0);
}

#[test]
fn metadata_of_a_symlink_is_its_own() {
    let prey = Prey::new();
    let mut link = entry(
        "door",
        Kind::Symlink([&prey.outside()[..], b"/victim"].concat()),
    );
    link.mode = 0o777;
    link.owner = Owner { uid: 99, gid: 99 };
    link.xattrs.push(migrate::wire::rootfs::Xattr {
        name: b"trusted.x".to_vec(),
        value: b"1".to_vec(),
    });
    let (error, _) = prey.attack_with(&[ToTarget::Put(link), ToTarget::Done]);
    assert!(matches!(error, TargetError::OutOfTurn { .. }), "{error:?}");
    assert_eq!(
        fs::symlink_metadata(prey.trees.target.join("door"))
            .unwrap()
            .uid(),
        99
    );
}

#[test]
fn paths_out_of_the_tree_are_refused() {
    let prey = Prey::new();
    for bad in [
        &b"../outside/planted"[..],
        b"/tmp/planted",
        b"a/../../outside/x",
        b".",
        b"a//b",
        b"a\0b",
        b"a/",
    ] {
        for kind in [7u16, 8] {
            let mut body = (bad.len() as u16).to_le_bytes().to_vec();
            body.extend_from_slice(bad);
            if kind == 7 {
                body.extend_from_slice(b"\x01\0a");
            }
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend_from_slice(&[0, 0]);
            bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&body);
            let (error, said) = prey.attack(&bytes);
            assert!(
                matches!(error, TargetError::Frame(FrameError::Path { .. })),
                "{bad:?}: {error:?}"
            );
            assert_eq!(said, Some(Refusal::Request));
        }
    }
    // The root is neither removed nor linked nor linked over.
    for message in [
        ToTarget::Remove(TreePath::root()),
        ToTarget::Link {
            path: TreePath::root(),
            existing: path("f"),
        },
        ToTarget::Link {
            path: path("g"),
            existing: TreePath::root(),
        },
    ] {
        let (error, _) = prey.attack_with(&[put("f", file(0)), file_end(), message]);
        assert!(matches!(error, TargetError::WrongType { .. }), "{error:?}");
    }
}

#[test]
fn a_device_in_the_place_of_a_file_is_not_written_to() {
    let prey = Prey::new();
    let (error, _) = prey.attack_with(&[
        put("zero", Kind::CharDevice { major: 1, minor: 5 }),
        put("zero", change(1)),
    ]);
    assert!(matches!(error, TargetError::WrongType { .. }), "{error:?}");
    // Nor is a pipe opened, which would block.
    let (error, _) = prey.attack_with(&[put("pipe", Kind::Fifo), put("pipe", change(1))]);
    assert!(matches!(error, TargetError::WrongType { .. }), "{error:?}");
    let (error, _) = prey.attack_with(&[
        put("dir", Kind::Directory),
        ToTarget::Link {
            path: path("l"),
            existing: path("dir"),
        },
    ]);
    assert!(matches!(error, TargetError::WrongType { .. }), "{error:?}");
}

#[test]
fn frames_out_of_turn_and_content_out_of_bounds_are_refused() {
    let prey = Prey::new();
    let data = |offset| ToTarget::Data {
        offset,
        bytes: b"12345",
    };
    for messages in [
        vec![data(0)],
        vec![ToTarget::Hole { offset: 0, len: 1 }],
        vec![file_end()],
        vec![put("f", file(5)), put("g", file(5))],
        vec![put("f", file(5)), ToTarget::End(Counts::default())],
        vec![put("f", file(5)), ToTarget::Done],
        vec![ToTarget::Begin {
            first: false,
            seed: 0,
        }],
    ] {
        let (error, _) = prey.attack_with(&messages);
        assert!(
            matches!(error, TargetError::OutOfTurn { .. }),
            "{messages:?}: {error:?}"
        );
    }
    for content in [
        data(1),
        data(u64::MAX),
        ToTarget::Hole { offset: 0, len: 6 },
        ToTarget::Hole {
            offset: u64::MAX,
            len: 2,
        },
    ] {
        let (error, _) = prey.attack_with(&[put("f", file(5)), content]);
        assert!(matches!(error, TargetError::BeyondEnd { .. }), "{error:?}");
    }
    let (error, said) = prey.attack_with(&[put("f", file(5)), data(0), file_end()]);
    assert!(matches!(error, TargetError::Corrupt { .. }), "{error:?}");
    assert_eq!(said, Some(Refusal::Integrity));
    let (error, said) = prey.attack_with(&[put("f", Kind::Fifo), ToTarget::End(Counts::default())]);
    assert!(
        matches!(error, TargetError::CountsDiffer { .. }),
        "{error:?}"
    );
    assert_eq!(said, Some(Refusal::Integrity));
    // A size no filesystem takes.
    let (error, _) = prey.attack_with(&[put("f", file(i64::MAX as u64))]);
    assert!(matches!(error, TargetError::Filesystem { .. }), "{error:?}");
    // The stream breaks in the middle of a frame.
    let (error, _) = prey.attack(&[4, 0, 0, 0, 100, 0]);
    assert!(
        matches!(error, TargetError::Frame(FrameError::Stream(_))),
        "{error:?}"
    );
}

#[test]
fn more_entries_or_bytes_than_allowed_are_refused() {
    let mut prey = Prey::new();
    prey.limits.entries = 10;
    let many: Vec<_> = (0..11).map(|i| put(&format!("p{i}"), Kind::Fifo)).collect();
    let (error, said) = prey.attack_with(&many);
    assert!(
        matches!(error, TargetError::TooManyEntries { limit: 10 }),
        "{error:?}"
    );
    assert_eq!(said, Some(Refusal::TooManyEntries));
    remove_tree(&prey.trees.target).unwrap();
    // Made and removed again, they do not count.
    let again: Vec<_> = (0..50)
        .flat_map(|_| [put("p", Kind::Fifo), ToTarget::Remove(path("p"))])
        .chain([ToTarget::Done])
        .collect();
    let (error, _) = prey.attack_with(&again);
    assert!(matches!(error, TargetError::OutOfTurn { .. }), "{error:?}");

    let trees = Trees::new();
    for i in 0..8 {
        fs::write(trees.source.join(format!("f{i}")), Dice(i).bytes(1 << 20)).unwrap();
    }
    fs::File::create(trees.source.join("hole"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let bytes = 6 << 20;
    let mut link = Link::new(&trees.source, &trees.target, Limits { bytes, ..ROOMY });
    let error = link.try_first().unwrap_err();
    assert!(
        matches!(error, SourceError::Refused(Refusal::TooManyBytes)),
        "{error:?}"
    );
    assert!(
        matches!(link.hang_up(), Err(TargetError::TooManyBytes { limit, .. }) if limit == bytes)
    );
    // In-place changes do not add up.
    for i in 4..8 {
        fs::remove_file(trees.source.join(format!("f{i}"))).unwrap();
    }
    remove_tree(&trees.target).unwrap();
    let mut link = Link::new(&trees.source, &trees.target, Limits { bytes, ..ROOMY });
    link.first();
    for round in 0..4 {
        for i in 0..4 {
            fs::write(
                trees.source.join(format!("f{i}")),
                Dice(round * 10 + i).bytes(1 << 20),
            )
            .unwrap();
        }
        link.changed();
    }
    link.finish();
}

#[test]
fn a_full_disk_is_told_to_both_ends_and_the_next_try_succeeds() {
    let trees = Trees::new();
    for i in 0..16 {
        fs::write(trees.source.join(format!("f{i}")), Dice(i).bytes(1 << 20)).unwrap();
    }
    private_mounts();
    let small = trees.home.path().join("small");
    fs::create_dir(&small).unwrap();
    mount(
        Some("tmpfs"),
        &small,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=8m"),
    )
    .unwrap();
    let destination = small.join("rootfs");
    let mut link = Link::new(&trees.source, &destination, ROOMY);
    let error = link.try_first().unwrap_err();
    assert!(
        matches!(error, SourceError::Refused(Refusal::NoSpace)),
        "{error:?}"
    );
    assert!(matches!(link.hang_up(), Err(TargetError::NoSpace { .. })));
    let removed = remove_tree(&destination).unwrap();
    assert!(removed.bytes > 6 << 20, "{removed:?}");
    assert!(!destination.exists());

    mount(
        None::<&str>,
        &small,
        None::<&str>,
        MsFlags::MS_REMOUNT,
        Some("size=32m"),
    )
    .unwrap();
    let mut link = Link::new(&trees.source, &destination, ROOMY);
    link.first();
    link.finish();
    crate::harness::assert_same(&trees.source, &destination);
}

#[test]
fn a_tree_with_a_mount_inside_is_neither_written_nor_removed() {
    let trees = Trees::new();
    fs::create_dir_all(trees.source.join("d/e")).unwrap();
    fs::write(trees.source.join("d/e/f"), b"f").unwrap();
    let mut link = trees.connect();
    link.first();
    drop(link.hang_up());
    private_mounts();
    let volume = trees.home.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("data"), b"of somebody").unwrap();
    let inside = trees.target.join("d/e");
    mount(
        Some(&volume),
        &inside,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();

    let error = remove_tree(&trees.target).unwrap_err();
    assert!(
        matches!(&error, RemoveError::Mounted(at) if at.ends_with("d/e")),
        "{error:?}"
    );
    assert!(matches!(remove_tree(&inside), Err(RemoveError::Mounted(_))));
    let mut link = trees.connect();
    let error = link.try_first().unwrap_err();
    assert!(
        matches!(error, SourceError::Refused(Refusal::Mounted)),
        "{error:?}"
    );
    assert!(link.hang_up().is_err());
    assert_eq!(fs::read(volume.join("data")).unwrap(), b"of somebody");
    nix::mount::umount(&inside).unwrap();
    remove_tree(&trees.target).unwrap();
    assert!(!trees.target.exists());
    // Nothing there is nothing to do.
    assert_eq!(remove_tree(&trees.target).unwrap().entries, 0);
}

#[test]
fn a_symlink_in_place_of_the_tree_is_removed_and_not_followed() {
    let trees = Trees::new();
    fs::write(trees.source.join("f"), b"f").unwrap();
    symlink(&trees.source, &trees.target).unwrap();
    assert!(RootfsTarget::new(&trees.target, ROOMY).is_err());
    remove_tree(&trees.target).unwrap();
    assert!(trees.source.join("f").exists());
}

#[test]
fn a_target_that_answers_nonsense_is_an_error_at_the_source() {
    let trees = Trees::new();
    fs::write(trees.source.join("f"), b"f").unwrap();
    let digests = |index, chunks: &[u64]| ToSource::Digests {
        index,
        digests: chunks
            .iter()
            .map(|&chunk| migrate::wire::rootfs::ChunkDigest { chunk, digest: 1 })
            .collect(),
    };
    let answers = [
        vec![ToSource::Answered],
        vec![
            ToSource::Ready { empty: true },
            ToSource::Ack(Counts {
                puts: 77,
                ..Counts::default()
            }),
        ],
        vec![ToSource::Ready { empty: false }, digests(1, &[0])],
        vec![
            ToSource::Ready { empty: false },
            digests(0, &[5]),
            digests(0, &[5]),
        ],
        vec![],
    ];
    for answer in answers {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        answer.iter().for_each(|message| message.encode(&mut bytes));
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let reading = std::thread::spawn(move || std::io::copy(&mut theirs, &mut std::io::sink()));
        let mut source =
            migrate::source::rootfs::RootfsSource::new(&trees.source, Box::new(|| Ok(Vec::new())))
                .unwrap();
        let error = source.first_pass(&mut ours).unwrap_err();
        assert!(
            matches!(
                error,
                SourceError::OutOfTurn(_) | SourceError::CountsDiffer { .. } | SourceError::Hear(_)
            ),
            "{answer:?}: {error:?}"
        );
        // What the target holds is unknown now, so differences cannot be told.
        let again = source.changed_pass(&mut ours);
        assert!(matches!(again, Err(SourceError::FirstPassNeeded)));
        drop(ours);
        reading.join().unwrap().unwrap();
    }
}

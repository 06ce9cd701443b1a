//! Every kind of entry arrives as it is, and an unchanged tree costs next to nothing.

use crate::harness::{Dice, Trees, acl, age, extents, set_xattr};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

/// A tree with one of everything.
pub fn make_everything(root: &Path) {
    let mut dice = Dice(1);
    for directory in ["bin", "etc/deep/er", "tmp", "empty"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::set_permissions(root.join("empty"), fs::Permissions::from_mode(0o2500)).unwrap();

    fs::write(root.join("bin/su"), dice.bytes(70_000)).unwrap();
    chown(root.join("bin/su"), Some(1000), Some(4)).unwrap();
    fs::set_permissions(root.join("bin/su"), fs::Permissions::from_mode(0o6755)).unwrap();
    // VFS_CAP_REVISION_2, effective, cap_net_raw permitted (linux/capability.h).
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    set_xattr(&root.join("bin/su"), "security.capability", &capability);
    fs::write(root.join("bin/zero"), b"").unwrap();
    fs::write(root.join("bin/none"), b"no one may read this").unwrap();
    fs::set_permissions(root.join("bin/none"), fs::Permissions::from_mode(0o0)).unwrap();

    // Two chunks and a bit, and a name that is not text.
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"odd \xff\n name");
    fs::write(root.join("etc").join(odd), dice.bytes(2 * 262_144 + 77)).unwrap();
    set_xattr(&root.join("etc").join(odd), "user.note", &dice.bytes(1000));
    set_xattr(&root.join("etc").join(odd), "user.empty", b"");
    set_xattr(&root.join("etc"), "trusted.secret", b"of root alone");
    fs::write(root.join("etc/deep/er/acl"), b"shared with 1234").unwrap();
    set_xattr(
        &root.join("etc/deep/er/acl"),
        "system.posix_acl_access",
        &acl(6),
    );
    // New entries in here would inherit an ACL that these do not have.
    set_xattr(&root.join("etc/deep"), "system.posix_acl_default", &acl(5));

    fs::hard_link(root.join("bin/su"), root.join("etc/deep/su2")).unwrap();
    fs::hard_link(root.join("bin/su"), root.join("su3")).unwrap();
    symlink("../bin/su", root.join("etc/su-link")).unwrap();
    symlink("/nowhere/at/all", root.join("dangling")).unwrap();
    lchown(root.join("dangling"), Some(7), Some(8)).unwrap();
    set_xattr(&root.join("dangling"), "trusted.on-a-link", b"1");
    fs::hard_link(root.join("dangling"), root.join("dangling2")).unwrap();

    let node = |name: &str, kind, mode, device| {
        mknodat(
            CWD,
            root.join(name),
            kind,
            Mode::from_raw_mode(mode),
            device,
        )
        .unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    node("tmp/fifo", FileType::Fifo, 0o640, 0);
    node("tmp/socket", FileType::Socket, 0o777, 0);
    node("null", FileType::CharacterDevice, 0o666, makedev(1, 3));
    node(
        "disk",
        FileType::BlockDevice,
        0o660,
        makedev(254, 1_000_000),
    );
    set_xattr(&root.join("tmp/fifo"), "trusted.on-a-pipe", b"1");

    make_sparse(&root.join("sparse"));
    let hollow = fs::File::create(root.join("all-hole")).unwrap();
    hollow.set_len(3 << 40).unwrap();
    for (path, seconds) in [
        ("bin/su", 86_400),
        ("dangling", 500),
        ("etc/deep", 77),
        ("null", 5000),
        ("empty", 9),
    ] {
        age(&root.join(path), seconds);
    }
}

/// Data at the start, in the middle of a chunk, across a chunk border, and a hole at the end.
fn make_sparse(path: &Path) {
    let file = fs::File::create(path).unwrap();
    for (at, len) in [
        (0, 10),
        (300_000, 5000),
        (262_144 * 4 - 4096, 8192),
        (5 << 20, 300_000),
    ] {
        file.write_all_at(&Dice(at).bytes(len), at).unwrap();
    }
    file.set_len(9 << 20).unwrap();
}

#[test]
fn every_kind_of_entry_arrives_as_it_is() {
    let trees = Trees::new();
    make_everything(&trees.source);
    // 3 TiB of hole cannot be compared by reading; that it is one at the target is checked by itself.
    let hollow = trees.source.join("all-hole");
    let mut link = trees.connect();
    let summary = link.first();
    link.finish();
    assert_eq!(summary.skipped, 0);
    let arrived = fs::metadata(trees.target.join("all-hole")).unwrap();
    assert_eq!((arrived.len(), arrived.blocks()), (3 << 40, 0));
    let sparse = |root: &Path| fs::metadata(root.join("sparse")).unwrap().blocks();
    assert_eq!(sparse(&trees.source), sparse(&trees.target));
    assert!(sparse(&trees.target) * 512 < 1 << 20);
    for root in [&trees.source, &trees.target] {
        let before = fs::metadata(root).unwrap();
        fs::remove_file(root.join("all-hole")).unwrap();
        fs::File::open(root)
            .unwrap()
            .set_modified(before.modified().unwrap())
            .unwrap();
    }
    assert!(!hollow.exists());
    trees.assert_same();
}

#[test]
fn reading_leaves_no_trace_at_the_source() {
    let trees = Trees::new();
    make_everything(&trees.source);
    let times = |name: &str| {
        let meta = fs::symlink_metadata(trees.source.join(name)).unwrap();
        (
            meta.atime(),
            meta.atime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        )
    };
    let before: Vec<_> = ["bin/su", "sparse", "etc", "null"].map(times).into();
    let mut link = trees.connect();
    link.first();
    link.finish();
    assert_eq!(before, ["bin/su", "sparse", "etc", "null"].map(times));
}

#[test]
fn holes_made_and_filled_later_are_holes_and_data_at_the_target() {
    let trees = Trees::new();
    let path = trees.source.join("f");
    fs::write(&path, Dice(3).bytes(8 << 20)).unwrap();
    let mut link = trees.connect();
    link.first();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    // Whole chunks, and a part of one.
    rustix::fs::fallocate(&file, punch, 1 << 20, 2 << 20).unwrap();
    rustix::fs::fallocate(&file, punch, 6 << 20, 8192).unwrap();
    let summary = link.changed();
    assert!(summary.data_bytes < 1 << 20, "{summary:?}");
    trees.assert_same();
    file.write_all_at(b"filled again", 2 << 20).unwrap();
    file.set_len(12 << 20).unwrap();
    link.changed();
    trees.assert_same();
    file.set_len(100_000).unwrap();
    link.changed();
    link.finish();
    trees.assert_same();
    assert_eq!(extents(&trees.target.join("f")), extents(&path));
}

#[test]
fn an_unchanged_tree_sends_nothing() {
    let trees = Trees::new();
    for i in 0..5000u64 {
        let directory = trees.source.join(format!("d{}", i % 97));
        fs::create_dir_all(&directory).unwrap();
        fs::write(
            directory.join(format!("file-{i}")),
            Dice(i).bytes(100 + (i as usize * 37) % 9000),
        )
        .unwrap();
    }
    // Past the time in which a write could still be under way.
    std::thread::sleep(Duration::from_millis(2100));
    let mut link = trees.connect();
    let start = Instant::now();
    let first = link.first();
    println!("first pass, 5000 files: {:?}, {first:?}", start.elapsed());
    for _ in 0..3 {
        let start = Instant::now();
        let idle = link.changed();
        println!("idle changed pass, 5000 files: {:?}", start.elapsed());
        assert_eq!(
            (
                idle.puts,
                idle.links,
                idle.removals,
                idle.read_bytes,
                idle.entries
            ),
            (0, 0, 0, 0, 5097)
        );
    }
    link.finish();
    trees.assert_same();
}

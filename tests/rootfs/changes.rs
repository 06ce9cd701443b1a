//! What changes at the source between and during passes.

use crate::harness::{Dice, StopOnDrop, Trees, age, private_mounts, set_xattr};
use crate::holder::Program;
use crate::kinds::make_everything;
use nix::mount::{MsFlags, mount};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[test]
fn each_kind_of_change_arrives() {
    let trees = Trees::new();
    let root = &trees.source;
    make_everything(root);
    fs::remove_file(root.join("all-hole")).unwrap();
    let mut link = trees.connect();
    link.first();
    trees.assert_same();

    fs::write(root.join("new"), b"new").unwrap();
    fs::create_dir(root.join("empty/now-not")).unwrap();
    fs::write(root.join("empty/now-not/f"), b"f").unwrap();
    fs::remove_file(root.join("bin/zero")).unwrap();
    fs::OpenOptions::new()
        .append(true)
        .open(root.join("sparse"))
        .unwrap()
        .write_all(b"tail")
        .unwrap();
    fs::set_permissions(root.join("bin/none"), fs::Permissions::from_mode(0o4711)).unwrap();
    set_xattr(&root.join("etc"), "user.new", b"1");
    rustix::fs::removexattr(root.join("etc"), "trusted.secret").unwrap();
    std::os::unix::fs::lchown(root.join("dangling"), Some(9), None).unwrap();
    age(&root.join("null"), 3);
    link.changed();
    trees.assert_same();

    // Types trade places, links move, a directory is renamed with all in it.
    fs::remove_dir_all(root.join("empty")).unwrap();
    symlink("bin", root.join("empty")).unwrap();
    fs::remove_file(root.join("tmp/fifo")).unwrap();
    fs::create_dir(root.join("tmp/fifo")).unwrap();
    fs::write(root.join("tmp/fifo/inside"), b"x").unwrap();
    fs::remove_file(root.join("dangling")).unwrap();
    fs::write(root.join("dangling"), b"now a file").unwrap();
    fs::rename(root.join("etc/deep"), root.join("deep")).unwrap();
    fs::remove_file(root.join("su3")).unwrap();
    fs::hard_link(root.join("new"), root.join("su3")).unwrap();
    fs::rename(root.join("bin/none"), root.join("bin/x")).unwrap();
    fs::rename(root.join("sparse"), root.join("bin/none")).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o711)).unwrap();
    link.changed();
    trees.assert_same();

    fs::remove_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin"), b"a file that was a directory").unwrap();
    link.changed();
    link.finish();
    trees.assert_same();
}

#[test]
fn metadata_alone_moves_no_content() {
    let trees = Trees::new();
    let path = trees.source.join("big");
    fs::write(&path, Dice(2).bytes(3 << 20)).unwrap();
    let mut link = trees.connect();
    link.first();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
    std::os::unix::fs::chown(&path, Some(5), Some(6)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
    set_xattr(&path, "user.a", b"1");
    fs::hard_link(&path, trees.source.join("second")).unwrap();
    let summary = link.changed();
    assert_eq!((summary.data_bytes, summary.links), (0, 1), "{summary:?}");
    link.finish();
    trees.assert_same();
}

#[test]
fn renamed_files_keep_their_content_at_the_target() {
    let trees = Trees::new();
    let root = &trees.source;
    fs::create_dir_all(root.join("var/log")).unwrap();
    fs::write(root.join("var/log/app"), Dice(1).bytes(1 << 20)).unwrap();
    fs::write(root.join("var/log/app.1"), Dice(2).bytes(1 << 20)).unwrap();
    let mut link = trees.connect();
    link.first();
    // A log is rotated, and its directory moves.
    fs::rename(root.join("var/log/app"), root.join("var/log/app.1")).unwrap();
    fs::write(root.join("var/log/app"), b"fresh").unwrap();
    fs::create_dir(root.join("srv")).unwrap();
    fs::rename(root.join("var/log"), root.join("srv/log")).unwrap();
    let summary = link.changed();
    assert_eq!(summary.data_bytes, 5, "{summary:?}");
    trees.assert_same();
    // Two files trade names.
    fs::rename(root.join("srv/log/app"), root.join("t")).unwrap();
    fs::rename(root.join("srv/log/app.1"), root.join("srv/log/app")).unwrap();
    fs::rename(root.join("t"), root.join("srv/log/app.1")).unwrap();
    link.changed();
    link.finish();
    trees.assert_same();
}

#[test]
fn only_the_changed_part_of_a_large_file_travels() {
    let trees = Trees::new();
    let path = trees.source.join("database");
    fs::write(&path, Dice(2).bytes(16 << 20)).unwrap();
    let mut link = trees.connect();
    link.first();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"one record", 5_000_000).unwrap();
    let summary = link.changed();
    assert_eq!(summary.data_bytes, 262_144);
    // Written whole under another name and renamed over, as editors do.
    let mut content = fs::read(&path).unwrap();
    content[9_000_000] ^= 1;
    fs::write(trees.source.join("database.new"), content).unwrap();
    fs::rename(trees.source.join("database.new"), &path).unwrap();
    let summary = link.changed();
    link.finish();
    assert_eq!(summary.data_bytes, 262_144);
    trees.assert_same();
}

#[test]
fn content_changed_behind_restored_times_is_found() {
    let trees = Trees::new();
    let path = trees.source.join("f");
    fs::write(&path, vec![1; 10_000]).unwrap();
    age(&path, 1000);
    std::thread::sleep(Duration::from_millis(2100));
    let mut link = trees.connect();
    link.first();
    fs::write(&path, vec![2; 10_000]).unwrap();
    age(&path, 1000);
    let nanoseconds = fs::metadata(&path).unwrap().mtime_nsec();
    assert_eq!(nanoseconds, 123_456_789);
    link.changed();
    link.finish();
    trees.assert_same();
}

#[test]
fn a_change_within_the_clock_tick_of_the_pass_is_found() {
    let trees = Trees::new();
    // Since Linux 6.13 the disk filesystems and tmpfs make a second change after a stat show (multigrain
    // timestamps). ramfs still stamps by the tick alone, as all did before.
    private_mounts();
    let ramfs = Some("ramfs");
    mount(ramfs, &trees.source, ramfs, MsFlags::empty(), None::<&str>).unwrap();
    let path = trees.source.join("f");
    let ctime = || {
        (
            fs::metadata(&path).unwrap().ctime(),
            fs::metadata(&path).unwrap().ctime_nsec(),
        )
    };
    // On a busy machine a pass can take longer than the tick: until some took less.
    let (mut hidden, mut round) = (0, 0u8);
    let start = Instant::now();
    while hidden < 5 && start.elapsed() < Duration::from_secs(120) {
        round = round.wrapping_add(1);
        fs::write(&path, [round, 0]).unwrap();
        let before = ctime();
        let mut link = trees.connect();
        link.first();
        fs::write(&path, [round, 1]).unwrap();
        hidden += u32::from(before == ctime());
        link.changed();
        link.finish();
        assert_eq!(fs::read(trees.target.join("f")).unwrap(), [round, 1]);
    }
    assert!(
        hidden > 0,
        "no change was hidden by the tick: nothing was tested"
    );
}

#[test]
fn a_write_still_under_way_when_the_file_was_read_is_found() {
    let trees = Trees::new();
    private_mounts();
    mount(
        Some("tmpfs"),
        &trees.source,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .unwrap();
    let path = trees.source.join("f");
    let ctime = || {
        (
            fs::metadata(&path).unwrap().ctime(),
            fs::metadata(&path).unwrap().ctime_nsec(),
        )
    };
    fs::write(&path, Dice(4).bytes(10_000)).unwrap();
    let mut in_time = false;
    while !in_time {
        // A mapping that no set names stands for a long write(2): stamped at its first store, not at the next.
        let mut mapping = Program::compile(&trees).start("map", &[&path]);
        let start = Instant::now();
        mapping.store(1, 1);
        std::thread::sleep(Duration::from_millis(200));
        let before = ctime();
        let mut link = trees.connect();
        link.first();
        // A write is taken to last 2 s at most. Where this machine stood still for longer nothing was tested.
        in_time = start.elapsed() < Duration::from_secs(2);
        mapping.store(2, 2);
        mapping.end();
        assert_eq!(
            before,
            ctime(),
            "the store was expected to leave the times alone"
        );
        link.changed();
        link.finish();
    }
    trees.assert_same();
}

#[test]
fn a_tree_that_changes_during_the_first_pass_is_right_after_the_last() {
    let trees = Trees::new();
    let root = trees.source.clone();
    let mut dice = Dice(11);
    for i in 0..400 {
        fs::create_dir_all(root.join(format!("d{}", i % 20))).unwrap();
        fs::write(
            root.join(format!("d{}/f{i}", i % 20)),
            dice.bytes(1 + (i * 997) % 60_000),
        )
        .unwrap();
    }
    fs::write(root.join("large"), dice.bytes(24 << 20)).unwrap();
    let (stop, mutations) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let mutator = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                crate::random::mutate(&root, &mut dice);
                // Content and length of a file that takes long to read.
                let large = fs::OpenOptions::new()
                    .write(true)
                    .open(root.join("large"))
                    .unwrap();
                large
                    .write_all_at(&dice.bytes(100), dice.roll() % (24 << 20))
                    .unwrap();
                if mutations.fetch_add(1, Ordering::Relaxed).is_multiple_of(7) {
                    large.set_len((16 << 20) + dice.roll() % (8 << 20)).unwrap();
                }
            }
        });
        let stopping = StopOnDrop(&stop);
        let mut link = trees.connect();
        let first = link.first();
        let mut middle = vec![link.changed(), link.changed()];
        let start = Instant::now();
        while mutations.load(Ordering::Relaxed) <= 20 {
            assert!(start.elapsed() < Duration::from_secs(600), "no mutator");
            middle.push(link.changed());
        }
        drop(stopping);
        mutator.join().unwrap();
        let last = link.changed();
        link.finish();
        println!("{mutations:?} mutations; first {first:?}\nthen {middle:?}\nlast {last:?}");
        assert_eq!(last.skipped, 0);
    });
    trees.assert_same();
}

#[test]
fn a_directory_swapped_for_a_symlink_never_leads_out_of_the_source() {
    let trees = Trees::new();
    let home = trees.home.path().to_path_buf();
    for (directory, content) in [
        ("outside", &b"a secret of the host"[..]),
        ("real", b"of the container"),
    ] {
        fs::create_dir(home.join(directory)).unwrap();
        for i in 0..10 {
            fs::write(home.join(directory).join(format!("f{i}")), content).unwrap();
        }
    }
    symlink(home.join("outside"), home.join("fake")).unwrap();
    // Time between seeing the victim and entering it: the walk enters last what it saw first.
    for i in 0..100 {
        fs::create_dir(trees.source.join(format!("d{i}"))).unwrap();
    }
    let seen_first = fs::read_dir(&trees.source)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    fs::remove_dir(seen_first.path()).unwrap();
    let (victim, received) = (seen_first.path(), trees.target.join(seen_first.file_name()));
    let (stop, swaps) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Long enough a symlink that one entered is still one when its files are read.
                for (name, millis) in [("real", 1), ("fake", 6)] {
                    fs::rename(home.join(name), &victim).unwrap();
                    std::thread::sleep(Duration::from_millis(millis));
                    fs::rename(&victim, home.join(name)).unwrap();
                }
                swaps.fetch_add(1, Ordering::Relaxed);
            }
        });
        let stopping = StopOnDrop(&stop);
        let mut link = trees.connect();
        link.first();
        let mut passes = 0;
        let (start, mut enough) = (Instant::now(), false);
        while !enough || start.elapsed() < Duration::from_secs(3) {
            enough = passes > 100 && swaps.load(Ordering::Relaxed) > 100;
            assert!(
                start.elapsed() < Duration::from_secs(600),
                "{passes} passes"
            );
            link.changed();
            passes += 1;
            let is_directory = |meta: fs::Metadata| meta.is_dir();
            if fs::symlink_metadata(&received).is_ok_and(is_directory) {
                for child in fs::read_dir(&received).unwrap() {
                    let path = child.unwrap().path();
                    assert_ne!(
                        fs::read(&path).unwrap(),
                        b"a secret of the host",
                        "{path:?}"
                    );
                }
            }
        }
        drop(stopping);
        link.finish();
        swapping.join().unwrap();
    });
}

#[test]
fn a_directory_swapped_for_a_symlink_while_the_tree_is_measured_is_not_followed() {
    let trees = Trees::new();
    let outside = trees.home.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("large"), vec![1; 8 << 20]).unwrap();
    let (directory, link) = (trees.source.join("directory"), trees.source.join("link"));
    fs::create_dir(&directory).unwrap();
    symlink(&outside, &link).unwrap();
    let program = Program::compile(&trees);
    let _swapper = program.start("swap", &[&directory, &link]);
    for _ in 0..2000 {
        let bytes = migrate::source::rootfs::bytes_on_disk(&trees.source).unwrap();
        assert!(bytes < 1 << 20, "{bytes}");
    }
}

#[test]
fn what_is_mounted_in_the_tree_stays_where_it_is() {
    let trees = Trees::new();
    let root = &trees.source;
    for directory in ["proc", "data/inner", "plain"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::write(root.join("resolv.conf"), b"beneath the mount").unwrap();
    fs::write(root.join("plain/f"), b"f").unwrap();
    fs::write(trees.home.path().join("of-the-host"), b"of the host").unwrap();
    private_mounts();
    mount(
        Some("tmpfs"),
        &root.join("data"),
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=700"),
    )
    .unwrap();
    fs::write(root.join("data/f"), b"in the mount").unwrap();
    // A bind mount of the same filesystem has the same st_dev: only the mount itself tells.
    mount(
        Some(&root.join("plain")),
        &root.join("proc"),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let of_the_host = trees.home.path().join("of-the-host");
    mount(
        Some(&of_the_host),
        &root.join("resolv.conf"),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();

    let mut link = trees.connect();
    let first = link.first();
    let second = link.changed();
    link.finish();
    assert_eq!((first.entries, first.skipped, second.skipped), (5, 0, 0));
    assert_eq!(fs::read(trees.target.join("resolv.conf")).unwrap(), b"");
    assert_eq!(fs::read_dir(trees.target.join("data")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(trees.target.join("proc")).unwrap().count(), 0);
    assert_eq!(fs::read(trees.target.join("plain/f")).unwrap(), b"f");
}

#[test]
fn a_second_attempt_uses_what_the_first_one_left() {
    let trees = Trees::new();
    let root = &trees.source;
    make_everything(root);
    fs::remove_file(root.join("all-hole")).unwrap();
    fs::write(root.join("large"), Dice(5).bytes(8 << 20)).unwrap();
    let mut link = trees.connect();
    link.first();
    drop(link.hang_up());
    trees.assert_same();

    // Since then one part changed behind the same size and time, and the target has things of its own.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(root.join("large"))
        .unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"changed", 3_000_000).unwrap();
    file.set_modified(modified).unwrap();
    let target = &trees.target;
    fs::create_dir_all(target.join("left/over")).unwrap();
    symlink("/etc", target.join("left/over/link")).unwrap();
    fs::remove_file(target.join("null")).unwrap();
    fs::create_dir(target.join("null")).unwrap();
    fs::remove_dir(target.join("empty")).unwrap();
    symlink("/etc", target.join("empty")).unwrap();
    fs::remove_file(target.join("bin/none")).unwrap();
    fs::hard_link(target.join("bin/zero"), target.join("bin/none")).unwrap();
    fs::OpenOptions::new()
        .append(true)
        .open(target.join("sparse"))
        .unwrap()
        .write_all(b"more")
        .unwrap();

    let mut link = trees.connect();
    let summary = link.first();
    assert!(summary.data_bytes < 1 << 20, "{summary:?}");
    assert!(summary.read_bytes > 8 << 20, "{summary:?}");
    trees.assert_same();
    // And changes after that are found as ever.
    file.write_all_at(b"again", 7_000_000).unwrap();
    link.changed();
    link.finish();
    trees.assert_same();
}

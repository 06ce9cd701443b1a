//! Changes that leave no trace in a file's times: stores through shared mappings, on the filesystems containers have.
//! (If the kernel happens to write the page back in between, a store does leave a trace, and a test says little.)

use crate::harness::{Dice, Trees, private_mounts};
use crate::holder::{Holder, Program};
use nix::mount::{MsFlags, mount};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where the source tree lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ground {
    /// The machine's own disk.
    Plain,
    /// A subvolume, whose device number in /proc is not that of `stat`.
    Btrfs,
    Xfs,
    /// Both layers on one disk.
    Overlay,
    /// The upper layer on another filesystem than the lower one.
    OverlayOnXfs,
    /// Where not even the first store to a page shows in the times.
    Tmpfs,
    OverlayOnTmpfs,
}

impl Ground {
    const ALL: [Ground; 7] = [
        Ground::Plain,
        Ground::Btrfs,
        Ground::Xfs,
        Ground::Overlay,
        Ground::OverlayOnXfs,
        Ground::Tmpfs,
        Ground::OverlayOnTmpfs,
    ];

    /// Mounts it, so that `trees.source` holds a file of 1 MiB called `mapped` that nobody has touched for a while.
    fn lay(self, trees: &mut Trees) {
        let home = trees.home.path().to_path_buf();
        let fill = |directory: &Path| {
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("mapped"), Dice(4).bytes(1 << 20)).unwrap();
        };
        match self {
            Ground::Plain => {}
            Ground::Btrfs => {
                let disk = home.join("disk");
                mount_image("btrfs", &["-q"], &disk);
                run(
                    "btrfs",
                    &["-q", "subvolume", "create", path(&disk.join("tree"))],
                );
                trees.source = disk.join("tree");
            }
            Ground::Xfs => {
                mount_image("xfs", &["-q"], &home.join("disk"));
                trees.source = home.join("disk/tree");
            }
            Ground::Tmpfs => mount_tmpfs(&trees.source),
            Ground::Overlay | Ground::OverlayOnXfs | Ground::OverlayOnTmpfs => {
                let (lower, disk) = (home.join("lower"), home.join("disk"));
                match self {
                    Ground::OverlayOnXfs => mount_image("xfs", &["-q"], &disk),
                    Ground::OverlayOnTmpfs => mount_tmpfs(&disk),
                    _ => {}
                }
                fill(&lower);
                for name in ["upper", "work"] {
                    fs::create_dir_all(disk.join(name)).unwrap();
                }
                let options = format!(
                    "lowerdir={},upperdir={},workdir={}",
                    lower.display(),
                    disk.join("upper").display(),
                    disk.join("work").display()
                );
                mount(
                    Some("overlay"),
                    &trees.source,
                    Some("overlay"),
                    MsFlags::empty(),
                    Some(options.as_str()),
                )
                .unwrap();
                // The container has written to it before.
                let mut append = fs::OpenOptions::new();
                append
                    .append(true)
                    .open(trees.source.join("mapped"))
                    .unwrap();
                return;
            }
        }
        fill(&trees.source);
    }
}

fn mount_tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    mount(
        Some("tmpfs"),
        at,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .unwrap();
}

/// Makes a filesystem in a file and mounts it.
fn mount_image(kind: &str, options: &[&str], at: &Path) {
    fs::create_dir_all(at).unwrap();
    let image = at.with_extension("image");
    fs::File::create(&image)
        .unwrap()
        .set_len(512 << 20)
        .unwrap();
    let mut arguments = options.to_vec();
    arguments.push(path(&image));
    run(&format!("mkfs.{kind}"), &arguments);
    run("mount", &["-t", kind, "-o", "loop", path(&image), path(at)]);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Needs btrfs-progs and xfsprogs (`scripts/setup`).
#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    let status = status.unwrap_or_else(|error| panic!("{program}: {error}: run scripts/setup"));
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// On each ground at the same time, each in a mount namespace of its own.
fn on_every_ground(test: fn(&Trees, &Program)) {
    let started = Ground::ALL.map(|ground| {
        let on_it = move || {
            let mut trees = Trees::new();
            private_mounts();
            ground.lay(&mut trees);
            let program = Program::compile(&trees);
            // Older than any write that may still be under way.
            std::thread::sleep(Duration::from_millis(2100));
            test(&trees, &program);
        };
        (ground, std::thread::spawn(on_it))
    });
    for (ground, thread) in started {
        assert!(thread.join().is_ok(), "on {ground:?}");
    }
}

#[test]
fn stores_through_a_mapping_from_before_the_copy_arrive() {
    on_every_ground(|trees, program| {
        let file = trees.source.join("mapped");
        let mut holder = program.start("map", &[&file]);
        let pid = holder.pid();
        // The page is dirty and mapped writable from here on.
        holder.store(5000, 1);
        std::thread::sleep(Duration::from_millis(2100));
        let mut link = trees.connect_with(Box::new(move || Ok(vec![pid])));
        link.first();
        link.changed();
        holder.store(5001, 2);
        holder.end();
        link.last();
        link.finish();
        trees.assert_same();
    });
}

#[test]
fn stores_through_a_mapping_made_after_the_look_arrive() {
    on_every_ground(|trees, program| {
        let file = trees.source.join("mapped");
        let born: Arc<Mutex<Option<Holder>>> = Arc::default();
        let (late, mapped) = (Arc::clone(&born), file.clone());
        let born_later = program.clone();
        // Listed by no look, and its page is dirty before the file is read.
        let mut link = trees.connect_with(Box::new(move || {
            let mut holder = late.lock().unwrap();
            if holder.is_none() {
                let mut started = born_later.start("map", &[&mapped]);
                started.store(5000, 1);
                *holder = Some(started);
            }
            Ok(Vec::new())
        }));
        link.first();
        // Where times do not tell there is no look.
        let born = born.lock().unwrap().take();
        let mut holder = born.unwrap_or_else(|| program.start("map", &[&file]));
        holder.store(5001, 2);
        holder.end();
        link.last();
        link.finish();
        trees.assert_same();
    });
}

#[test]
fn a_mapping_that_is_handed_to_a_process_born_during_the_look_is_found() {
    let trees = Trees::new();
    let program = Program::compile(&trees);
    let file = trees.source.join("mapped");
    fs::write(&file, Dice(4).bytes(1 << 20)).unwrap();
    let mut holder = program.start("map", &[&file]);
    holder.store(5000, 1);
    std::thread::sleep(Duration::from_millis(2100));
    let (pid, listings) = (holder.pid(), Mutex::new(0));
    let mut link = trees.connect_with(Box::new(move || {
        let mut listings = listings.lock().unwrap();
        *listings += 1;
        // In the list for the first time when another was already looked at.
        Ok([std::process::id().cast_signed(), pid][..(*listings).min(2)].to_vec())
    }));
    link.first();
    holder.store(5001, 2);
    holder.end();
    link.last();
    link.finish();
    trees.assert_same();
}

#[test]
fn a_file_that_is_open_for_writing_is_compared_and_one_for_reading_is_not() {
    let trees = Trees::new();
    let program = Program::compile(&trees);
    let file = trees.source.join("open");
    fs::write(&file, Dice(4).bytes(1 << 20)).unwrap();
    fs::write(trees.source.join("idle"), Dice(5).bytes(1 << 20)).unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    let holder = program.start("open", &[&file]);
    let pid = holder.pid();
    let mut link = trees.connect_with(Box::new(move || Ok(vec![pid])));
    link.first();
    holder.end();
    let summary = link.last();
    link.finish();
    assert_eq!((summary.read_bytes, summary.data_bytes), (1 << 20, 0));
}

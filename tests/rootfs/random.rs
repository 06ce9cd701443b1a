//! Random sequences of changes, each followed by a comparison of the whole trees.

use crate::harness::{Dice, Trees, set_xattr};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

#[test]
fn any_sequence_of_changes_ends_in_the_same_tree() {
    let seeds = std::env::var("ROOTFS_SEEDS").map_or(0..40, |list| {
        let (from, to) = list.split_once("..").unwrap();
        from.parse().unwrap()..to.parse().unwrap()
    });
    for seed in seeds {
        let mut dice = Dice(seed);
        let trees = Trees::new();
        for _ in 0..dice.below(60) {
            mutate(&trees.source, &mut dice);
        }
        let mut link = trees.connect();
        link.first();
        for pass in 0..6 {
            for _ in 0..1 + dice.below(25) {
                mutate(&trees.source, &mut dice);
            }
            let summary = link.changed();
            assert_eq!(summary.skipped, 0);
            println!("seed {seed} pass {pass}: {summary:?}");
            trees.assert_same();
        }
        if dice.below(2) == 0 {
            // The attempt ends here, the container goes on, and the next attempt finds the leavings.
            drop(link.hang_up());
            for _ in 0..dice.below(25) {
                mutate(&trees.source, &mut dice);
            }
            link = trees.connect();
            link.first();
            trees.assert_same();
        }
        link.finish();
    }
}

/// Does one random thing to the tree. Names are few, so that they are often taken, lost and taken again.
/// Changes that do not apply (a directory into itself, a name that is gone) are let pass.
pub fn mutate(root: &Path, dice: &mut Dice) {
    let directories = directories(root);
    let place = |dice: &mut Dice| {
        directories[dice.below(directories.len())].join(format!("n{}", dice.below(12)))
    };
    let (path, other) = (place(dice), place(dice));
    let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
    match dice.below(16) {
        0..=2 => drop(fs::symlink_metadata(&path).is_err().then(|| {
            let len = dice.below(700_000) >> dice.below(10);
            fs::write(&path, dice.bytes(len))
        })),
        3 if is_file => {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            let _ = file.write_all_at(&dice.bytes(3000), dice.roll() % 2_000_000);
        }
        4 if is_file => {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            let _ = file.set_len(dice.roll() % 1_500_000);
        }
        5 if directories.len() < 40 => drop(fs::create_dir(&path)),
        6 => drop(fs::remove_file(&path)),
        7 => drop(fs::remove_dir_all(&path)),
        8 | 9 => drop(fs::rename(&path, &other)),
        10 => drop(fs::hard_link(&path, &other)),
        11 => drop(symlink(format!("t{}", dice.below(4)), &path)),
        12 => {
            let kind = [FileType::Fifo, FileType::Socket][dice.below(2)];
            let _ = mknodat(CWD, &path, kind, Mode::from_raw_mode(0o600), 0);
        }
        13 if is_file => {
            let _ = fs::set_permissions(
                &path,
                fs::Permissions::from_mode(dice.roll() as u32 & 0o7777),
            );
        }
        14 => drop(lchown(
            &path,
            Some(dice.below(3) as u32),
            Some(dice.below(3) as u32),
        )),
        15 if fs::symlink_metadata(&path).is_ok() => {
            set_xattr(
                &path,
                ["trusted.a", "trusted.b"][dice.below(2)],
                &dice.bytes(20),
            );
        }
        _ => {}
    }
}

fn directories(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_path_buf()];
    let mut next = 0;
    while next < found.len() {
        let mut children: Vec<PathBuf> = fs::read_dir(&found[next])
            .unwrap()
            .map(|child| child.unwrap())
            .filter(|child| child.file_type().unwrap().is_dir())
            .map(|child| child.path())
            .collect();
        // The order of a listing is the filesystem's: sorted, a seed means the same on every machine.
        children.sort();
        found.extend(children);
        next += 1;
    }
    found
}

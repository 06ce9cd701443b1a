//! The copy's own reads must not be noticed by the processes of the container.

use crate::harness::{Dice, Trees};
use crate::holder::Program;
use std::fs;

#[test]
fn a_file_under_a_write_lease_arrives_and_its_holder_is_not_told() {
    let trees = Trees::new();
    let program = Program::compile(&trees);
    let file = trees.source.join("leased");
    let mut content = Dice(4).bytes(1 << 20);
    content[300_000..700_000].fill(0);
    fs::write(&file, &content).unwrap();
    let mut holder = program.start("lease", &[&file]);
    let pid = holder.pid();
    let mut link = trees.connect_with(Box::new(move || Ok(vec![pid])));
    link.first();
    link.changed();
    link.last();
    link.finish();
    assert_eq!(fs::read(trees.target.join("leased")).unwrap(), content);
    assert_eq!(holder.ask("pos"), "3");
    holder.end();
}

#[test]
fn a_file_that_not_even_its_leaseholder_can_read_is_refused_by_name() {
    let trees = Trees::new();
    let program = Program::compile(&trees);
    let file = trees.source.join("leased");
    fs::write(&file, b"content").unwrap();
    let holder = program.start("blind", &[&file]);
    let pid = holder.pid();
    let mut link = trees.connect_with(Box::new(move || Ok(vec![pid])));
    let error = link.try_first().unwrap_err().to_string();
    assert!(error.contains("\"leased\" is under a lease"), "{error}");
    holder.end();
}

#[test]
fn a_pipe_that_takes_a_files_place_again_and_again_does_not_stop_the_copy() {
    let trees = Trees::new();
    let program = Program::compile(&trees);
    let (file, pipe) = (trees.source.join("file"), trees.source.join("pipe"));
    fs::write(&file, b"content").unwrap();
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let swapper = program.start("swap", &[&file, &pipe]);
    let mut link = trees.connect();
    link.first();
    for _ in 0..50 {
        link.changed();
    }
    drop(swapper);
    link.last();
    link.finish();
    trees.assert_same();
}

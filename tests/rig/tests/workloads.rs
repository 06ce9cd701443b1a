//! Every workload survives a plain dump and restore on another host and says so, and finds out what is wrong.
//! Needs root, runc and CRIU; fails without them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Result, bail};
use rig::{
    Container, ContainerOptions, Host, Verified, Workload, checkpoint, copy_container_files,
    restore,
};

const LIMIT: Duration = Duration::from_secs(120);

/// Runs it, verifies, moves it with runc and CRIU alone, verifies again.
fn moved_plainly(id: &str, workload: &Workload) -> Result<(Verified, Verified)> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let container = Container::create(&a, id, workload, &ContainerOptions::default())?;
    std::thread::sleep(Duration::from_millis(300));
    let before = container.verify(&a, LIMIT)?;
    checkpoint(&a, &container, "/srv/images")?;
    copy_container_files(&a, &b, &container, "/srv/images")?;
    restore(&b, &container, "/srv/images")?;
    std::thread::sleep(Duration::from_millis(300));
    let after = container.verify(&b, LIMIT)?;
    Ok((before, after))
}

fn assert_whole(before: &Verified, after: &Verified) {
    assert!(before.verified && before.errors == 0, "before: {before:?}");
    assert!(after.verified && after.errors == 0, "after: {after:?}");
    assert!(
        after.seq > before.seq,
        "it did not go on: {before:?} then {after:?}"
    );
}

#[test]
fn the_zoo_survives_being_moved() -> Result<()> {
    let (before, after) = moved_plainly("zoo", &Workload::zoo(false))?;
    assert_whole(&before, &after);
    assert_eq!(after.more["processes"], 40);
    Ok(())
}

#[test]
fn redis_and_its_connection_survive_being_moved() -> Result<()> {
    let (before, after) = moved_plainly("redis", &Workload::redis(64))?;
    assert_whole(&before, &after);
    assert_eq!(after.more["keys"], 64 * 256);
    Ok(())
}

#[test]
fn a_prefork_server_survives_being_moved() -> Result<()> {
    let workload = Workload::new("prefork", ["--table-mib=16", "--workers=3"]);
    let (before, after) = moved_plainly("prefork", &workload)?;
    assert_whole(&before, &after);
    assert_eq!(after.more["pages"], 4096 + 3 * (4096 + 1024));
    Ok(())
}

#[test]
fn changing_files_survive_being_moved() -> Result<()> {
    let (before, after) = moved_plainly("files", &Workload::file_mutator())?;
    assert_whole(&before, &after);
    Ok(())
}

#[test]
fn a_zoo_that_keeps_breeding_verifies() -> Result<()> {
    let host = Host::new("a")?;
    let container = Container::create(
        &host,
        "zoo",
        &Workload::zoo(true),
        &ContainerOptions::default(),
    )?;
    let verdict = container.verify(&host, LIMIT)?;
    assert!(verdict.verified, "{verdict:?}");
    Ok(())
}

#[test]
fn a_page_changed_from_outside_is_found_out() -> Result<()> {
    let host = Host::new("a")?;
    // No random checks: it is the verdict that must find it.
    let workload = Workload::memory_writer(64, 0).arg("--check-mb-s=0");
    let container = Container::create(&host, "writer", &workload, &ContainerOptions::default())?;
    let memory = format!("/proc/{}/mem", container.pid(&host)?);
    let memory = OpenOptions::new().read(true).write(true).open(memory)?;
    let page = find_page(&container, &host, &memory, 3)?;
    memory.write_all_at(&[0x5a], page + 100)?;
    let verdict = container.verify(&host, LIMIT)?;
    assert!(!verdict.verified && verdict.errors == 1, "{verdict:?}");
    assert_eq!(verdict.complaints[0]["corrupt_page"], 3);
    Ok(())
}

#[test]
fn a_file_changed_from_outside_is_found_out() -> Result<()> {
    let host = Host::new("a")?;
    let container = Container::create(
        &host,
        "files",
        &Workload::file_mutator(),
        &ContainerOptions::default(),
    )?;
    std::fs::write(host.path("/srv/files/rootfs/work/foreign"), "")?;
    let verdict = container.verify(&host, LIMIT)?;
    assert!(!verdict.verified && verdict.errors == 1, "{verdict:?}");
    Ok(())
}

/// Where the memory-writer keeps a page it has written once. The kernel may have put its memory into one mapping with other
/// things, so it is looked for by its head: number and version.
fn find_page(container: &Container, host: &Host, memory: &File, number: u64) -> Result<u64> {
    let head = [number.to_le_bytes(), 1_u64.to_le_bytes()].concat();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", container.pid(host)?))?;
    let ranges = maps
        .lines()
        .filter(|line| line.contains("rw-p"))
        .filter_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            Some((
                u64::from_str_radix(start, 16).ok()?,
                u64::from_str_radix(end, 16).ok()?,
            ))
        });
    for (start, end) in ranges {
        let mut bytes = vec![0; (end - start) as usize];
        memory.read_exact_at(&mut bytes, start)?;
        if let Some(page) = bytes.chunks(4096).position(|page| page.starts_with(&head)) {
            return Ok(start + 4096 * page as u64);
        }
    }
    bail!("page {number} is nowhere")
}

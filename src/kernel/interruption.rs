//! Memory that the kernel writes to a task when a system call is interrupted.
//!
//! A sleep that is cut short writes how much of it is left, and a wait for events how much of its timeout. A task in the
//! v1 freezer is not interrupted yet: it is when CRIU thaws it to take hold of it, after the last scan, and what is written
//! then no scan sees. A pid enters, the pages of such places leave.

use super::arch::LEFT_TIME_ARGUMENTS;
use crate::memory::{PageRange, PageSet, VirtAddr};
use std::fs;
use std::io;

/// The longest of what is written: `struct timespec` and `struct timeval`.
const LEFT_TIME_BYTES: u64 = 16;

/// The pages that would be written if the threads of `pid` were interrupted in the calls they wait in now.
///
/// Threads that run, and a process that is gone, have none.
pub fn pages_of_time_left(pid: i32) -> io::Result<PageSet> {
    let mut pages = PageSet::new();
    let Some(threads) = found(fs::read_dir(format!("/proc/{pid}/task")))? else {
        return Ok(pages);
    };
    for thread in threads {
        let file = thread?.path().join("syscall");
        if let Some(text) = found(fs::read_to_string(file))? {
            let place = place_of_time_left(&text);
            let range = place.and_then(|place| {
                PageRange::from_addrs(place, VirtAddr(place.0.saturating_add(LEFT_TIME_BYTES)))
            });
            if let Some(range) = range {
                pages.insert(range);
            }
        }
    }
    Ok(pages)
}

/// Where the call in a line of `/proc/PID/syscall` ("35 0x7ffc… 0x7ffc… …", "running", "-1 …") writes time left, if anywhere.
fn place_of_time_left(line: &str) -> Option<VirtAddr> {
    let mut words = line.split_whitespace();
    let call: i64 = words.next()?.parse().ok()?;
    let (_, argument) = LEFT_TIME_ARGUMENTS
        .iter()
        .find(|(number, _)| *number == call)?;
    let address = words.nth(*argument)?.strip_prefix("0x")?;
    let address = u64::from_str_radix(address, 16).ok()?;
    (address != 0).then_some(VirtAddr(address))
}

/// `None` for what is not there, or no longer.
fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_rest_of_a_sleep_is_found_while_it_lasts() {
        let left = std::sync::Arc::new(std::sync::Mutex::new(()));
        let held = left.lock().unwrap();
        let other = std::sync::Arc::clone(&left);
        // Waits for the lock, which is no sleep, and then sleeps in the standard library's clock_nanosleep, to the end of this
        // process.
        std::thread::spawn(move || {
            drop(other.lock());
            std::thread::sleep(Duration::from_secs(3600));
        });
        let pid = std::process::id() as i32;
        drop(held);
        let deadline = Instant::now() + Duration::from_secs(60);
        while pages_of_time_left(pid).unwrap().is_empty() {
            assert!(
                Instant::now() < deadline,
                "a thread sleeps and no place is found"
            );
        }
    }

    #[test]
    fn only_calls_that_write_what_is_left_have_a_place() {
        let place = |line: &str| place_of_time_left(line).map(|place| place.0);
        assert_eq!(
            place("35 0x7ffc10 0x7ffc20 0x0 0x0 0x0 0x0 0x7ffc00 0x7f00"),
            Some(0x7f_fc20)
        );
        assert_eq!(
            place("230 0x0 0x0 0x7ffc10 0x7ffc30 0x0 0x0 0x7ffc00 0x7f00"),
            Some(0x7f_fc30)
        );
        assert_eq!(
            place("35 0x7ffc10 0x0 0x0 0x0 0x0 0x0 0x7ffc00 0x7f00"),
            None
        );
        assert_eq!(
            place("0 0x3 0x7ffc20 0x10 0x0 0x0 0x0 0x7ffc00 0x7f00"),
            None
        );
        for line in ["running", "-1 0x7ffc00 0x7f00", "", "35", "35 x y"] {
            assert_eq!(place(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        assert!(pages_of_time_left(i32::MAX).unwrap().is_empty());
    }
}

//! Which processes are one address space.

use crate::kernel::address_space::{CompareError, compare};
use crate::runtime::Task;
use std::cmp::Ordering;

/// The processes of one address space.
#[derive(Debug)]
pub(super) struct Sharing {
    /// The oldest. A `vfork` child leaves by its exec and the parent stays, so the oldest is the one to know it by.
    pub(super) owner: Task,
    /// The others.
    pub(super) others: Vec<Task>,
}

impl Sharing {
    /// All of them, the owner first.
    pub(super) fn tasks(&self) -> impl Iterator<Item = &Task> {
        std::iter::once(&self.owner).chain(&self.others)
    }

    /// The others' ids in the container.
    pub(super) fn sharers(&self) -> Vec<i32> {
        self.others.iter().map(|task| task.vpid).collect()
    }
}

/// Groups `tasks` by address space; zombies and what has exited are left out.
///
/// The kernel's order of address spaces lets each task be placed in log₂(spaces) comparisons. A task that execs meanwhile
/// may be put where it no longer belongs, or stand alone: its new image is then found by the next scan. But while it sits
/// at its old place it also sends others the wrong way, and one memory listed as two would be armed by one and read by the
/// other. So the order is looked at again in the end, and where it does not hold everybody is compared with everybody.
pub(super) fn group(tasks: &[Task]) -> Result<Vec<Sharing>, CompareError> {
    let mut tasks: Vec<&Task> = tasks.iter().filter(|task| !task.zombie).collect();
    tasks.sort_by_key(|task| (task.start_time, task.pid));
    let mut ordered: Vec<Sharing> = Vec::new();
    for task in &tasks {
        place(&mut ordered, task)?;
    }
    if is_ordered(&ordered)? {
        return Ok(ordered);
    }
    group_one_by_one(&tasks)
}

fn is_ordered(groups: &[Sharing]) -> Result<bool, CompareError> {
    for pair in groups.windows(2) {
        match compare(pair[0].owner.pid, pair[1].owner.pid) {
            Ok(Ordering::Less) | Err(CompareError::Exited { .. }) => {}
            Ok(_) => return Ok(false),
            Err(refused) => return Err(refused),
        }
    }
    Ok(true)
}

/// Groups without relying on any order: as many comparisons as there are pairs.
fn group_one_by_one(tasks: &[&Task]) -> Result<Vec<Sharing>, CompareError> {
    let mut groups: Vec<Sharing> = Vec::new();
    'tasks: for task in tasks {
        for group in &mut groups {
            match compare(group.owner.pid, task.pid) {
                Ok(Ordering::Equal) => {
                    group.others.push((*task).clone());
                    continue 'tasks;
                }
                Ok(_) | Err(CompareError::Exited { .. }) => {}
                Err(refused) => return Err(refused),
            }
        }
        groups.push(Sharing {
            owner: (*task).clone(),
            others: Vec::new(),
        });
    }
    Ok(groups)
}

fn place(ordered: &mut Vec<Sharing>, task: &Task) -> Result<(), CompareError> {
    let (mut low, mut high) = (0, ordered.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match compare(ordered[middle].owner.pid, task.pid) {
            Ok(Ordering::Equal) => {
                ordered[middle].others.push(task.clone());
                return Ok(());
            }
            Ok(Ordering::Less) => low = middle + 1,
            Ok(Ordering::Greater) => high = middle,
            Err(CompareError::Exited { .. }) => {
                if let Err(CompareError::Exited { .. }) = compare(task.pid, task.pid) {
                    return Ok(());
                }
                // It was the owner that exited. Another of its group steps in.
                let group = &mut ordered[middle];
                if group.others.is_empty() {
                    ordered.remove(middle);
                } else {
                    group.owner = group.others.remove(0);
                }
                (low, high) = (0, ordered.len());
            }
            Err(refused) => return Err(refused),
        }
    }
    ordered.insert(
        low,
        Sharing {
            owner: task.clone(),
            others: Vec::new(),
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn task(pid: i32, start_time: u64) -> Task {
        Task {
            pid,
            vpid: pid,
            start_time,
            zombie: false,
        }
    }

    fn is_living(task: &Task, gone: i32) -> bool {
        !task.zombie && task.pid != gone
    }

    #[test]
    fn tasks_of_one_memory_are_one_group_with_the_oldest_as_owner() {
        let mut children: Vec<Child> = (0..20)
            .map(|_| Command::new("sleep").arg("1000").spawn().unwrap())
            .collect();
        let me = std::process::id() as i32;
        // A thread stands for a process that shares this one's memory: kcmp compares memory, not thread groups.
        let (sender, tid) = std::sync::mpsc::channel();
        let (_keep, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            sender.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = wait.recv();
        });
        let tid = tid.recv().unwrap();
        let mut dead = Command::new("true").spawn().unwrap();
        let gone = dead.id() as i32;
        dead.wait().unwrap();

        let mut tasks = vec![task(tid, 2), task(gone, 0), task(me, 1)];
        tasks.extend(children.iter().map(|child| task(child.id() as i32, 3)));
        tasks.push(Task {
            zombie: true,
            ..task(1, 4)
        });
        let mut living: Vec<&Task> = tasks.iter().filter(|task| is_living(task, gone)).collect();
        living.sort_by_key(|task| task.start_time);
        let ordered = group(&tasks).unwrap();
        assert!(is_ordered(&ordered).unwrap());
        for groups in [ordered, group_one_by_one(&living).unwrap()] {
            assert_eq!(groups.len(), 21, "{groups:#?}");
            let ours = groups.iter().find(|group| group.owner.pid == me).unwrap();
            assert_eq!(ours.sharers(), [tid]);
            assert!(
                groups
                    .iter()
                    .all(|group| group.owner.pid == me || group.others.is_empty())
            );
            let mut reversed = groups;
            reversed.reverse();
            assert!(!is_ordered(&reversed).unwrap());
        }
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        drop(_keep);
        thread.join().unwrap();
    }
}

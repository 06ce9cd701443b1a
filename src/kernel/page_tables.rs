//! Which page tables of a process have been replaced by others since the last look.
//!
//! A process's pagemap and the pages it has enter; the ranges of replaced tables leave. `mremap` may move a whole page table
//! (512 pages, 2 MiB) at once, and the kernel then marks nothing. But the pages that a table leads to lie in frames of
//! their own: where a few pages of a range are all in other places than before, the range may have another table.
//!
//! That errs on one side: pages copied on write, migrated or swapped change their place too. It never takes a moved table
//! for the old one, as no two pages of a process share a frame, except those merged by KSM: while KSM runs or
//! has merged pages, only those that are mapped once are looked at.

use super::ksm::Ksm;
use super::pagemap::{Entry, Pagemap, ScanError};
use crate::memory::{PageNumber, PageRange, PageSet};
use std::collections::HashMap;

/// What is remembered of the page tables of one address space.
#[derive(Debug)]
pub struct PageTables {
    /// By the table's number (its first page / [`TABLE_PAGES`]): pages it leads to, and where they are.
    witnesses: HashMap<u64, Vec<(PageNumber, Entry)>>,
    /// Pages that share a frame are no witnesses.
    exclusive: bool,
}

/// Pages that one page table leads to, on x86-64.
const TABLE_PAGES: u64 = 512;

/// Pages remembered of a table at most. One that stays in its place is enough to know the table again.
const WITNESSES: usize = 4;

impl PageTables {
    /// Nothing is remembered yet.
    pub fn new() -> PageTables {
        PageTables {
            witnesses: HashMap::new(),
            exclusive: Ksm::here().state().shares_frames(),
        }
    }

    /// Looks at the tables of `pages`, which must be the process's own and none of them the page of zeros. Gives the ranges
    /// of those that were not known before or have been replaced, and remembers them all.
    pub fn replaced(&mut self, pagemap: &Pagemap, pages: &PageSet) -> Result<PageSet, ScanError> {
        let mut before = std::mem::take(&mut self.witnesses);
        let mut replaced = PageSet::new();
        let mut last = None;
        for run in pages.iter() {
            let tables = run.start().0 / TABLE_PAGES..=(run.end().0 - 1) / TABLE_PAGES;
            for table in tables {
                let range = PageRange::from_start_len(PageNumber(table * TABLE_PAGES), TABLE_PAGES);
                // The run before may have ended in the same table.
                let Some(range) = range.filter(|_| last.replace(table) != Some(table)) else {
                    continue;
                };
                match before.remove(&table) {
                    Some(known) if any_in_place(pagemap, &known)? => {
                        self.witnesses.insert(table, known);
                    }
                    _ => {
                        replaced.insert(range);
                        let found = self.find(pagemap, &pages.intersecting(range))?;
                        if !found.is_empty() {
                            self.witnesses.insert(table, found);
                        }
                    }
                }
            }
        }
        Ok(replaced)
    }

    /// Pages to know a table by, of those it has: far from each other, or the first that are mapped once.
    fn find(
        &self,
        pagemap: &Pagemap,
        pages: &[PageRange],
    ) -> Result<Vec<(PageNumber, Entry)>, ScanError> {
        let total: u64 = pages.iter().map(|run| run.pages()).sum();
        let apart = if self.exclusive {
            1
        } else {
            total.div_ceil(WITNESSES as u64).max(1)
        };
        let each = pages.iter().flat_map(|run| run.chunks(1));
        let mut found = Vec::with_capacity(WITNESSES);
        for page in each.step_by(apart as usize) {
            pagemap.read(page, |page, entry| {
                if entry.place().is_some() && (entry.exclusive() || !self.exclusive) {
                    found.push((page, entry));
                }
            })?;
            if found.len() == WITNESSES {
                break;
            }
        }
        Ok(found)
    }
}

impl Default for PageTables {
    fn default() -> PageTables {
        PageTables::new()
    }
}

fn any_in_place(pagemap: &Pagemap, known: &[(PageNumber, Entry)]) -> Result<bool, ScanError> {
    for (page, before) in known {
        let Some(page) = PageRange::from_start_len(*page, 1) else {
            continue;
        };
        let mut in_place = false;
        pagemap.read(page, |_, now| in_place = now.place() == before.place())?;
        if in_place {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::super::scratch::Scratch;
    use super::*;

    fn filled() -> Scratch {
        let scratch = Scratch::aligned(TABLE_PAGES).unwrap();
        (0..TABLE_PAGES).for_each(|page| scratch.write(page));
        scratch
    }

    fn pages_of(scratch: &Scratch) -> PageSet {
        [scratch.range].into_iter().collect()
    }

    #[test]
    fn a_table_moved_over_another_is_told_and_one_that_stays_is_not() {
        let (first, second) = (filled(), filled());
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let mut both = pages_of(&first);
        both.insert(second.range);
        let mut tables = PageTables::new();
        assert_eq!(tables.replaced(&pagemap, &both).unwrap(), both);
        assert!(tables.replaced(&pagemap, &both).unwrap().is_empty());
        // Writing changes no table.
        first.write(7);
        assert!(tables.replaced(&pagemap, &both).unwrap().is_empty());

        let moved = second.moved_over(first).unwrap();
        let now = pages_of(&moved);
        assert_eq!(tables.replaced(&pagemap, &now).unwrap(), now);
        assert!(tables.replaced(&pagemap, &now).unwrap().is_empty());
    }

    #[test]
    fn a_table_is_known_again_while_one_of_its_pages_is_in_its_place() {
        let scratch = filled();
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let mut tables = PageTables::new();
        tables.replaced(&pagemap, &pages_of(&scratch)).unwrap();
        let dropped = scratch.first(TABLE_PAGES / 2);
        assert!(scratch.advise(dropped, libc::MADV_DONTNEED));
        let mut left = pages_of(&scratch);
        left.remove(dropped);
        assert!(tables.replaced(&pagemap, &left).unwrap().is_empty());
    }
}

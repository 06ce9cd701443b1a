use super::*;
use crate::memory::PageNumber;
use proptest::prelude::*;
use std::collections::BTreeMap;

const SPACE: SpaceId = SpaceId(3);

fn store() -> PageStore {
    PageStore::new(PageStoreLimits {
        spaces: 2,
        bytes: 64 * PAGE_SIZE,
    })
}

fn range(start: u64, pages: u64) -> PageRange {
    PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
}

fn data(start: u64, pages: u64) -> PageRun {
    PageRun {
        pages: range(start, pages),
        content: RunContent::Data,
    }
}

fn zero(start: u64, pages: u64) -> PageRun {
    PageRun {
        pages: range(start, pages),
        content: RunContent::Zero,
    }
}

fn filled(byte: u8, pages: u64) -> Vec<u8> {
    vec![byte; (pages * PAGE_SIZE) as usize]
}

fn first_byte(store: &PageStore, page: u64) -> u8 {
    let mut buffer = filled(0xee, 1);
    store
        .read(SPACE, range(page, 1), &mut buffer)
        .expect("a page is read");
    assert!(buffer.iter().all(|&byte| byte == buffer[0]));
    buffer[0]
}

#[test]
fn a_page_that_became_zero_gives_its_memory_back_and_stays_received() {
    let store = store();
    store
        .place(SPACE, &[data(10, 8)], &filled(7, 8))
        .expect("placed");
    assert_eq!(store.memory_in_use().expect("measured"), 8 * PAGE_SIZE);
    store
        .place(SPACE, &[zero(8, 6)], &[])
        .expect("zeros placed");
    assert_eq!(store.memory_in_use().expect("measured"), 4 * PAGE_SIZE);
    assert_eq!(first_byte(&store, 13), 0);
    assert_eq!(first_byte(&store, 14), 7);
    assert_eq!(store.received(SPACE), PageSet::from_iter([range(8, 10)]));
}

#[test]
fn pages_that_were_never_received_are_told_from_zero_pages() {
    let store = store();
    store
        .place(SPACE, &[data(1, 2), zero(4, 2)], &filled(1, 2))
        .expect("placed");
    let wanted = PageSet::from_iter([range(0, 6)]);
    assert_eq!(
        store.missing(SPACE, &wanted),
        PageSet::from_iter([range(0, 1), range(3, 1)])
    );
    assert_eq!(store.missing(SpaceId(77), &wanted), wanted);
}

#[test]
fn pages_of_another_space_are_copied_and_refused_if_it_does_not_have_them_all() {
    let store = store();
    let other = SpaceId(9);
    let same = |start, pages, origin| PageRun {
        pages: range(start, pages),
        content: RunContent::Same(origin),
    };
    store
        .place(other, &[data(4, 4), zero(8, 1)], &filled(7, 4))
        .expect("placed");
    store
        .place(SPACE, &[data(2, 3), same(5, 2, other)], &filled(3, 3))
        .expect("placed");
    let bytes: Vec<u8> = (2..7).map(|page| first_byte(&store, page)).collect();
    assert_eq!(bytes, [3, 3, 3, 7, 7]);
    assert_eq!(store.received(SPACE), PageSet::from_iter([range(2, 5)]));
    // A copy: what comes for the other space later does not change it.
    store
        .place(other, &[data(5, 1)], &filled(8, 1))
        .expect("placed");
    assert_eq!(first_byte(&store, 5), 7);

    for (start, pages, origin) in [(3, 2, other), (7, 2, other), (4, 1, SpaceId(77))] {
        let refused = store.place(SPACE, &[same(start, pages, origin)], &[]);
        assert!(
            matches!(refused, Err(PageStoreError::NoOrigin { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(store.received(SPACE), PageSet::from_iter([range(2, 5)]));
}

fn owed(start: u64, pages: u64) -> PageRun {
    PageRun {
        pages: range(start, pages),
        content: RunContent::Owed,
    }
}

#[test]
fn an_owed_page_forgets_its_older_copy_and_is_told_from_a_missing_one() {
    let store = store();
    store
        .place(SPACE, &[data(0, 8)], &filled(7, 8))
        .expect("placed");
    let said = store.place(SPACE, &[owed(2, 3), owed(8, 2)], &[]);
    assert_eq!(said.expect("taken"), []);
    assert_eq!(store.memory_in_use().expect("measured"), 5 * PAGE_SIZE);
    assert_eq!(
        store.owed(SPACE),
        PageSet::from_iter([range(2, 3), range(8, 2)])
    );
    assert_eq!(
        store.received(SPACE),
        PageSet::from_iter([range(0, 2), range(5, 3)])
    );
    let wanted = PageSet::from_iter([range(0, 12)]);
    assert_eq!(
        store.missing(SPACE, &wanted),
        PageSet::from_iter([range(10, 2)])
    );
    // A newer copy on the same stream ends the debt, zero or not.
    store
        .place(SPACE, &[data(2, 1), zero(3, 1)], &filled(9, 1))
        .expect("placed");
    assert_eq!(
        store.owed(SPACE),
        PageSet::from_iter([range(4, 1), range(8, 2)])
    );
    assert_eq!((first_byte(&store, 2), first_byte(&store, 3)), (9, 0));
    store
        .retain(SPACE, &PageSet::from_iter([range(0, 9)]))
        .expect("retained");
    assert_eq!(
        store.owed(SPACE),
        PageSet::from_iter([range(4, 1), range(8, 1)])
    );
}

#[test]
fn of_an_owed_page_the_first_copy_is_taken_and_put_on_record_and_no_other() {
    let store = store();
    store
        .place(SPACE, &[data(0, 2), owed(2, 8)], &filled(1, 2))
        .expect("placed");
    let arrivals = Arrivals::new().expect("a record");
    let record = arrivals.try_clone().expect("a handle");
    store.track(SPACE, arrivals).expect("tracked");
    let came = store.place(SPACE, &[data(3, 2), zero(5, 1)], &filled(4, 2));
    assert_eq!(came.expect("placed"), [range(3, 3)]);
    assert_eq!(record.among(range(0, 20)).expect("read"), [range(3, 3)]);
    // The pager has taken page 3 meanwhile. A late copy must not fill it again.
    punch(store.memfd(SPACE).expect("a memfd"), range(3, 1)).expect("punched");
    let came = store.place(SPACE, &[data(2, 3)], &filled(5, 3));
    assert_eq!(came.expect("placed"), [range(2, 1)]);
    assert_eq!(
        [2, 3, 4, 5].map(|page| first_byte(&store, page)),
        [5, 0, 4, 0]
    );
    assert_eq!(store.owed(SPACE), PageSet::from_iter([range(6, 4)]));
    for refused in [data(1, 1), data(9, 2), owed(6, 1)] {
        let bytes = match refused.content {
            RunContent::Data => filled(6, refused.pages.pages()),
            _ => Vec::new(),
        };
        let refused = store.place(SPACE, &[refused], &bytes);
        assert!(
            matches!(refused, Err(PageStoreError::NotOwed { .. })),
            "{refused:?}"
        );
    }
    assert_eq!([1, 6, 9].map(|page| first_byte(&store, page)), [1, 0, 0]);
}

#[test]
fn a_copy_that_could_not_be_placed_leaves_the_page_owed() {
    let store = store();
    store
        .place(SPACE, &[data(0, 60), owed(100, 8)], &filled(1, 60))
        .expect("placed");
    let arrivals = Arrivals::new().expect("a record");
    store.track(SPACE, arrivals).expect("tracked");
    let full = store.place(SPACE, &[data(100, 8)], &filled(2, 8));
    assert!(matches!(full, Err(PageStoreError::Full { .. })), "{full:?}");
    assert_eq!(store.owed(SPACE), PageSet::from_iter([range(100, 8)]));
    let came = store.place(SPACE, &[data(100, 4)], &filled(2, 4));
    assert_eq!(came.expect("there is room"), [range(100, 4)]);
}

#[test]
fn a_record_with_arrivals_on_it_settles_what_was_owed() {
    let store = store();
    store.place(SPACE, &[owed(0, 10)], &[]).expect("placed");
    let arrivals = Arrivals::new().expect("a record");
    arrivals.mark(range(3, 4)).expect("marked");
    store.track(SPACE, arrivals).expect("tracked");
    assert_eq!(
        store.owed(SPACE),
        PageSet::from_iter([range(0, 3), range(7, 3)])
    );
    assert_eq!(store.received(SPACE), PageSet::from_iter([range(3, 4)]));
}

#[test]
fn threads_that_place_the_same_owed_pages_place_each_once() {
    let store = PageStore::new(PageStoreLimits {
        spaces: 1,
        bytes: 4096 * PAGE_SIZE,
    });
    store.place(SPACE, &[owed(0, 2048)], &[]).expect("placed");
    let arrivals = Arrivals::new().expect("a record");
    let record = arrivals.try_clone().expect("a handle");
    store.track(SPACE, arrivals).expect("tracked");
    let arrived: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..5u64)
            .map(|thread| {
                let (store, record) = (&store, &record);
                scope.spawn(move || {
                    let mut arrived = 0;
                    for start in (0..2048u64).map(|at| at * (2 * thread + 1) % 2041) {
                        let came = store.place(SPACE, &[data(start, 7)], &filled(3, 7));
                        for run in came.expect("placed") {
                            assert_eq!(record.among(run).expect("read"), [run]);
                            // As the pager does: whoever is told of a page takes it, and it must stay taken.
                            let memfd = store.memfd(SPACE).expect("a memfd");
                            punch(memfd, run).expect("punched");
                            arrived += run.pages();
                        }
                    }
                    arrived
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("placed")).sum()
    });
    assert_eq!(arrived, 2047);
    assert_eq!(store.owed(SPACE), PageSet::from_iter([range(2047, 1)]));
    assert_eq!(store.memory_in_use().expect("measured"), 0);
}

#[test]
fn the_byte_limit_counts_data_once_and_refuses_before_writing() {
    let store = store();
    store
        .place(SPACE, &[data(0, 60)], &filled(1, 60))
        .expect("below the limit");
    store
        .place(SPACE, &[data(0, 60)], &filled(2, 60))
        .expect("newer copies take no more memory");
    let refused = store.place(SPACE, &[data(100, 5)], &filled(3, 5));
    assert!(
        matches!(refused, Err(PageStoreError::Full { pages: 5, .. })),
        "{refused:?}"
    );
    assert_eq!(store.memory_in_use().expect("measured"), 60 * PAGE_SIZE);
    assert!(!store.received(SPACE).contains(PageNumber(100)));
    store
        .place(SPACE, &[zero(0, 10)], &[])
        .expect("zeros are free");
    store
        .place(SPACE, &[data(100, 5)], &filled(3, 5))
        .expect("there is room again");
    store.drop_space(SPACE);
    store.drop_space(SPACE);
    assert_eq!(store.memory_in_use().expect("measured"), 0);
    store
        .place(SPACE, &[data(0, 64)], &filled(1, 64))
        .expect("all of it is free again");
}

#[test]
fn the_number_of_spaces_is_limited() {
    let store = store();
    for id in [0, 1] {
        store
            .place(SpaceId(id), &[zero(0, 1)], &[])
            .expect("within the limit");
    }
    assert!(matches!(
        store.place(SpaceId(2), &[zero(0, 1)], &[]),
        Err(PageStoreError::TooManySpaces { limit: 2, .. })
    ));
    assert_eq!(store.spaces(), [SpaceId(0), SpaceId(1)]);
}

#[test]
fn a_payload_of_the_wrong_length_is_refused() {
    let store = store();
    for length in [0, 4095, 4097, 8192] {
        let refused = store.place(SPACE, &[data(0, 1), zero(1, 1)], &vec![1; length]);
        assert!(
            matches!(refused, Err(PageStoreError::PayloadLength { .. })),
            "{length}"
        );
    }
    assert!(store.spaces().is_empty());
}

#[test]
fn the_last_page_a_user_can_have_is_placed_like_any_other() {
    let store = store();
    let last = PageNumber::LIMIT.0 - 1;
    store
        .place(SPACE, &[data(last, 1)], &filled(9, 1))
        .expect("placed");
    assert_eq!(first_byte(&store, last), 9);
}

#[test]
fn frames_of_one_space_are_placed_from_several_threads() {
    let store = PageStore::new(PageStoreLimits {
        spaces: 1,
        bytes: 4096 * PAGE_SIZE,
    });
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let store = &store;
            scope.spawn(move || {
                for round in 0..8u8 {
                    for page in 0..64 {
                        store
                            .place(
                                SPACE,
                                &[data(page * 4 + thread, 1)],
                                &filled(round * 4 + thread as u8, 1),
                            )
                            .expect("placed");
                    }
                }
            });
        }
    });
    for page in 0..256 {
        assert_eq!(first_byte(&store, page), 28 + (page % 4) as u8);
    }
    assert_eq!(store.received(SPACE).pages(), 256);
}

proptest! {
    #[test]
    fn the_newest_copy_of_every_page_is_kept(
        frames in prop::collection::vec((any::<bool>(), 0u64..24, 1u64..8, 1u8..255), 0..40)
    ) {
        let store = store();
        let mut model = BTreeMap::new();
        for (is_data, start, pages, byte) in frames {
            if is_data {
                store.place(SPACE, &[data(start, pages)], &filled(byte, pages)).expect("placed");
            } else {
                store.place(SPACE, &[zero(start, pages)], &[]).expect("placed");
            }
            model.extend((start..start + pages).map(|page| (page, if is_data { byte } else { 0 })));
        }
        let pages: Vec<u64> = store.received(SPACE).iter().flat_map(|r| r.start().0..r.end().0).collect();
        prop_assert_eq!(pages, model.keys().copied().collect::<Vec<_>>());
        for (&page, &byte) in &model {
            prop_assert_eq!(first_byte(&store, page), byte);
        }
        let with_data = model.values().filter(|&&byte| byte != 0).count() as u64;
        prop_assert_eq!(store.memory_in_use().expect("measured"), with_data * PAGE_SIZE);
    }
}

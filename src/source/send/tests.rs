use super::*;
use crate::kernel::forked::Forked;
use crate::kernel::process_memory::ProcessMemory;
use crate::wire::page_frame::{Frame, HEADER_LEN, Header, RunKind, Scratch};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const SPACE: SpaceId = SpaceId(3);

/// A stream that ends in memory.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<Bytes>>>);

impl FrameSink for Kept {
    fn send(&mut self, frame: EncodedFrame) -> io::Result<Duration> {
        self.0.lock().expect("not poisoned").push(frame.to_bytes());
        Ok(Duration::ZERO)
    }
}

impl Kept {
    /// The pages of [`SPACE`] that came, in order of arrival, with their content; `None` is zero.
    fn pages(&self) -> Vec<(u64, Option<Vec<u8>>)> {
        let came = self.came().into_iter();
        came.map(|(space, page, _, content)| {
            assert_eq!(space, SPACE);
            (page, content)
        })
        .collect()
    }

    fn came(&self) -> Vec<(SpaceId, u64, RunKind, Option<Vec<u8>>)> {
        let mut pages = Vec::new();
        for bytes in self.0.lock().expect("not poisoned").drain(..) {
            let header = Header::decode(bytes[..HEADER_LEN].try_into().expect("a header"));
            let frame = Frame::decode(header.expect("sound"), bytes.slice(HEADER_LEN..));
            let frame = frame.expect("sound");
            let mut scratch = Scratch::new();
            let mut data = frame.raw(&mut scratch).expect("sound").chunks(bytes_of(1));
            for run in frame.runs() {
                for page in run.range.start().0..run.range.end().0 {
                    let content = match run.kind {
                        RunKind::Data => Some(data.next().expect("a data page").to_vec()),
                        RunKind::Zero | RunKind::Same(_) => None,
                        RunKind::Owed => Some(b"owed".to_vec()),
                    };
                    pages.push((frame.space(), page, run.kind, content));
                }
            }
        }
        pages
    }
}

/// Memory of this process, on page borders, over several regions.
struct Memory {
    bytes: Vec<u8>,
    first: PageNumber,
    pages: u64,
}

impl Memory {
    fn new(pages: u64) -> Memory {
        let bytes = vec![0; bytes_of(pages + 1)];
        let first = PageNumber((bytes.as_ptr() as u64).div_ceil(PAGE_SIZE));
        Memory {
            bytes,
            first,
            pages,
        }
    }

    fn page(&mut self, index: u64) -> &mut [u8] {
        let start =
            usize::try_from((self.first.0 + index) * PAGE_SIZE - self.bytes.as_ptr() as u64);
        let start = start.expect("inside");
        &mut self.bytes[start..start + bytes_of(1)]
    }

    fn to_send(&self) -> Vec<PagesToSend> {
        let range = PageRange::from_start_len(self.first, self.pages).expect("not empty");
        vec![PagesToSend {
            space: SPACE,
            pid: std::process::id().cast_signed(),
            pages: [range].into_iter().collect(),
        }]
    }
}

fn sender(streams: usize) -> (Sender<Kept>, Vec<Kept>) {
    let kept: Vec<Kept> = (0..streams).map(|_| Kept::default()).collect();
    (Sender::new(kept.clone(), Compression::Auto), kept)
}

#[test]
fn every_page_arrives_once_with_its_content_and_zero_pages_cost_nothing() {
    let mut memory = Memory::new(1500);
    for index in (0..1500).step_by(3) {
        let byte = u8::try_from(index % 251 + 1).expect("small");
        memory.page(index).fill(byte);
    }
    let (mut sender, kept) = sender(2);
    let sent = sender
        .send(&memory.to_send(), &Progress::default())
        .expect("sent");
    assert_eq!(
        (sent.pages, sent.data_pages, sent.zero_pages),
        (1500, 500, 1000)
    );
    assert_eq!(sent.bytes_raw, 500 * PAGE_SIZE);
    let mut arrived = BTreeMap::new();
    for (page, content) in kept.iter().flat_map(Kept::pages) {
        assert!(
            arrived.insert(page, content).is_none(),
            "page {page:#x} came twice"
        );
    }
    for index in 0..1500 {
        let content = arrived.remove(&(memory.first.0 + index)).expect("it came");
        let zero = memory.page(index).iter().all(|&byte| byte == 0);
        assert_eq!(content.as_deref(), (!zero).then_some(&*memory.page(index)));
    }
    assert!(arrived.is_empty());
    assert_eq!(sender.sent(SPACE).map(PageSet::pages), Some(1500));
}

#[test]
fn a_page_the_target_has_is_not_sent_again_until_it_changes() {
    let mut memory = Memory::new(100);
    for index in 0..100 {
        memory.page(index).fill(7);
    }
    let (mut sender, kept) = sender(1);
    sender
        .send(&memory.to_send(), &Progress::default())
        .expect("sent");
    kept[0].pages();
    memory.page(5).fill(8);
    memory.page(6).fill(0);
    let sent = sender
        .send(&memory.to_send(), &Progress::default())
        .expect("sent");
    assert_eq!(
        (sent.same_pages, sent.data_pages, sent.zero_pages),
        (98, 1, 1)
    );
    let base = memory.first.0;
    assert_eq!(
        kept[0].pages(),
        [(base + 5, Some(vec![8; bytes_of(1)])), (base + 6, None)]
    );
}

#[test]
fn what_forked_processes_share_is_sent_once_and_stays_shared() {
    const CHILD: SpaceId = SpaceId(4);
    let mut memory = Memory::new(1500);
    for index in 0..1500 {
        memory.page(index).fill(index as u8 | 1);
    }
    memory.page(3).fill(0);
    let child = Forked::new();
    // These are two pages now.
    memory.page(700).fill(77);
    let mut to_send = memory.to_send();
    to_send.push(PagesToSend {
        space: CHILD,
        pid: child.pid(),
        ..to_send[0].clone()
    });
    let (mut sender, kept) = sender(2);
    let sent = sender.send(&to_send, &Progress::default()).expect("sent");
    assert_eq!(
        (sent.data_pages, sent.zero_pages, sent.same_pages),
        (1500, 2, 1498)
    );
    let mut target: BTreeMap<(SpaceId, u64), Vec<u8>> = BTreeMap::new();
    for (space, page, kind, content) in kept.iter().flat_map(Kept::came) {
        let content = match kind {
            // What is there by then counts, as at a target.
            RunKind::Same(origin) => target[&(origin, page)].clone(),
            _ => content.unwrap_or_else(|| vec![0; bytes_of(1)]),
        };
        target.insert((space, page), content);
    }
    for index in 0..1500 {
        let page = memory.first.0 + index;
        assert_eq!(target[&(SPACE, page)], memory.page(index));
        let childs = match index {
            700 => vec![700u64 as u8 | 1; bytes_of(1)],
            _ => memory.page(index).to_vec(),
        };
        assert_eq!(target[&(CHILD, page)], childs, "page {index}");
    }
    // The reading has copied nothing.
    let shared = ProcessMemory::open_shared(child.pid()).expect("opens");
    let range = PageRange::from_start_len(memory.first, 1500).expect("a range");
    let frames = shared.shared_frames(&[range]).expect("told");
    assert_eq!(frames.iter().flatten().count(), 1499);
}

#[test]
fn a_page_always_takes_the_same_stream() {
    let mut memory = Memory::new(3000);
    let (mut sender, kept) = sender(3);
    let mut streams = BTreeMap::new();
    for round in 1..4 {
        for index in 0..3000 {
            memory.page(index).fill(round);
        }
        sender
            .send(&memory.to_send(), &Progress::default())
            .expect("sent");
        for (stream, kept) in kept.iter().enumerate() {
            for (page, _) in kept.pages() {
                assert_eq!(*streams.entry(page).or_insert(stream), stream);
            }
        }
    }
    assert_eq!(streams.len(), 3000);
}

#[test]
fn an_owed_page_follows_its_older_copies_and_is_no_longer_counted_as_sent() {
    let mut memory = Memory::new(3000);
    for index in 0..3000 {
        memory.page(index).fill(7);
    }
    let (mut sender, kept) = sender(3);
    let progress = Progress::default();
    sender.send(&memory.to_send(), &progress).expect("sent");
    let mut streams = BTreeMap::new();
    for (stream, kept) in kept.iter().enumerate() {
        streams.extend(kept.pages().into_iter().map(|(page, _)| (page, stream)));
    }
    let first = memory.first.0;
    let range = |start, pages| {
        PageRange::from_start_len(PageNumber(first + start), pages).expect("a range")
    };
    let owed: PageSet = [range(0, 2000), range(2500, 1)].into_iter().collect();
    let frames: u64 = sender.frames().iter().sum();
    let bytes = sender.owe(&[(SPACE, owed.clone())]).expect("said");
    let frames = sender.frames().iter().sum::<u64>() - frames;
    assert!(
        frames <= 3 && bytes < 3 * 1024,
        "{frames} frames, {bytes} bytes"
    );
    let mut said = PageSet::new();
    for (stream, kept) in kept.iter().enumerate() {
        for (page, content) in kept.pages() {
            assert_eq!(content.as_deref(), Some(&b"owed"[..]));
            assert_eq!(streams[&page], stream, "page {page:#x} changed its stream");
            said.insert(PageRange::from_start_len(PageNumber(page), 1).expect("a page"));
        }
    }
    assert_eq!(said, owed);
    let sent = sender.sent(SPACE).expect("some");
    assert_eq!(sent.pages(), 999);
    assert!(!sent.contains(PageNumber(first)));
    // The content has not changed, and has to be sent all the same.
    let sent = sender.send(&memory.to_send(), &progress).expect("sent");
    assert_eq!(sent.same_pages, 0);
}

#[test]
fn pages_that_are_gone_are_left_out() {
    let mut memory = Memory::new(4);
    memory.page(0).fill(1);
    let mut to_send = memory.to_send();
    // The first page of an address space is never mapped.
    to_send[0]
        .pages
        .insert(PageRange::from_start_len(PageNumber(0), 1).expect("a page"));
    let (mut sender, kept) = sender(1);
    let sent = sender.send(&to_send, &Progress::default()).expect("sent");
    assert_eq!(sent.pages, 4);
    assert!(kept[0].pages().iter().all(|(page, _)| *page != 0));
    let sent = sender.sent(SPACE).expect("some");
    assert!(
        !sent.contains(PageNumber(0)),
        "a page that was not read counts as missing"
    );
}

#[test]
fn a_cancelled_send_stops() {
    let mut memory = Memory::new(600);
    memory.page(0).fill(1);
    let (mut sender, _kept) = sender(1);
    let progress = Progress::default();
    progress.cancelled.store(true, Ordering::Relaxed);
    let stopped = sender.send(&memory.to_send(), &progress);
    assert!(matches!(stopped, Err(SendError::Cancelled)));
}

#[test]
fn what_is_forgotten_is_not_there_and_comes_with_its_new_content() {
    let mut memory = Memory::new(3);
    memory.page(1).fill(7);
    let (mut sender, kept) = sender(1);
    let everything = memory.to_send();
    sender
        .send(&everything, &Progress::default())
        .expect("sent");
    let stale = PageRange::from_start_len(PageNumber(memory.first.0 + 1), 1).expect("a page");
    sender.forget(SPACE, &[stale].into_iter().collect());
    let there = sender.sent(SPACE).expect("the others");
    assert!(!there.contains(stale.start()) && there.pages() == 2);

    kept[0].pages();
    memory.page(1).fill(0);
    sender
        .send(&everything, &Progress::default())
        .expect("sent");
    assert_eq!(kept[0].pages(), [(stale.start().0, None)]);
    assert_eq!(sender.sent(SPACE).expect("all").pages(), 3);
}

/// A page that changes when it was read already, and of which no scan says so.
#[test]
fn what_is_in_doubt_is_known_and_sent_again_where_it_is_another() {
    let mut memory = Memory::new(1500);
    for index in 0..1500 {
        memory.page(index).fill(7);
    }
    let (mut sender, kept) = sender(2);
    let send = |sender: &mut Sender<Kept>, memory: &Memory| {
        let sent = sender.send(&memory.to_send(), &Progress::default());
        sent.expect("sent").data_pages
    };
    assert_eq!(send(&mut sender, &memory), 1500);
    assert!(sender.in_doubt(SPACE).is_none());
    sender.doubt(SPACE);
    assert_eq!(sender.pages_in_doubt(), 0, "what was sent before is right");
    assert_eq!(send(&mut sender, &memory), 1500, "nothing is known of it");
    assert_eq!(sender.pages_in_doubt(), 1500);
    memory.page(1234).fill(8);
    let doubt = sender.in_doubt(SPACE).expect("in doubt").clone();
    kept.iter().for_each(|kept| drop(kept.pages()));
    let again = PagesToSend {
        pages: doubt,
        ..memory.to_send().remove(0)
    };
    let sent = sender.send(&[again], &Progress::default()).expect("sent");
    assert_eq!((sent.data_pages, sent.same_pages), (1, 1499));
    let came: Vec<_> = kept.iter().flat_map(Kept::pages).collect();
    assert_eq!(came, [(memory.first.0 + 1234, Some(vec![8; 4096]))]);
    let one = PageRange::from_start_len(memory.first, 1).expect("a page");
    sender.forget(SPACE, &[one].into_iter().collect());
    assert_eq!(sender.pages_in_doubt(), 1499);
    sender.retain(|_| false);
    assert_eq!(sender.pages_in_doubt(), 0);
}

//! The CRIU image files the engine reads and writes: inventory, pagemap and mm.
//!
//! A file is a magic (or, for service files, two), then records of a u32 length and a protobuf message, little-endian
//! (criu/include/magic.h, criu/protobuf.c, images/*.proto). Files may come from a peer: every length is checked and
//! nothing panics on bad bytes.

use crate::memory::{PAGE_SIZE, PageNumber, PageRange, VirtAddr};
use prost::Message;
use thiserror::Error;

/// First magic of the images of one dump (`IMG_COMMON_MAGIC`).
const IMG_COMMON_MAGIC: u32 = 0x5456_4319;
/// First magic of service files such as the inventory uses the file's own magic only.
const INVENTORY_MAGIC: u32 = 0x5831_3116;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const MM_MAGIC: u32 = 0x5749_2820;

/// A record longer than this is refused: CRIU's own largest (an mm with 65530 mappings) stays below 8 MiB.
const LONGEST_RECORD: usize = 64 << 20;

/// What is wrong with an image file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ImageError {
    /// The file ends inside a magic, a length or a record.
    #[error("the image ends early, at byte {at}")]
    Truncated {
        /// Offset of the item that is cut.
        at: usize,
    },
    /// It is another kind of image, or none.
    #[error("not a {expected} image: magic {found:#x}")]
    WrongMagic {
        /// The kind that was asked for.
        expected: &'static str,
        /// The magic in the file.
        found: u32,
    },
    /// A record claims to be longer than any real one.
    #[error("a record of {length} bytes at byte {at} is longer than any CRIU writes")]
    TooLong {
        /// The claimed length.
        length: usize,
        /// Offset of the record's length field.
        at: usize,
    },
    /// A record is not the protobuf message it should be.
    #[error("the record at byte {at} does not parse as {expected}")]
    Malformed {
        /// The message expected.
        expected: &'static str,
        /// Offset of the record.
        at: usize,
    },
    /// Addresses that are not pages of a user address space, or are out of order.
    #[error("page range at {vaddr:#x}, {pages} pages, is not a range of user pages in order")]
    BadRange {
        /// Start address claimed.
        vaddr: u64,
        /// Page count claimed.
        pages: u64,
    },
}

/// A pagemap image (`pagemap-PID.img`): which pages a process has, and where their bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// The number N of the `pages-N.img` that holds the data.
    pub pages_id: u32,
    /// In ascending order of address, not overlapping.
    pub entries: Vec<PagemapEntry>,
}

/// One run of pages in a [`Pagemap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapEntry {
    /// The pages.
    pub range: PageRange,
    /// Where their bytes are.
    pub place: PagePlace,
}

/// Where the bytes of a pagemap entry are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagePlace {
    /// In the pages file of this dump, at the next free offset.
    Here,
    /// In the parent dump: with a synthetic parent, in the engine's page store.
    Parent,
    /// Delivered through userfaultfd after the restore.
    Lazy,
}

const PE_PARENT: u32 = 1;
const PE_LAZY: u32 = 2;
const PE_PRESENT: u32 = 4;

impl Pagemap {
    /// Parses a `pagemap-*.img`.
    pub fn parse(bytes: &[u8]) -> Result<Pagemap, ImageError> {
        let mut records = Records::open(bytes, PAGEMAP_MAGIC, "pagemap")?;
        let head: PagemapHead = records
            .next("pagemap head")?
            .ok_or(ImageError::Truncated { at: 8 })?;
        let mut entries = Vec::new();
        let mut previous_end = PageNumber(0);
        while let Some(entry) = records.next::<PagemapMessage>("pagemap entry")? {
            let pages = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
            let bad = ImageError::BadRange {
                vaddr: entry.vaddr,
                pages,
            };
            let range = PageRange::from_start_len(VirtAddr(entry.vaddr).page(), pages);
            let range =
                range.filter(|range| range.start() >= previous_end && entry.vaddr % PAGE_SIZE == 0);
            let range = range.ok_or(bad)?;
            previous_end = range.end();
            entries.push(PagemapEntry {
                range,
                place: entry.place(),
            });
        }
        Ok(Pagemap {
            pages_id: head.pages_id,
            entries,
        })
    }

    /// The file's bytes, as CRIU 4.1 and 4.2 read them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = header(PAGEMAP_MAGIC);
        push_record(
            &mut bytes,
            &PagemapHead {
                pages_id: self.pages_id,
            },
        );
        for entry in &self.entries {
            push_record(
                &mut bytes,
                &PagemapMessage {
                    vaddr: entry.range.start().addr().0,
                    // CRIU before 4.2 reads only the old field; longer runs than it can count are never written.
                    compat_nr_pages: u32::try_from(entry.range.pages()).unwrap_or(u32::MAX),
                    in_parent: None,
                    flags: Some(match entry.place {
                        PagePlace::Here => PE_PRESENT,
                        PagePlace::Parent => PE_PARENT,
                        PagePlace::Lazy => PE_LAZY,
                    }),
                    nr_pages: Some(entry.range.pages()),
                },
            );
        }
        bytes
    }

    /// The pages whose bytes this dump left to its parent.
    pub fn in_parent(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.entries
            .iter()
            .filter(|entry| entry.place == PagePlace::Parent)
            .map(|entry| entry.range)
    }
}

/// The mappings of a process (`mm-PID.img`), as far as the engine needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mappings {
    /// In ascending order of address.
    pub vmas: Vec<MappedArea>,
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedArea {
    /// Its pages.
    pub range: PageRange,
    /// Whether its pages may come through userfaultfd, after the process runs again: CRIU restores it so when told to be lazy, and a
    /// fork meanwhile does to them what the mapping says.
    pub lazy: bool,
}

impl Mappings {
    /// Parses an `mm-*.img`.
    pub fn parse(bytes: &[u8]) -> Result<Mappings, ImageError> {
        let mut records = Records::open(bytes, MM_MAGIC, "mm")?;
        let mm: MmMessage = records.next("mm")?.ok_or(ImageError::Truncated { at: 8 })?;
        let mut vmas = Vec::with_capacity(mm.vmas.len());
        for vma in mm.vmas {
            // The vsyscall page lies above every user address and never has pages of its own.
            if vma.status & VMA_AREA_VSYSCALL != 0 {
                continue;
            }
            let bad = ImageError::BadRange {
                vaddr: vma.start,
                pages: vma.end.saturating_sub(vma.start) / PAGE_SIZE,
            };
            let range = PageRange::from_addrs(VirtAddr(vma.start), VirtAddr(vma.end)).ok_or(bad)?;
            vmas.push(MappedArea {
                range,
                lazy: vma.can_be_lazy() && !vma.is_wiped_on_fork(),
            });
        }
        vmas.sort_by_key(|vma| vma.range);
        Ok(Mappings { vmas })
    }
}

/// The inventory of a synthetic parent, taken at `uptime_us` microseconds after boot.
///
/// The time must be later than the start of every task in the dump, or CRIU takes their pids for reused ones.
pub fn synthetic_inventory(uptime_us: u64) -> Vec<u8> {
    let mut bytes = INVENTORY_MAGIC.to_le_bytes().to_vec();
    push_record(
        &mut bytes,
        &InventoryMessage {
            img_version: 2,
            fdinfo_per_id: Some(true),
            dump_uptime: Some(uptime_us),
            pre_dump_mode: Some(9),
        },
    );
    bytes
}

/// The records of an image file after its magics.
struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    fn open(
        bytes: &'a [u8],
        magic: u32,
        expected: &'static str,
    ) -> Result<Records<'a>, ImageError> {
        let mut records = Records { bytes, at: 0 };
        for wanted in [IMG_COMMON_MAGIC, magic] {
            let found = records
                .u32()?
                .ok_or(ImageError::Truncated { at: records.at })?;
            if found != wanted {
                return Err(ImageError::WrongMagic { expected, found });
            }
        }
        Ok(records)
    }

    /// The next record, or `None` at the end of the file.
    fn next<M: Message + Default>(
        &mut self,
        expected: &'static str,
    ) -> Result<Option<M>, ImageError> {
        let at = self.at;
        let Some(length) = self.u32()? else {
            return Ok(None);
        };
        let length = length as usize;
        if length > LONGEST_RECORD {
            return Err(ImageError::TooLong { length, at });
        }
        let record = self
            .bytes
            .get(self.at..self.at + length)
            .ok_or(ImageError::Truncated { at: self.at })?;
        self.at += length;
        M::decode(record)
            .map(Some)
            .map_err(|_| ImageError::Malformed { expected, at })
    }

    fn u32(&mut self) -> Result<Option<u32>, ImageError> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return Ok(None);
        }
        let word = rest
            .first_chunk()
            .ok_or(ImageError::Truncated { at: self.at })?;
        self.at += word.len();
        Ok(Some(u32::from_le_bytes(*word)))
    }
}

fn header(magic: u32) -> Vec<u8> {
    [IMG_COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat()
}

fn push_record(bytes: &mut Vec<u8>, message: &impl Message) {
    let encoded = message.encode_to_vec();
    bytes.extend_from_slice(
        &u32::try_from(encoded.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    bytes.extend_from_slice(&encoded);
}

// The messages below are the fields of CRIU's images/*.proto that the engine uses, by their numbers there.

#[derive(Clone, PartialEq, Message)]
struct InventoryMessage {
    #[prost(uint32, required, tag = "1")]
    img_version: u32,
    #[prost(bool, optional, tag = "2")]
    fdinfo_per_id: Option<bool>,
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
    #[prost(uint32, optional, tag = "9")]
    pre_dump_mode: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapMessage {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

impl PagemapMessage {
    /// Entries without flags are from before flags existed: data is here unless `in_parent` (criu/pagemap.c).
    fn place(&self) -> PagePlace {
        let flags = self.flags.unwrap_or(if self.in_parent == Some(true) {
            PE_PARENT
        } else {
            PE_PRESENT
        });
        if flags & PE_PARENT != 0 {
            PagePlace::Parent
        } else if flags & PE_PRESENT != 0 {
            PagePlace::Here
        } else {
            PagePlace::Lazy
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct MmMessage {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct VmaMessage {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
    #[prost(uint64, optional, tag = "9")]
    madv: Option<u64>,
}

const VMA_AREA_VSYSCALL: u32 = 1 << 2;
const VMA_AREA_VDSO: u32 = 1 << 3;
const VMA_AREA_VVAR: u32 = 1 << 12;

impl VmaMessage {
    /// CRIU's `vma_entry_can_be_lazy` (criu/include/vma.h).
    fn can_be_lazy(&self) -> bool {
        let flags = self.flags;
        let has = |bits: i32| flags & bits.cast_unsigned() != 0;
        has(libc::MAP_ANONYMOUS)
            && has(libc::MAP_PRIVATE)
            && !has(libc::MAP_LOCKED)
            && !has(libc::MAP_HUGETLB)
            && self.status & (VMA_AREA_VDSO | VMA_AREA_VVAR | VMA_AREA_VSYSCALL) == 0
    }

    /// A child sees zeros there (`MADV_WIPEONFORK`), where libraries of cryptography look whether they were forked. Pages that are
    /// missing at a fork are missing in the child too, and the event does not say that they must stay so.
    fn is_wiped_on_fork(&self) -> bool {
        let wiped = 1 << libc::MADV_WIPEONFORK;
        self.madv.unwrap_or_default() & wiped != 0
    }
}

/// An `mm-*.img` with anonymous private mappings of these ranges; locked ones are not restored lazily.
#[cfg(test)]
pub(crate) fn mm_image(areas: &[(PageRange, bool)]) -> Vec<u8> {
    let vma = |&(range, locked): &(PageRange, bool)| VmaMessage {
        start: range.start().addr().0,
        end: range.end().addr().0,
        flags: (libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | if locked { libc::MAP_LOCKED } else { 0 })
        .cast_unsigned(),
        status: 1,
        madv: None,
    };
    let mut bytes = header(MM_MAGIC);
    push_record(
        &mut bytes,
        &MmMessage {
            vmas: areas.iter().map(vma).collect(),
        },
    );
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(start: u64, pages: u64, place: PagePlace) -> PagemapEntry {
        PagemapEntry {
            range: PageRange::from_start_len(PageNumber(start), pages).unwrap(),
            place,
        }
    }

    #[test]
    fn a_pagemap_survives_being_written_and_read() {
        let pagemap = Pagemap {
            pages_id: 7,
            entries: vec![
                entry(0x400, 3, PagePlace::Here),
                entry(0x500, 1 << 21, PagePlace::Parent),
                entry(0x7fff_ffff, 1, PagePlace::Lazy),
            ],
        };
        assert_eq!(Pagemap::parse(&pagemap.to_bytes()), Ok(pagemap));
    }

    #[test]
    fn what_a_child_must_not_see_is_there_before_the_process_runs() {
        let vma = |start, madv| VmaMessage {
            start,
            end: start + 0x2000,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned(),
            status: 1,
            madv,
        };
        let vmas = vec![
            vma(0x10000, None),
            vma(0x20000, Some(1 << libc::MADV_DONTDUMP)),
            vma(0x30000, Some(1 << libc::MADV_WIPEONFORK)),
        ];
        let mut bytes = header(MM_MAGIC);
        push_record(&mut bytes, &MmMessage { vmas });
        let mappings = Mappings::parse(&bytes).unwrap();
        let lazy: Vec<bool> = mappings.vmas.iter().map(|vma| vma.lazy).collect();
        assert_eq!(lazy, [true, true, false]);
    }

    #[test]
    fn overlapping_pagemap_entries_are_refused() {
        let pagemap = Pagemap {
            pages_id: 1,
            entries: vec![entry(16, 4, PagePlace::Here), entry(18, 4, PagePlace::Here)],
        };
        assert!(matches!(
            Pagemap::parse(&pagemap.to_bytes()),
            Err(ImageError::BadRange { .. })
        ));
    }

    #[test]
    fn the_synthetic_inventory_has_the_bytes_criu_accepts() {
        assert_eq!(
            synthetic_inventory(1),
            [
                0x16, 0x31, 0x31, 0x58, 8, 0, 0, 0, 0x08, 2, 0x10, 1, 0x40, 1, 0x48, 9
            ]
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pagemap::parse(&bytes);
            let _ = Mappings::parse(&bytes);
            let mut framed = header(PAGEMAP_MAGIC);
            framed.extend_from_slice(&bytes);
            let _ = Pagemap::parse(&framed);
            let mut framed = header(MM_MAGIC);
            framed.extend_from_slice(&bytes);
            let _ = Mappings::parse(&framed);
        }
    }
}

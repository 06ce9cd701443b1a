//! The root filesystem's protocol in both directions: whatever is read must survive being sent on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::wire::rootfs::{
    CHUNK, ChunkDigest, Counts, Entry, Kind, MAX_ENTRY, Owner, Placement, Timestamp, ToSource,
    ToTarget, TreePath, Xattr,
};
use migrate_fuzz::write_seeds;

fuzz_target!(
    init: write_seeds(seeds()),
    |input: &[u8]| {
        let mut buffer = Vec::new();
        if let Ok(message) = ToTarget::read(&mut &input[..], &mut buffer) {
            if let ToTarget::Data { bytes, .. } = message {
                assert!((1..=CHUNK).contains(&bytes.len()));
            }
            let (mut sent, mut again) = (Vec::new(), Vec::new());
            message.encode(&mut sent);
            let read = ToTarget::read(&mut &sent[..], &mut again).expect("our own frame");
            assert_eq!(read, message);
        }
        let mut buffer = Vec::new();
        if let Ok(message) = ToSource::read(&mut &input[..], &mut buffer) {
            let mut sent = Vec::new();
            message.encode(&mut sent);
            let read = ToSource::read(&mut &sent[..], &mut Vec::new()).expect("our own frame");
            assert_eq!(read, message);
        }
        assert!(buffer.capacity() <= MAX_ENTRY);
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let path = |path: &[u8]| TreePath::parse(path).expect("a path");
    let mtime = Timestamp {
        seconds: -3,
        nanoseconds: 5,
    };
    let put = |at: &[u8], kind| {
        ToTarget::Put(Entry {
            path: path(at),
            kind,
            mode: 0o4755,
            owner: Owner { uid: 1, gid: 2 },
            mtime,
            xattrs: vec![Xattr {
                name: b"user.a".to_vec(),
                value: vec![7; 30],
            }],
        })
    };
    let counts = Counts {
        puts: 1,
        ..Counts::default()
    };
    let file = Kind::Regular {
        size: 5,
        placement: Placement::Update,
    };
    let to_target = [
        ToTarget::Begin {
            first: true,
            seed: 9,
        },
        ToTarget::Query(vec![path(b"a/b"), path(b"c")]),
        put(b"x", file),
        put(b"x/y", Kind::Symlink(b"../z".to_vec())),
        put(b"n", Kind::CharDevice { major: 1, minor: 3 }),
        ToTarget::Data {
            offset: 4096,
            bytes: b"hello",
        },
        ToTarget::Hole { offset: 1, len: 2 },
        ToTarget::FileEnd(7),
        ToTarget::Link {
            path: path(b"a"),
            existing: path(b"c"),
        },
        ToTarget::Remove(path(b"a/b")),
        ToTarget::DirTime(TreePath::root(), mtime),
        ToTarget::End(counts),
        ToTarget::Done,
    ];
    let digest = ChunkDigest {
        chunk: 3,
        digest: 4,
    };
    let to_source = [
        ToSource::Ready { empty: true },
        ToSource::Digests {
            index: 1,
            digests: vec![digest],
        },
        ToSource::Answered,
        ToSource::Ack(counts),
    ];
    let mut seeds = Vec::new();
    for message in to_target {
        let mut seed = Vec::new();
        message.encode(&mut seed);
        seeds.push(seed);
    }
    for message in to_source {
        let mut seed = Vec::new();
        message.encode(&mut seed);
        seeds.push(seed);
    }
    seeds
}

use super::*;

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: TreePath::parse(path.as_bytes()).unwrap(),
        kind,
        mode: 0o4755,
        owner: Owner { uid: 1, gid: 2 },
        mtime: Timestamp {
            seconds: -3,
            nanoseconds: 999_999_999,
        },
        xattrs: vec![Xattr {
            name: b"user.a".to_vec(),
            value: vec![7; 300],
        }],
    }
}

fn read_back(bytes: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut buffer = Vec::new();
    let message = ToTarget::read(&mut &bytes[..], &mut buffer)?;
    let mut again = Vec::new();
    message.encode(&mut again);
    Ok(again)
}

#[test]
fn every_message_to_the_target_survives_its_encoding() {
    let path = TreePath::parse(b"a/b").unwrap();
    let messages = [
        ToTarget::Begin {
            first: true,
            seed: 9,
        },
        ToTarget::Query(vec![path.clone(), TreePath::parse(b"c").unwrap()]),
        ToTarget::Put(entry(
            "x",
            Kind::Regular {
                size: 5,
                placement: Placement::Update,
            },
        )),
        ToTarget::Put(entry("x/y", Kind::Symlink(b"../z".to_vec()))),
        ToTarget::Put(entry("n", Kind::CharDevice { major: 1, minor: 3 })),
        ToTarget::Data {
            offset: 4096,
            bytes: b"hello",
        },
        ToTarget::Hole { offset: 1, len: 2 },
        ToTarget::FileEnd(u128::MAX - 1),
        ToTarget::Link {
            path: path.clone(),
            existing: TreePath::parse(b"c").unwrap(),
        },
        ToTarget::Remove(path.clone()),
        ToTarget::DirTime(
            TreePath::root(),
            Timestamp {
                seconds: 1,
                nanoseconds: 2,
            },
        ),
        ToTarget::End(Counts {
            puts: 1,
            links: 2,
            removals: 3,
            data_bytes: 4,
        }),
        ToTarget::Done,
    ];
    for message in messages {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let mut buffer = Vec::new();
        assert_eq!(
            ToTarget::read(&mut &bytes[..], &mut buffer).unwrap(),
            message
        );
    }
}

#[test]
fn every_message_to_the_source_survives_its_encoding() {
    let digests = vec![
        ChunkDigest {
            chunk: 0,
            digest: 1,
        },
        ChunkDigest {
            chunk: 9,
            digest: u128::MAX,
        },
    ];
    let mut messages = vec![
        ToSource::Ready { empty: true },
        ToSource::Digests { index: 3, digests },
        ToSource::Answered,
        ToSource::Ack(Counts {
            puts: 1,
            links: 2,
            removals: 3,
            data_bytes: 4,
        }),
    ];
    messages.extend(Refusal::ALL.map(ToSource::Failed));
    for message in messages {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert_eq!(
            ToSource::read(&mut &bytes[..], &mut Vec::new()).unwrap(),
            message
        );
    }
}

#[test]
fn the_bytes_of_begin_and_of_an_entry_are_pinned() {
    let mut bytes = Vec::new();
    ToTarget::Begin {
        first: true,
        seed: 0x0102,
    }
    .encode(&mut bytes);
    assert_eq!(
        bytes,
        b"\x01\0\0\0\x10\0\0\0MGRF\x01\0\x01\0\x02\x01\0\0\0\0\0\0"
    );
    bytes.clear();
    let mut fifo = entry("p", Kind::Fifo);
    fifo.xattrs[0].value = b"v".to_vec();
    ToTarget::Put(fifo).encode(&mut bytes);
    let expected = b"\x03\0\0\0\x3c\0\0\0\x04\0\xed\x09\x01\0\0\0\x02\0\0\0\
        \xfd\xff\xff\xff\xff\xff\xff\xff\xff\xc9\x9a\x3b\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\
        \x01\0p\0\0\x06\0user.a\x01\0\0\0v";
    assert_eq!(bytes, expected);
}

#[test]
fn paths_that_could_leave_the_tree_are_refused() {
    let long = vec![b'a'; 256];
    let deep = b"a/".repeat(2048);
    let bad: [&[u8]; 11] = [
        b"", b"/", b"/etc", b"..", b"a/../b", b"a/..", b".", b"a//b", b"a/", b"a\0b", &long,
    ];
    for path in bad.into_iter().chain([&deep[..], &deep[..4096]]) {
        assert!(
            matches!(TreePath::parse(path), Err(FrameError::Path { .. })),
            "{path:?} was taken"
        );
    }
    assert!(TreePath::parse(&deep[..4095]).is_ok());
    assert!(TreePath::parse(b"..a/.b/...").is_ok());
}

#[test]
fn fields_out_of_range_are_refused() {
    let put = |change: fn(&mut Entry)| {
        let mut entry = entry(
            "x",
            Kind::Regular {
                size: 5,
                placement: Placement::New,
            },
        );
        change(&mut entry);
        let mut bytes = Vec::new();
        ToTarget::Put(entry).encode(&mut bytes);
        read_back(&bytes)
    };
    assert!(put(|_| ()).is_ok());
    assert!(put(|e| e.mode = 0o10000).is_err());
    assert!(put(|e| e.owner.uid = u32::MAX).is_err());
    assert!(put(|e| e.mtime.nanoseconds = 1_000_000_000).is_err());
    assert!(
        put(|e| e.kind = Kind::Regular {
            size: 1 << 63,
            placement: Placement::New
        })
        .is_err()
    );
    assert!(put(|e| e.kind = Kind::Symlink(Vec::new())).is_err());
    assert!(put(|e| e.kind = Kind::Symlink(b"a\0".to_vec())).is_err());
    assert!(put(|e| e.path = TreePath::root()).is_err());
    assert!(put(|e| e.xattrs[0].name = b"system.sockprotoname".to_vec()).is_err());
    assert!(put(|e| e.xattrs[0].name = b"user.".to_vec()).is_err());
    assert!(put(|e| e.xattrs[0].value = vec![0; 65537]).is_err());
}

#[test]
fn a_length_is_refused_before_anything_is_allocated_for_it() {
    let mut buffer = Vec::new();
    for kind in 0..=12u16 {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0, 0xff, 0xff, 0xff, 0xff]);
        let answer = ToTarget::read(&mut &bytes[..], &mut buffer);
        assert!(matches!(
            answer,
            Err(FrameError::TooLong { .. } | FrameError::Kind(_))
        ));
        assert_eq!(buffer.capacity(), 0);
    }
}

#[test]
fn another_version_is_told_apart() {
    let mut bytes = Vec::new();
    ToTarget::Begin {
        first: true,
        seed: 0,
    }
    .encode(&mut bytes);
    bytes[12] = 2;
    assert!(matches!(read_back(&bytes), Err(FrameError::Version(2))));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_decoders_panic(kind in 0u16..13, body in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        if let Ok(again) = read_back(&bytes) {
            proptest::prop_assert_eq!(&again, &bytes);
        }
        let _ = ToSource::read(&mut &bytes[..], &mut Vec::new());
    }
}

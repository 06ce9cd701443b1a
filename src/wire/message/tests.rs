use super::*;
use crate::memory::SpaceId;
use crate::wire::id::{JournalId, MigrationId};
use crate::wire::peer_error::PeerError;
use proptest::prelude::*;
use serde_json::{Value, json};

fn begin() -> Begin {
    Begin {
        migration: MigrationId::from_bytes(7u128.to_be_bytes()),
        container: "web".parse().expect("a container id"),
        requirements: Requirements {
            memory_bytes: 1 << 30,
            rootfs_bytes: 0,
            cpu_flags: vec![CpuFlag::try_from("avx2".to_owned()).expect("a flag")],
            cgroup_version: CgroupVersion::V2,
            memory_limit: Some(2 << 30),
            criu_version: CriuVersion(40201),
            arch: Arch::X86_64,
            rootfs: RootfsMode::Shared,
            shared_rootfs: Some("/srv/web".parse().expect("a path")),
            bind_sources: vec!["/sys/fs/cgroup".parse().expect("a path")],
            shared: vec![shared::Shared {
                path: "/srv/web".parse().expect("a path"),
                real: "/mnt/web".parse().expect("a path"),
                proof: shared::Proof::Written {
                    name: shared::Secret::from_bytes([1; 16]),
                    content: shared::Secret::from_bytes([2; 16]),
                },
            }],
            page_streams: 4,
        },
        dry_run: true,
    }
}

fn decode(bytes: &[u8]) -> Result<Message, MessageError> {
    let (header, body) = bytes.split_first_chunk().expect("a whole header");
    Message::decode(Header::decode(header)?, body)
}

/// The bytes of a message whose body a peer wrote freely.
fn with_body(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"MCTL".to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// `begin()` with one field, named by a JSON pointer, set to `value`.
fn begin_with(pointer: &str, value: Value) -> Result<Message, MessageError> {
    let mut body = serde_json::to_value(begin()).expect("serializes");
    *body.pointer_mut(pointer).expect("the field exists") = value;
    decode(&with_body(1, body.to_string().as_bytes()))
}

#[test]
fn the_bytes_of_a_message_are_pinned() {
    let bytes = Message::from(RoundReceived { round: 3 })
        .encode()
        .expect("encodes");
    assert_eq!(
        &bytes[..],
        b"MCTL\x67\x00\x00\x00\x0b\x00\x00\x00{\"round\":3}"
    );
    let bytes = Message::from(Commit {}).encode().expect("encodes");
    assert_eq!(&bytes[..], b"MCTL\x05\x00\x00\x00\x02\x00\x00\x00{}");
}

#[test]
fn the_body_of_begin_is_pinned() {
    let bytes = Message::from(begin()).encode().expect("encodes");
    let body: Value = serde_json::from_slice(&bytes[HEADER_LEN..]).expect("json");
    let expected = json!({
        "migration": "00000000000000000000000000000007",
        "container": "web",
        "requirements": {
            "memory_bytes": 1u64 << 30,
            "rootfs_bytes": 0,
            "cpu_flags": ["avx2"],
            "cgroup_version": "v2",
            "memory_limit": 2u64 << 30,
            "criu_version": 40201,
            "arch": "x86_64",
            "rootfs": "shared",
            "shared_rootfs": "/srv/web",
            "bind_sources": ["/sys/fs/cgroup"],
            "shared": [{
                "path": "/srv/web",
                "real": "/mnt/web",
                "proof": {
                    "kind": "written",
                    "name": "01010101010101010101010101010101",
                    "content": "02020202020202020202020202020202",
                },
            }],
            "page_streams": 4,
        },
        "dry_run": true,
    });
    assert_eq!(body, expected);
}

#[test]
fn every_message_survives_the_wire() {
    let text = PeerText::from("because");
    let messages: Vec<Message> = vec![
        begin().into(),
        RoundEnd {
            round: 1,
            pages: u64::MAX,
            frames_per_stream: vec![1, 2, 3, 4],
        }
        .into(),
        SpacesEnded {
            spaces: vec![SpaceId(3), SpaceId(u32::MAX)],
        }
        .into(),
        Prestart {
            config: "{}".into(),
            stdio: [
                StdStream::Null,
                StdStream::Pipe { inode: 7 },
                StdStream::Null,
            ],
            pages_apart: true,
        }
        .into(),
        Manifest {
            spaces: vec![SpaceOwner {
                space: SpaceId(0),
                vpid: 1,
            }],
            image_files: vec![ImageFile {
                name: "core-1.img".parse().expect("a name"),
                size: 17,
            }],
            frames_per_stream: vec![5],
            owed_pages: 0,
            reconnect_s: 0,
        }
        .into(),
        Commit {}.into(),
        Abort {
            code: PeerError::Cancelled,
            text: text.clone(),
        }
        .into(),
        Query {
            migration: MigrationId::from_bytes([0xff; 16]),
        }
        .into(),
        Accepted { lazy: true }.into(),
        Refused {
            refusals: vec![Refusal {
                code: PeerError::Unlisted(4711),
                text: text.clone(),
            }],
        }
        .into(),
        RoundReceived { round: 9 }.into(),
        Prepared {
            journal: JournalId::from_bytes([1; 16]),
            compose_us: 1,
            restore_us: 2,
            filled_pages: 3,
        }
        .into(),
        Filled::default().into(),
        Committed::default().into(),
        RolledBack {
            code: PeerError::RestoreFailed,
            text,
        }
        .into(),
        Outcome {
            journal: JournalId::from_bytes([2; 16]),
            fate: Fate::Complete,
        }
        .into(),
        Outcome {
            journal: JournalId::from_bytes([2; 16]),
            fate: Fate::RolledBack,
        }
        .into(),
        Outcome {
            journal: JournalId::from_bytes([2; 16]),
            fate: Fate::UnknownMigration,
        }
        .into(),
        Outcome {
            journal: JournalId::from_bytes([2; 16]),
            fate: Fate::InProgress,
        }
        .into(),
    ];
    for message in messages {
        let bytes = message.encode().expect("encodes");
        assert_eq!(decode(&bytes).expect("decodes"), message);
    }
}

#[test]
fn a_target_that_does_not_say_whether_it_restores_lazily_does_not() {
    let read = decode(&with_body(101, b"{}")).expect("an older target's answer");
    assert_eq!(read, Accepted { lazy: false }.into());
}

#[test]
fn a_header_that_lies_is_refused_before_its_body_is_read() {
    let good = with_body(5, b"{}");
    let header = |change: fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        decode(&bytes)
    };
    assert!(matches!(header(|b| b[0] = 0), Err(MessageError::Magic(_))));
    assert!(matches!(header(|b| b[4] = 99), Err(MessageError::Kind(99))));
    assert!(matches!(header(|b| b[6] = 1), Err(MessageError::Reserved)));
    assert!(matches!(
        header(|b| b[8..12].copy_from_slice(&u32::MAX.to_le_bytes())),
        Err(MessageError::TooLarge(_))
    ));
    assert!(matches!(
        header(|b| b[8] = 3),
        Err(MessageError::Length { .. })
    ));
}

#[test]
fn fields_out_of_range_are_refused() {
    begin_with("/container", json!("web")).expect("the unchanged body is right");
    let wrong = [
        ("/container", json!("../etc")),
        ("/container", json!("")),
        ("/migration", json!("7")),
        ("/requirements/page_streams", json!(0)),
        ("/requirements/page_streams", json!(65)),
        ("/requirements/page_streams", json!(-1)),
        ("/requirements/memory_bytes", json!(u64::MAX)),
        ("/requirements/memory_limit", json!(u64::MAX)),
        ("/requirements/bind_sources", json!(["etc"])),
        ("/requirements/bind_sources", json!(["/a/../b"])),
        ("/requirements/shared", json!([])),
        ("/requirements/shared/0/proof/name", json!("../x")),
        ("/requirements/shared/0/proof/kind", json!("believed")),
        ("/requirements/cpu_flags", json!(["a b"])),
        ("/requirements/cpu_flags", json!(vec!["sse"; 1025])),
        ("/requirements/arch", json!("vax")),
        ("/requirements/cgroup_version", json!("v3")),
    ];
    for (field, value) in wrong {
        let shown = value.to_string();
        assert!(
            begin_with(field, value).is_err(),
            "{field} = {:.60} was accepted",
            shown
        );
    }
}

#[test]
fn processor_features_are_found_on_both_architectures() {
    let names = |text| -> Vec<String> {
        CpuFlag::in_cpuinfo(text)
            .into_iter()
            .map(String::from)
            .collect()
    };
    assert_eq!(
        names("processor\t: 0\nflags\t\t: fpu sse4_2\nflags\t\t: other\n"),
        ["fpu", "sse4_2"]
    );
    assert_eq!(names("Features\t: fp asimd\n"), ["fp", "asimd"]);
    assert!(names("").is_empty());
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    let manifest = |body: Value| decode(&with_body(4, body.to_string().as_bytes()));
    let body = |spaces: Value, files: Value| json!({"spaces": spaces, "image_files": files, "frames_per_stream": [0]});
    manifest(body(
        json!([{"space": 0, "vpid": 1}]),
        json!([{"name": "a", "size": 1}]),
    ))
    .expect("a right manifest is read");
    let wrong = [
        body(
            json!([{"space": 0, "vpid": 1}, {"space": 0, "vpid": 2}]),
            json!([]),
        ),
        body(
            json!([{"space": 0, "vpid": 1}, {"space": 1, "vpid": 1}]),
            json!([]),
        ),
        body(json!([{"space": 0, "vpid": 0}]), json!([])),
        body(json!([]), json!([{"name": "a/b", "size": 1}])),
        body(json!([]), json!([{"name": "..", "size": 1}])),
        body(json!([]), json!([{"name": "a", "size": u64::MAX}])),
        body(
            json!([]),
            json!([{"name": "a", "size": 1}, {"name": "a", "size": 1}]),
        ),
    ];
    for wrong in wrong {
        assert!(manifest(wrong.clone()).is_err(), "{wrong} was accepted");
    }
}

#[test]
fn a_message_too_large_to_be_read_is_not_sent() {
    let name = |i: usize| format!("{i:0>200}").parse().expect("a name");
    let manifest = Manifest {
        spaces: vec![],
        image_files: (0..30_000)
            .map(|i| ImageFile {
                name: name(i),
                size: 0,
            })
            .collect(),
        frames_per_stream: vec![],
        owed_pages: 0,
        reconnect_s: 0,
    };
    assert!(matches!(
        Message::from(manifest).encode(),
        Err(MessageError::TooLarge(_))
    ));
}

#[test]
fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
    let body = "[".repeat(1 << 20);
    assert!(matches!(
        decode(&with_body(1, body.as_bytes())),
        Err(MessageError::Body { .. })
    ));
}

#[test]
fn text_from_a_peer_is_cleaned_when_it_is_read() {
    let body = json!({"code": 103, "text": "\u{1b}]0;evil\u{7}"}).to_string();
    let Message::RolledBack(read) = decode(&with_body(106, body.as_bytes())).expect("decodes")
    else {
        panic!("type 106 is RolledBack");
    };
    assert_eq!(read.text.as_str(), "?]0;evil?");
}

proptest! {
    #[test]
    fn no_bytes_make_the_message_decoder_panic(kind in 0u16..120, body in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&with_body(kind, &body));
    }

    #[test]
    fn a_flipped_byte_never_panics(at in 0usize..400, bits in 1u8..) {
        let mut bytes = Message::from(begin()).encode().expect("encodes").to_vec();
        let at = at % bytes.len();
        bytes[at] ^= bits;
        let _ = decode(&bytes);
    }
}

//! Control messages: whatever decodes must survive being sent on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::memory::SpaceId;
use migrate::wire::id::{JournalId, MigrationId};
use migrate::wire::message::shared::{Digest, Proof, Shared};
use migrate::wire::message::{
    Abort, Accepted, Arch, Begin, CgroupVersion, Commit, Committed, CriuVersion, Fate, Filled,
    HEADER_LEN, Header, ImageFile, MAX_BODY, Manifest, Message, Outcome, PeerText, Prepared,
    Prestart, Query, Refusal, Refused, Requirements, RolledBack, RootfsMode, RoundEnd,
    RoundReceived, SpaceOwner, SpacesEnded, StdStream,
};
use migrate::wire::peer_error::PeerError;
use migrate_fuzz::write_seeds;

fuzz_target!(
    init: write_seeds(messages().iter().map(|m| m.encode().expect("a seed encodes").to_vec())),
    |input: &[u8]| {
        let Some((head, rest)) = input.split_first_chunk::<HEADER_LEN>() else { return };
        let Ok(header) = Header::decode(head) else { return };
        assert!(header.body_len <= MAX_BODY);
        // The mutator rarely keeps the length right; the body is what is of interest.
        let _ = Message::decode(header, rest);
        let mut fitting = *head;
        fitting[8..12].copy_from_slice(&(rest.len() as u32).to_le_bytes());
        let Ok(header) = Header::decode(&fitting) else { return };
        if let Ok(message) = Message::decode(header, rest) {
            let sent = message.encode().expect("what was received can be sent");
            let (head, body) = sent.split_first_chunk().expect("a whole header");
            let header = Header::decode(head).expect("our own header");
            assert_eq!(Message::decode(header, body).expect("our own body"), message);
        }
    }
);

fn messages() -> Vec<Message> {
    let text = PeerText::from("because");
    let code = PeerError::RestoreFailed;
    let migration = MigrationId::from_bytes([0x1a; 16]);
    let journal = JournalId::from_bytes([0x2b; 16]);
    let requirements = Requirements {
        memory_bytes: 1 << 30,
        rootfs_bytes: 1 << 28,
        cpu_flags: vec!["avx2".to_owned().try_into().expect("a flag")],
        cgroup_version: CgroupVersion::V1,
        memory_limit: Some(1 << 31),
        criu_version: CriuVersion(40201),
        arch: Arch::X86_64,
        rootfs: RootfsMode::Shared,
        shared_rootfs: Some("/srv/web".parse().expect("a path")),
        bind_sources: vec!["/srv/data".parse().expect("a path")],
        shared: vec![Shared {
            path: "/srv/web".parse().expect("a path"),
            real: "/srv/web".parse().expect("a path"),
            proof: Proof::Content {
                sha256: Digest::from_bytes([3; 32]),
            },
        }],
        page_streams: 4,
    };
    vec![
        Begin {
            migration,
            container: "web".parse().expect("an id"),
            requirements,
            dry_run: false,
        }
        .into(),
        RoundEnd {
            round: 1,
            pages: 512,
            frames_per_stream: vec![1, 2],
        }
        .into(),
        SpacesEnded {
            spaces: vec![SpaceId(7)],
        }
        .into(),
        Prestart {
            config: r#"{"ociVersion":"1.0.2"}"#.into(),
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
            frames_per_stream: vec![3, 4],
            owed_pages: 0,
            reconnect_s: 0,
        }
        .into(),
        Commit {}.into(),
        Abort {
            code,
            text: text.clone(),
        }
        .into(),
        Query { migration }.into(),
        Accepted { lazy: true }.into(),
        Refused {
            refusals: vec![Refusal {
                code: PeerError::MemoryShort,
                text: text.clone(),
            }],
        }
        .into(),
        RoundReceived { round: 1 }.into(),
        Prepared {
            journal,
            compose_us: 1,
            restore_us: 2,
            filled_pages: 3,
        }
        .into(),
        Committed::default().into(),
        RolledBack { code, text }.into(),
        Outcome {
            journal,
            fate: Fate::InProgress,
        }
        .into(),
        Filled::default().into(),
    ]
}

//! File frame headers: no name that is believed can leave its directory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::wire::file_frame::{FileHeader, HEADER_LEN, Header, MAX_SIZE};
use migrate_fuzz::write_seeds;
use std::path::{Component, Path};

fuzz_target!(
    init: write_seeds(["core-1.img", "a/b/c", "dir/.hidden"].map(|name| {
        let file = FileHeader {
            name: name.parse().expect("a name"),
            mode: 0o644,
            size: 12,
        };
        file.encode().expect("a seed encodes").0.to_vec()
    })),
    |input: &[u8]| {
        let Some((head, rest)) = input.split_first_chunk::<HEADER_LEN>() else { return };
        let Ok(header) = Header::decode(head) else { return };
        let name = &rest[..rest.len().min(header.name_len())];
        let Ok((file, hash)) = header.with_name(name) else { return };
        assert!(file.size <= MAX_SIZE && file.mode <= 0o7777);
        let path: &Path = file.name.as_ref();
        assert!(path.components().all(|c| matches!(c, Component::Normal(_))));
        let (sent, again) = file.encode().expect("what was received can be sent");
        assert_eq!(sent, input[..HEADER_LEN + name.len()]);
        assert_eq!(hash.trailer(), again.trailer());
    }
);

//! The file of trusted peers: what is read of it are peers with proper names, and what is none is an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::transport::TrustStore;
use migrate_fuzz::write_seeds;
use std::path::PathBuf;

fuzz_target!(
    init: {
        let digits = "0".repeat(64);
        write_seeds([
            format!(r#"{{"peers":[{{"name":"a","fingerprint":"sha256:{digits}"}}]}}"#).into_bytes(),
            br#"{"peers":[]}"#.to_vec(),
        ]);
    },
    |input: &[u8]| {
        let dir = PathBuf::from(format!("/dev/shm/migrate-fuzz-trust-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        std::fs::write(dir.join("trusted-peers.json"), input).expect("written");
        let store = TrustStore::in_dir(&dir);
        if let Ok(trusted) = store.load() {
            for peer in trusted.peers() {
                let name = peer.name.to_string();
                assert!(name.parse::<migrate::transport::PeerName>().is_ok(), "{name:?}");
                assert!(trusted.name_of(peer.fingerprint).is_some());
            }
            assert_eq!(*store.current().expect("as before"), trusted);
        }
    }
);

//! CRIU's side of the lazy-pages socket: whatever bytes come, in whatever pieces, there is an end to it, and no descriptor is taken
//! from what has none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::criu::lazy_pages::{LazyPagesConnection, LazyPagesMessage};
use migrate_fuzz::write_seeds;
use std::io::Write;
use std::os::unix::net::UnixStream;

/// More than this waits in no socket.
const LARGEST: usize = 64 << 10;

fuzz_target!(
    init: {
        let seed = |numbers: &[i32]| numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        write_seeds([seed(&[7]), seed(&[-7, -8]), seed(&[0]), seed(&[i32::MIN]), vec![1, 0, 0]]);
    },
    |input: &[u8]| {
        let (mut criu, ours) = UnixStream::pair().expect("a pair");
        let mut connection = LazyPagesConnection::from_stream(ours).expect("a connection");
        let input = &input[..input.len().min(LARGEST)];
        let (first, rest) = input.split_at(input.len() / 2);
        let mut messages = 0;
        for (part, is_last) in [(first, false), (rest, true)] {
            criu.write_all(part).expect("written");
            if is_last {
                criu.shutdown(std::net::Shutdown::Write).expect("shut");
            }
            loop {
                match connection.receive() {
                    Ok(Some(LazyPagesMessage::Task { .. })) => panic!("a descriptor from nowhere"),
                    Ok(Some(LazyPagesMessage::Closed)) | Err(_) => return,
                    Ok(Some(LazyPagesMessage::Zombie { vpid })) => assert!(vpid > 0),
                    Ok(Some(LazyPagesMessage::RestoreFinished)) => {}
                    Ok(None) => break,
                }
                messages += 1;
                assert!(messages <= input.len() / 4, "a message takes four bytes");
            }
            assert!(!is_last, "the end is heard");
        }
    }
);

//! Frame buffers that are used again.

use super::bytes_of;
use crate::wire::page_frame::MAX_PAGES;
use std::sync::{Arc, Mutex, PoisonError};

/// A worker's frame buffers, used again when the network is done with them.
///
/// A new one for every frame would be a fresh mapping each time, and the kernel would zero a MiB for nothing.
#[derive(Default)]
pub(super) struct Buffers {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// One frame's worth of bytes, on loan. What is in it is whatever was read last.
pub(super) struct Buffer {
    pub bytes: Vec<u8>,
    home: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffers {
    pub fn take(&self) -> Buffer {
        let used = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        Buffer {
            bytes: used.unwrap_or_else(|| vec![0; bytes_of(MAX_PAGES)]),
            home: Arc::clone(&self.free),
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.home
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(bytes);
    }
}

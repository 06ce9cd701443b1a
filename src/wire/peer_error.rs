//! What can go wrong between two hosts, as short numbers.
//!
//! Only the number crosses the wire; each side has its own line of text for it. A number this build does not know is
//! kept and printed as a number, so a newer peer's refusal is still told.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! peer_errors {
    ($($number:literal $name:ident $text:literal)*) => {
        /// A failure or refusal told by one host to the other.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
        #[serde(from = "u16", into = "u16")]
        pub enum PeerError {
            $(#[doc = concat!($number, ": ", $text)] $name,)*
            /// A number of a newer peer that this build has no name for.
            Unlisted(u16),
        }

        impl From<u16> for PeerError {
            fn from(number: u16) -> PeerError {
                match number {
                    $($number => PeerError::$name,)*
                    unlisted => PeerError::Unlisted(unlisted),
                }
            }
        }

        impl From<PeerError> for u16 {
            fn from(error: PeerError) -> u16 {
                match error {
                    $(PeerError::$name => $number,)*
                    PeerError::Unlisted(number) => number,
                }
            }
        }

        impl fmt::Display for PeerError {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(PeerError::$name => f.write_str($text),)*
                    PeerError::Unlisted(number) => write!(f, "the peer's error number {number}"),
                }
            }
        }

        /// Every number with a name, for tests and documentation.
        pub const LISTED: &[PeerError] = &[$(PeerError::$name),*];
    };
}

peer_errors! {
    // 0: not an error, the way a connection is closed when all is said.
    0 Done "all is done"
    // 1–99: the conversation itself.
    1 Malformed "what was sent could not be read"
    2 Unexpected "a message came that does not fit the state of the migration"
    3 NoCommonVersion "there is no protocol version that both hosts speak"
    4 Corrupt "content arrived that does not match its hash"
    5 TimedOut "the peer waited too long"
    6 Cancelled "the peer does not want the rest"
    7 Internal "the peer met a failure of its own; its log says which"
    // 100–199: refusals, before anything is frozen.
    100 Draining "the target is shutting down and takes no new migrations"
    101 Busy "this container is already being migrated"
    102 ContainerExists "a container of this name exists at the target"
    103 MemoryShort "the target has not enough free memory"
    104 DiskShort "the target has not enough free disk space"
    105 ArchitectureDiffers "the target's processor architecture is another"
    106 CpuFeatureMissing "the target's processor lacks features the container may use"
    107 CgroupIncompatible "the container's cgroups cannot be restored on the target's cgroup version"
    108 MemoryLimitTooSmall "the target's memory limit is below what the container uses"
    109 CriuMissing "CRIU does not work at the target"
    110 CriuTooOld "the target's CRIU is too old for this container or kernel"
    111 RuntimeMissing "the container runtime does not work at the target"
    112 RootfsNotShared "the root filesystem is said to be shared but is not there at the target"
    113 BindSourceMissing "a bind mount's source is missing at the target"
    114 KernelFeatureMissing "the target's kernel lacks a feature the restore needs"
    115 UnknownMigration "the target knows no such migration"
    // 200–299: failures that roll a migration back.
    200 ReceiveFailed "the target could not take in the pages"
    201 PagesMissing "pages that the container has were never received"
    202 ImagesUnusable "the process images could not be read or composed"
    203 FilesFailed "the target could not take in the files"
    204 RestoreFailed "the target could not restore the processes"
    205 FillFailed "the target could not fill the memory of the restored processes"
    206 SourceAborted "the source gave up"
    207 SourceLost "the source was lost before it committed"
    208 StorageFull "the target ran out of memory or disk"
    209 DumpFailed "the source could not dump the processes"
}

impl std::error::Error for PeerError {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_listed_error_keeps_its_number_and_has_its_own_line() {
        let mut numbers = HashSet::new();
        let mut lines = HashSet::new();
        for &error in LISTED {
            let number = u16::from(error);
            assert_eq!(PeerError::from(number), error);
            assert!(numbers.insert(number), "{number} is used twice");
            assert!(lines.insert(error.to_string()), "{error} is said twice");
        }
    }

    #[test]
    fn an_unlisted_number_is_kept() {
        let error: PeerError = serde_json::from_str("999").expect("a number");
        assert_eq!(error, PeerError::Unlisted(999));
        assert_eq!(serde_json::to_string(&error).expect("serializes"), "999");
    }

    #[test]
    fn numbers_are_pinned() {
        assert_eq!(u16::from(PeerError::Malformed), 1);
        assert_eq!(u16::from(PeerError::Draining), 100);
        assert_eq!(u16::from(PeerError::ReceiveFailed), 200);
    }
}

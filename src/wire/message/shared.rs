//! What both hosts are said to see, and how the target finds out whether that is so.

use crate::wire::path::AbsolutePath;
use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// Files that prove a shared place are called this and a [`Secret`].
pub const PROOF_PREFIX: &str = ".migrate-shared-";

/// A directory or a file that the container mounts, or its root filesystem, said to be the same at both hosts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shared {
    /// Where it is, as the container's config names it.
    pub path: AbsolutePath,
    /// The same without symbolic links: it must be so at the target as well.
    pub real: AbsolutePath,
    /// What shows that it is the same.
    pub proof: Proof,
}

/// What the source did or found, for the target to find.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Proof {
    /// A file was written, called [`PROOF_PREFIX`] and `name`, that holds `content`: into the directory, or beside the file
    /// on the same filesystem.
    Written {
        /// The end of its name.
        name: Secret,
        /// What it holds, as text.
        content: Secret,
    },
    /// A regular file that the container can only read: equal content is as good.
    Content {
        /// Its SHA-256.
        sha256: Digest,
    },
}

macro_rules! hex {
    ($(#[$doc:meta])* $name:ident $digits:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// It as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// It from its bytes.
            pub fn from_bytes(bytes: [u8; $digits / 2]) -> $name {
                $name(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
            }
        }

        impl TryFrom<String> for $name {
            type Error = NotHex;

            fn try_from(text: String) -> Result<$name, NotHex> {
                let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                if text.len() == $digits && text.bytes().all(digit) {
                    Ok($name(text))
                } else {
                    Err(NotHex($digits))
                }
            }
        }

        impl From<$name> for String {
            fn from(hex: $name) -> String {
                hex.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

hex! {
    /// 16 random bytes in lower-case hexadecimal.
    Secret 32
}

hex! {
    /// A SHA-256 in lower-case hexadecimal.
    Digest 64
}

/// A text that is not the hexadecimal number it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("{0} lower-case hexadecimal digits")]
pub struct NotHex(usize);

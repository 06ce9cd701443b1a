//! Paths a peer may name: relative ones that stay where they are put, and absolute ones that are only looked at.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use thiserror::Error;

/// The longest path, in bytes (Linux `PATH_MAX` without its NUL).
pub const MAX_PATH: usize = 4095;

/// The longest component, in bytes (Linux `NAME_MAX`).
pub const MAX_COMPONENT: usize = 255;

/// A relative path that cannot leave the directory it is joined to, as far as text goes.
///
/// One or more components divided by single slashes; none is empty, `.` or `..`. Whoever opens it must still not
/// follow symbolic links.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelativePath(String);

/// An absolute path without `.`, `..` or empty components. It names something to look for, never to write to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AbsolutePath(String);

/// Why a text is not a path that a peer may name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PathError {
    /// Empty or longer than [`MAX_PATH`].
    #[error("a path has between 1 and {MAX_PATH} bytes")]
    Length,
    /// A path that should be relative begins with a slash, or the reverse.
    #[error("an absolute path stands where a relative one belongs, or the reverse")]
    Root,
    /// An empty, `.` or `..` component, or one longer than [`MAX_COMPONENT`].
    #[error("a path has an empty, dot or overlong component")]
    Component,
    /// A NUL byte.
    #[error("a path has a NUL byte")]
    Nul,
}

impl RelativePath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the path is a single name without directories.
    pub fn is_single(&self) -> bool {
        !self.0.contains('/')
    }
}

impl AbsolutePath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check_components(path: &str) -> Result<(), PathError> {
    if path.is_empty() || path.len() > MAX_PATH {
        return Err(PathError::Length);
    }
    if path.contains('\0') {
        return Err(PathError::Nul);
    }
    let good = |c: &str| !c.is_empty() && c != "." && c != ".." && c.len() <= MAX_COMPONENT;
    if path.split('/').all(good) {
        Ok(())
    } else {
        Err(PathError::Component)
    }
}

impl TryFrom<String> for RelativePath {
    type Error = PathError;

    fn try_from(path: String) -> Result<RelativePath, PathError> {
        if path.starts_with('/') {
            return Err(PathError::Root);
        }
        check_components(&path)?;
        Ok(RelativePath(path))
    }
}

impl TryFrom<String> for AbsolutePath {
    type Error = PathError;

    fn try_from(path: String) -> Result<AbsolutePath, PathError> {
        let Some(below_root) = path.strip_prefix('/') else {
            return Err(PathError::Root);
        };
        if path.len() > MAX_PATH {
            return Err(PathError::Length);
        }
        if !below_root.is_empty() {
            check_components(below_root)?;
        }
        Ok(AbsolutePath(path))
    }
}

macro_rules! as_path {
    ($path:ident) => {
        impl FromStr for $path {
            type Err = PathError;

            fn from_str(path: &str) -> Result<$path, PathError> {
                $path::try_from(path.to_owned())
            }
        }

        impl From<$path> for String {
            fn from(path: $path) -> String {
                path.0
            }
        }

        impl AsRef<Path> for $path {
            fn as_ref(&self) -> &Path {
                Path::new(&self.0)
            }
        }

        impl fmt::Debug for $path {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }

        impl fmt::Display for $path {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

as_path!(RelativePath);
as_path!(AbsolutePath);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_cannot_leave_its_directory() {
        for bad in [
            "", "/", "/a", "..", "a/..", "../a", "a/../b", ".", "a/.", "a//b", "a/", "a\0",
        ] {
            assert!(bad.parse::<RelativePath>().is_err(), "{bad:?} was accepted");
        }
        assert!("a".repeat(256).parse::<RelativePath>().is_err());
        let deep = vec!["a"; 2049].join("/");
        assert_eq!(deep.parse::<RelativePath>(), Err(PathError::Length));
        for good in ["a", "a/b", "...", "a..b/.c", "core-1.img", &"a".repeat(255)] {
            assert!(good.parse::<RelativePath>().is_ok(), "{good:?} was refused");
        }
    }

    #[test]
    fn an_absolute_path_has_no_dot_components() {
        for bad in ["", "a", "//", "/a/../b", "/.", "/a/", "/a\0"] {
            assert!(bad.parse::<AbsolutePath>().is_err(), "{bad:?} was accepted");
        }
        for good in ["/", "/a", "/var/lib/x.y"] {
            assert!(good.parse::<AbsolutePath>().is_ok(), "{good:?} was refused");
        }
    }
}

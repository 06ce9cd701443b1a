//! One entry of the tree on the wire: its path, its kind and its metadata.
//!
//! ```text
//! entry  | kind u8 | placement u8 | mode u16 | uid u32 | gid u32 | mtime s i64 | mtime ns u32 |
//!        | size u64 | device major u32 | device minor u32 | xattrs u16 |
//!        | path length u16 | path | symlink length u16 | symlink target |
//!        xattrs × | name length u16 | name | value length u32 | value |
//! ```

use super::FrameError;
use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest relative path, in bytes: `PATH_MAX` without its NUL.
pub const MAX_PATH: usize = 4095;
/// Longest name of one component, in bytes: `NAME_MAX`.
pub const MAX_NAME: usize = 255;

/// `XATTR_SIZE_MAX` and `XATTR_NAME_MAX` of linux/limits.h.
const MAX_XATTR_VALUE: usize = 65536;
const MAX_XATTR_NAME: usize = 255;

/// A path inside the tree, relative to its root: components of 1 to 255 bytes joined by single slashes,
/// none of them `.` or `..`. The root itself is the empty path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreePath(Arc<[u8]>);

impl TreePath {
    /// The root of the tree.
    pub fn root() -> TreePath {
        TreePath(Arc::from(&b""[..]))
    }

    /// Takes a non-empty relative path, refusing everything that could lead out of the tree.
    pub fn parse(bytes: &[u8]) -> Result<TreePath, FrameError> {
        let refuse = |why| {
            let shown = &bytes[..bytes.len().min(256)];
            Err(FrameError::Path {
                path: String::from_utf8_lossy(shown).into_owned(),
                why,
            })
        };
        if bytes.is_empty() {
            return refuse("it is empty");
        }
        if bytes.len() > MAX_PATH {
            return refuse("it is longer than 4095 bytes");
        }
        if bytes[0] == b'/' {
            return refuse("it is absolute");
        }
        for component in bytes.split(|b| *b == b'/') {
            match component {
                b"" => return refuse("it has an empty component"),
                b"." | b".." => return refuse("it has a dot component"),
                _ if component.len() > MAX_NAME => {
                    return refuse("a component is longer than 255 bytes");
                }
                _ if component.contains(&0) => return refuse("it holds a NUL"),
                _ => {}
            }
        }
        Ok(TreePath(Arc::from(bytes)))
    }

    /// The bytes of the path, without a leading slash; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root of the tree.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The parent directory (empty for the root) and the name in it; `None` for the root itself.
    pub fn split(&self) -> Option<(&[u8], &[u8])> {
        if self.is_root() {
            return None;
        }
        match self.0.iter().rposition(|b| *b == b'/') {
            Some(slash) => Some((&self.0[..slash], &self.0[slash + 1..])),
            None => Some((&b""[..], &self.0[..])),
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.0.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.0);
    }

    pub(super) fn decode(body: &mut Cursor<'_>) -> Result<TreePath, FrameError> {
        match body.counted()? {
            b"" => Ok(TreePath::root()),
            path => TreePath::parse(path),
        }
    }
}

impl Borrow<[u8]> for TreePath {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            f.write_str("the root")
        } else {
            fmt::Debug::fmt(self, f)
        }
    }
}

/// A time as the filesystem keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since 1970, possibly negative.
    pub seconds: i64,
    /// 0 to 999 999 999.
    pub nanoseconds: u32,
}

impl Timestamp {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.seconds.to_le_bytes());
        out.extend_from_slice(&self.nanoseconds.to_le_bytes());
    }

    pub(super) fn decode(body: &mut Cursor<'_>) -> Result<Timestamp, FrameError> {
        let (seconds, nanoseconds): (I64, U32) = (body.fixed()?, body.fixed()?);
        Timestamp::checked(seconds.get(), nanoseconds.get()).ok_or(body.bad("mtime"))
    }

    fn checked(seconds: i64, nanoseconds: u32) -> Option<Timestamp> {
        (nanoseconds < 1_000_000_000).then_some(Timestamp {
            seconds,
            nanoseconds,
        })
    }
}

/// Who owns an entry. Neither number is `u32::MAX`, which `chown(2)` takes for "leave as it is".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id as the host sees it.
    pub uid: u32,
    /// Group id as the host sees it.
    pub gid: u32,
}

/// Whether the content of a regular file starts from nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// A new inode replaces whatever is at the path.
    New,
    /// The regular file at the path is changed in place, for all its names.
    Update,
}

/// What an entry is, with what only that kind has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file of `size` bytes, all holes until its content is sent.
    Regular {
        /// Bytes, holes included; at most `i64::MAX`.
        size: u64,
        /// New inode, or change in place.
        placement: Placement,
    },
    /// A directory.
    Directory,
    /// A symbolic link with its target, 1 to 4095 bytes without NUL.
    Symlink(Vec<u8>),
    /// A named pipe.
    Fifo,
    /// The inode of a bound unix socket.
    Socket,
    /// A character device.
    CharDevice {
        /// Device number, upper part.
        major: u32,
        /// Device number, lower part.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Device number, upper part.
        major: u32,
        /// Device number, lower part.
        minor: u32,
    },
}

/// One extended attribute. Only names in `user.`, `trusted.`, `security.` and the two POSIX ACL
/// attributes travel; the rest of `system.` belongs to the filesystem that shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its namespace, 1 to 255 bytes without NUL.
    pub name: Vec<u8>,
    /// At most 64 KiB.
    pub value: Vec<u8>,
}

impl Xattr {
    /// Whether an attribute of this name is part of the tree.
    pub fn travels(name: &[u8]) -> bool {
        const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
        const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
        ACLS.contains(&name)
            || NAMESPACES
                .iter()
                .any(|namespace| name.starts_with(namespace) && name.len() > namespace.len())
    }
}

/// One entry of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is. Only a directory may be the root.
    pub path: TreePath,
    /// What it is.
    pub kind: Kind,
    /// The lower twelve mode bits: permissions, sticky, setgid, setuid.
    pub mode: u16,
    /// Who owns it.
    pub owner: Owner,
    /// When its content last changed. A directory's is set by `DirTime`, after its last child.
    pub mtime: Timestamp,
    /// All its extended attributes that travel.
    pub xattrs: Vec<Xattr>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EntryBody {
    kind: u8,
    placement: u8,
    mode: U16,
    uid: U32,
    gid: U32,
    mtime_seconds: I64,
    mtime_nanoseconds: U32,
    size: U64,
    major: U32,
    minor: U32,
    xattrs: U16,
}

impl Entry {
    /// Bytes this entry takes as a payload; a sender keeps it within `MAX_ENTRY`.
    pub fn encoded_len(&self) -> usize {
        let symlink = if let Kind::Symlink(target) = &self.kind {
            target.len()
        } else {
            0
        };
        let xattrs: usize = self
            .xattrs
            .iter()
            .map(|x| 6 + x.name.len() + x.value.len())
            .sum();
        size_of::<EntryBody>() + 4 + self.path.as_bytes().len() + symlink + xattrs
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let (kind, placement, size, major, minor) = match &self.kind {
            Kind::Regular {
                size,
                placement: Placement::New,
            } => (1, 0, *size, 0, 0),
            Kind::Regular {
                size,
                placement: Placement::Update,
            } => (1, 1, *size, 0, 0),
            Kind::Directory => (2, 0, 0, 0, 0),
            Kind::Symlink(_) => (3, 0, 0, 0, 0),
            Kind::Fifo => (4, 0, 0, 0, 0),
            Kind::Socket => (5, 0, 0, 0, 0),
            Kind::CharDevice { major, minor } => (6, 0, 0, *major, *minor),
            Kind::BlockDevice { major, minor } => (7, 0, 0, *major, *minor),
        };
        let body = EntryBody {
            kind,
            placement,
            mode: self.mode.into(),
            uid: self.owner.uid.into(),
            gid: self.owner.gid.into(),
            mtime_seconds: self.mtime.seconds.into(),
            mtime_nanoseconds: self.mtime.nanoseconds.into(),
            size: size.into(),
            major: major.into(),
            minor: minor.into(),
            xattrs: (self.xattrs.len() as u16).into(),
        };
        out.extend_from_slice(body.as_bytes());
        self.path.encode(out);
        let target: &[u8] = if let Kind::Symlink(target) = &self.kind {
            target
        } else {
            b""
        };
        out.extend_from_slice(&(target.len() as u16).to_le_bytes());
        out.extend_from_slice(target);
        for xattr in &self.xattrs {
            out.extend_from_slice(&(xattr.name.len() as u16).to_le_bytes());
            out.extend_from_slice(&xattr.name);
            out.extend_from_slice(&(xattr.value.len() as u32).to_le_bytes());
            out.extend_from_slice(&xattr.value);
        }
    }

    pub(super) fn decode(body: &mut Cursor<'_>) -> Result<Entry, FrameError> {
        let fixed: EntryBody = body.fixed()?;
        let path = TreePath::decode(body)?;
        let target = body.counted()?;
        if (fixed.kind == 3) == target.is_empty() || target.len() > MAX_PATH || target.contains(&0)
        {
            return Err(body.bad("symlink target"));
        }
        let (major, minor) = (fixed.major.get(), fixed.minor.get());
        let kind = match fixed.kind {
            1 => {
                let placement = match fixed.placement {
                    0 => Placement::New,
                    1 => Placement::Update,
                    _ => return Err(body.bad("placement")),
                };
                if i64::try_from(fixed.size.get()).is_err() {
                    return Err(body.bad("size"));
                }
                Kind::Regular {
                    size: fixed.size.get(),
                    placement,
                }
            }
            2 => Kind::Directory,
            3 => Kind::Symlink(target.to_vec()),
            4 => Kind::Fifo,
            5 => Kind::Socket,
            6 => Kind::CharDevice { major, minor },
            7 => Kind::BlockDevice { major, minor },
            _ => return Err(body.bad("kind")),
        };
        if path.is_root() && kind != Kind::Directory {
            return Err(body.bad("path"));
        }
        if fixed.mode.get() & !0o7777 != 0 {
            return Err(body.bad("mode"));
        }
        let owner = Owner {
            uid: fixed.uid.get(),
            gid: fixed.gid.get(),
        };
        if owner.uid == u32::MAX || owner.gid == u32::MAX {
            return Err(body.bad("owner"));
        }
        let mtime = Timestamp::checked(fixed.mtime_seconds.get(), fixed.mtime_nanoseconds.get())
            .ok_or(body.bad("mtime"))?;
        let mut xattrs = Vec::new();
        for _ in 0..fixed.xattrs.get() {
            let name = body.counted()?.to_vec();
            let len: U32 = body.fixed()?;
            let len = len.get() as usize;
            if name.len() > MAX_XATTR_NAME || name.contains(&0) || !Xattr::travels(&name) {
                return Err(body.bad("xattr name"));
            }
            if len > MAX_XATTR_VALUE {
                return Err(body.bad("xattr value"));
            }
            xattrs.push(Xattr {
                name,
                value: body.take(len)?.to_vec(),
            });
        }
        Ok(Entry {
            path,
            kind,
            mode: fixed.mode.get(),
            owner,
            mtime,
            xattrs,
        })
    }
}

/// Takes fields off the front of a payload; every length is checked before it is used.
pub(super) struct Cursor<'a> {
    frame: &'static str,
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn new(frame: &'static str, bytes: &'a [u8]) -> Self {
        Cursor { frame, bytes }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], FrameError> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(len)
            .ok_or(FrameError::Short(self.frame))?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    pub(super) fn fixed<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &mut self,
    ) -> Result<T, FrameError> {
        let (value, rest) =
            T::read_from_prefix(self.bytes).map_err(|_| FrameError::Short(self.frame))?;
        self.bytes = rest;
        Ok(value)
    }

    /// Bytes preceded by their length in a u16.
    pub(super) fn counted(&mut self) -> Result<&'a [u8], FrameError> {
        let len: U16 = self.fixed()?;
        self.take(usize::from(len.get()))
    }

    pub(super) fn flag(&self, value: u16, field: &'static str) -> Result<bool, FrameError> {
        match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad(field)),
        }
    }

    pub(super) fn bad(&self, field: &'static str) -> FrameError {
        FrameError::Field {
            frame: self.frame,
            field,
        }
    }

    pub(super) fn finish(self) -> Result<(), FrameError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(FrameError::LeftOver(self.frame))
        }
    }
}

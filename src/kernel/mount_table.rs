//! The mounts that a process sees: `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Names it in this boot, as `statx` does.
    pub id: u64,
    /// The filesystem's own device number, which `stat` does not give on btrfs.
    pub device: (u32, u32),
    /// The directory or file of the filesystem that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub at: PathBuf,
    /// Nothing can be written through it.
    pub read_only: bool,
    /// The filesystem's type.
    pub kind: String,
    /// The filesystem's options.
    pub options: Vec<u8>,
}

impl Mount {
    /// The mounts that `process` sees, a name of `/proc`, in the order of the kernel.
    pub fn list(process: &str) -> io::Result<Vec<Mount>> {
        let table = fs::read(format!("/proc/{process}/mountinfo"))?;
        let lines = table.split(|byte| *byte == b'\n');
        let lines = lines.filter(|line| !line.is_empty());
        lines
            .map(|line| {
                Mount::parse(line).ok_or_else(|| {
                    let line = String::from_utf8_lossy(line).into_owned();
                    io::Error::new(io::ErrorKind::InvalidData, format!("no mount: {line:?}"))
                })
            })
            .collect()
    }

    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    fn parse(line: &[u8]) -> Option<Mount> {
        let mut fields = line.split(|byte| *byte == b' ');
        let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
        let id = text(fields.next()?)?.parse().ok()?;
        let _parent = fields.next()?;
        let device = text(fields.next()?)?;
        let (major, minor) = device.split_once(':')?;
        let root = unescaped(fields.next()?);
        let at = unescaped(fields.next()?);
        let own = fields.next()?;
        fields.find(|field| *field == b"-")?;
        let kind = text(fields.next()?)?;
        let _source = fields.next()?;
        Some(Mount {
            id,
            device: (major.parse().ok()?, minor.parse().ok()?),
            root,
            at,
            read_only: own
                .split(|byte| *byte == b',')
                .any(|option| option == b"ro"),
            kind,
            options: fields.next().unwrap_or_default().to_vec(),
        })
    }

    /// What the filesystem calls `path`, which lies on this mount.
    pub fn inside(&self, path: &Path) -> Option<PathBuf> {
        let below = path.strip_prefix(&self.at).ok()?;
        Some(if below.as_os_str().is_empty() {
            self.root.clone()
        } else {
            self.root.join(below)
        })
    }
}

/// The kernel writes spaces, tabs, newlines and backslashes of a path as three octal digits.
pub fn unescaped(text: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = (*first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_with_its_optional_fields_and_odd_names() {
        let line = br"36 35 98:0 /a\040b /c\134d ro,noatime master:1 shared:2 - ext4 /dev/x rw,upperdir=/u\040v";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.id, mount.device), (36, (98, 0)));
        assert_eq!(mount.root, Path::new("/a b"));
        assert_eq!(mount.at, Path::new(r"/c\d"));
        assert!(mount.read_only);
        assert_eq!(mount.kind, "ext4");
        assert_eq!(mount.inside(Path::new(r"/c\d/e")), Some("/a b/e".into()));
        assert_eq!(mount.inside(Path::new(r"/c\d")), Some("/a b".into()));
        assert_eq!(mount.inside(Path::new("/c")), None);
        assert_eq!(Mount::parse(b"36 35 98:0 /a /b rw"), None);
    }

    #[test]
    fn this_process_sees_a_root() {
        let mounts = Mount::list("thread-self").unwrap();
        assert!(mounts.iter().any(|mount| mount.at == Path::new("/")));
    }
}

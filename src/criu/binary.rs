//! Which CRIU runs here.
//!
//! Candidates in order: `$MIGRATE_CRIU`, `criu` on the `PATH`, the private prefix that `scripts/setup` fills. The first
//! one that is new enough and whose `criu check` passes is taken, so an old system CRIU does not hide a good private one.

use std::path::{Path, PathBuf};
use std::process::Command;
use thiserror::Error;

/// Where `scripts/setup` puts CRIU when the system's own does not do.
pub const PRIVATE_PREFIX: &str = "/opt/migrate/criu";

/// The oldest CRIU the engine works with, as CRIU's own number (major × 10000 + minor × 100 + sublevel).
///
/// Older ones fail on kernels from 6.13 on ("Unexpected rt vDSO area bounds").
pub const OLDEST: u32 = 40100;

/// A CRIU that runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Criu {
    path: PathBuf,
    version: u32,
}

/// Why no CRIU could be found.
#[derive(Debug, Error)]
#[error("no usable CRIU: {}; run scripts/setup, or name one in MIGRATE_CRIU", .tried.join("; "))]
pub struct NoCriu {
    tried: Vec<String>,
}

impl Criu {
    /// Finds the CRIU to use on this host.
    pub fn find() -> Result<Criu, NoCriu> {
        let mut tried = Vec::new();
        for path in candidates() {
            match Criu::at(&path) {
                Ok(criu) => return Ok(criu),
                Err(why) => tried.push(format!("{} {why}", path.display())),
            }
        }
        if tried.is_empty() {
            tried.push("none is installed".into());
        }
        Err(NoCriu { tried })
    }

    /// The executable.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version as CRIU's own number, e.g. 40201.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The version as people write it, e.g. `4.2.1`.
    pub fn version_text(&self) -> String {
        version_text(self.version)
    }

    /// A `PATH` in which this CRIU comes first, for runtimes that look it up there.
    pub fn search_path(&self) -> std::ffi::OsString {
        let inherited =
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        let mut directories = vec![self.path.parent().unwrap_or(Path::new("/")).to_path_buf()];
        directories.extend(std::env::split_paths(&inherited));
        std::env::join_paths(directories).unwrap_or(inherited)
    }

    /// Whether it can restore through userfaultfd on this kernel, all events handled.
    pub fn restores_lazily(&self) -> bool {
        let check = Command::new(&self.path)
            .args(["check", "--feature", "uffd-noncoop"])
            .output();
        check.is_ok_and(|check| check.status.success())
    }

    fn at(path: &Path) -> Result<Criu, String> {
        let name = path.to_str().ok_or("has a name that is not UTF-8")?;
        let version = rust_criu::Criu::new_with_criu_path(name.to_string())
            .and_then(|mut criu| criu.get_criu_version())
            .map_err(|error| format!("does not answer: {error}"))?;
        if version < OLDEST {
            return Err(format!(
                "is {}, older than {}",
                version_text(version),
                version_text(OLDEST)
            ));
        }
        let check = Command::new(path)
            .arg("check")
            .output()
            .map_err(|error| format!("cannot be run: {error}"))?;
        if !check.status.success() {
            let text = String::from_utf8_lossy(&check.stderr);
            let last = text.lines().rfind(|line| !line.trim().is_empty());
            return Err(format!(
                "fails its own check: {}",
                last.unwrap_or("no reason given")
            ));
        }
        Ok(Criu {
            path: path.to_path_buf(),
            version,
        })
    }
}

fn candidates() -> Vec<PathBuf> {
    let on_path = std::env::var_os("PATH")
        .map(|path| {
            std::env::split_paths(&path)
                .map(|directory| directory.join("criu"))
                .collect::<Vec<_>>()
        })
        .unwrap_or_default();
    let mut found: Vec<PathBuf> = Vec::new();
    for path in std::env::var_os("MIGRATE_CRIU")
        .map(PathBuf::from)
        .into_iter()
        .chain(on_path)
        .chain([Path::new(PRIVATE_PREFIX).join("bin/criu")])
    {
        if path.is_file() && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

fn version_text(version: u32) -> String {
    format!(
        "{}.{}.{}",
        version / 10000,
        version / 100 % 100,
        version % 100
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_number_reads_as_people_write_it() {
        assert_eq!(version_text(40201), "4.2.1");
        assert_eq!(version_text(31701), "3.17.1");
    }
}

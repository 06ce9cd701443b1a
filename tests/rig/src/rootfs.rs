//! A container's root filesystem, made from this machine's own programs: no image, no registry.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Directories every root has; `/log` is where workloads write what they have to say.
const DIRECTORIES: [&str; 9] = [
    "bin", "dev", "etc", "log", "proc", "run", "sys", "tmp", "var",
];

/// Builds a root filesystem in a directory.
pub struct Rootfs {
    dir: PathBuf,
}

impl Rootfs {
    /// Starts a root filesystem with nothing but directories and a root user in it.
    pub fn create(dir: impl Into<PathBuf>) -> Result<Rootfs> {
        let dir = dir.into();
        for name in DIRECTORIES {
            let path = dir.join(name);
            fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        }
        fs::set_permissions(dir.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        let rootfs = Rootfs { dir };
        rootfs.file(
            "/etc/passwd",
            "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        )?;
        rootfs.file("/etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
        rootfs.file("/etc/hosts", "127.0.0.1 localhost\n")?;
        Ok(rootfs)
    }

    /// Copies a program to `inside`, and every shared library it needs to the place where its loader looks for it.
    pub fn program(&self, program: &Path, inside: &str) -> Result<&Rootfs> {
        self.copy(program, inside)?;
        for library in shared_libraries(program)? {
            self.copy(&library, &library.to_string_lossy())?;
        }
        Ok(self)
    }

    /// Writes a file.
    pub fn file(&self, inside: &str, content: &str) -> Result<&Rootfs> {
        let path = self.at(inside)?;
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(self)
    }

    fn copy(&self, from: &Path, inside: &str) -> Result<()> {
        let to = self.at(inside)?;
        fs::copy(from, &to)
            .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
        Ok(())
    }

    /// Where a path of the container is seen from here, its directory made.
    fn at(&self, inside: &str) -> Result<PathBuf> {
        let path = self.dir.join(inside.trim_start_matches('/'));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        Ok(path)
    }
}

/// The shared libraries and the loader of a program, by the paths the loader would use. None for a static program.
fn shared_libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("running ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    if complained.contains("not a dynamic executable") || said.contains("statically linked") {
        return Ok(BTreeSet::new());
    }
    ensure!(
        output.status.success(),
        "ldd {}: {}",
        program.display(),
        complained.trim()
    );
    ensure!(
        !said.contains("not found"),
        "{} lacks a library:\n{said}",
        program.display()
    );
    Ok(said
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

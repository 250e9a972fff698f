//! Where things are: the cache, the scratch folder, the source tree, the programs under test.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::clean::{self, Guard};

/// The source tree this harness was built from; `PRESTAGE_SOURCE` names another one.
#[must_use]
pub fn source() -> PathBuf {
    match std::env::var_os("PRESTAGE_SOURCE") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
    }
}

/// What is kept between runs: `PRESTAGE_CACHE`, else `~/.cache/prestage`. Created if missing.
pub fn cache() -> Result<PathBuf> {
    let path = match std::env::var_os("PRESTAGE_CACHE") {
        Some(path) => PathBuf::from(path),
        None => {
            let home = std::env::var_os("HOME").context("neither PRESTAGE_CACHE nor HOME is set")?;
            PathBuf::from(home).join(".cache/prestage")
        }
    };
    std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))
}

/// A program under test: in `PRESTAGE_BIN_DIR`, else beside or one above the running program (`target/release`,
/// `target/debug/deps`), else in the source tree's `target/release` and `target/debug`.
pub fn program(name: &str) -> Result<PathBuf> {
    let mut folders = Vec::new();
    if let Some(folder) = std::env::var_os("PRESTAGE_BIN_DIR") {
        folders.push(PathBuf::from(folder));
    } else {
        let own = std::env::current_exe().context("cannot find the running program")?;
        folders.extend(own.ancestors().skip(1).take(2).map(Path::to_path_buf));
        folders.extend(["release", "debug"].map(|profile| source().join("target").join(profile)));
    }
    match folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!(
            "{name} is not in {}; build it (cargo build --bins) or set PRESTAGE_BIN_DIR",
            folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// A folder of its own, removed with everything in it unless `PRESTAGE_KEEP` is set.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _guard: Guard,
}

impl Scratch {
    /// For sockets and logs.
    pub fn new() -> Result<Self> {
        Self::below(&std::env::temp_dir())
    }

    /// For disks and databases: below the cache, which unlike `TMPDIR` is hardly ever a RAM disk.
    pub fn large() -> Result<Self> {
        Self::below(&cache()?)
    }

    fn below(parent: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("prestage-")
            .rand_bytes(6)
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a folder in {}", parent.display()))?;
        let path = folder.keep();
        let removed = path.clone();
        let guard = clean::on_exit(move || {
            if std::env::var_os("PRESTAGE_KEEP").is_none() {
                let _ = std::fs::remove_dir_all(&removed);
            }
        });
        // QEMU may run as another user
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self { path, _guard: guard })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the folder.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

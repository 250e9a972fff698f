//! Secrets that sign webhooks. They show themselves in no log and no message.

use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// What a secret begins with, as in Standard Webhooks.
const PREFIX: &str = "whsec_";
/// Bytes of a secret: what the specification asks for, and more than which no hash key gains from.
const BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// Secrets of one endpoint: the one in use, its successor, and some to spare.
const SECRETS_MAX: usize = 8;
/// A file of secrets is at most this long.
const FILE_MAX: u64 = 4096;

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("secret file {path} cannot be read: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("secret file {path} may be read by everyone; `chmod 600 {path}`", path = path.display())]
    Open { path: PathBuf },
    #[error(
        "secret file {path} has {count} secrets; it holds 1 to {SECRETS_MAX}, one a line, the newest first",
        path = path.display()
    )]
    Count { path: PathBuf, count: usize },
    /// The text itself is not shown.
    #[error(
        "line {line} of secret file {path} is no secret ({why}); make one with `echo whsec_$(head -c 32 /dev/urandom | base64)`",
        path = path.display()
    )]
    Malformed { path: PathBuf, line: usize, why: &'static str },
    #[error(
        "`{name}` is the name of a systemd credential, but there are none here; set `LoadCredential={name}:/path` or give a path"
    )]
    NoCredentials { name: String },
}

/// Key of a signature.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Secret {
    /// Reads `whsec_` and base64 of 24 to 64 bytes. Errors: why it is none, without its text.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let coded = text.strip_prefix(PREFIX).ok_or("it does not begin with `whsec_`")?;
        let key = STANDARD.decode(coded).map_err(|_| "what follows `whsec_` is not base64")?;
        BYTES.contains(&key.len()).then_some(Self(key)).ok_or("it is not 24 to 64 bytes long")
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.0
    }
}

/// Secrets in a file, one a line, the newest first; `#` begins a comment. A name without `/` is that of a systemd credential. All of
/// them sign, so that receivers may change from one to the next at their leisure.
pub fn read_secrets(file: &Path) -> Result<Vec<Secret>, SecretError> {
    let credential = !file.as_os_str().as_encoded_bytes().contains(&b'/');
    let path = if credential {
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY")
            .ok_or_else(|| SecretError::NoCredentials { name: file.display().to_string() })?;
        Path::new(&folder).join(file)
    } else {
        file.to_owned()
    };
    let unreadable = |source| SecretError::Unreadable { path: path.clone(), source };
    let mut file = crate::privilege::open_read(&path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if meta.len() > FILE_MAX || !meta.is_file() {
        return Err(unreadable(io::Error::other(format!("not a file of at most {FILE_MAX} bytes"))));
    }
    // Credentials are guarded by their folder.
    if !credential && meta.mode() & 0o004 != 0 {
        return Err(SecretError::Open { path });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(unreadable)?;
    let mut secrets = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let secret = Secret::parse(text).map_err(|why| SecretError::Malformed { path: path.clone(), line, why })?;
        secrets.push(secret);
    }
    if secrets.is_empty() || secrets.len() > SECRETS_MAX {
        return Err(SecretError::Count { path, count: secrets.len() });
    }
    Ok(secrets)
}

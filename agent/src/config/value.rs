//! Types of single settings: how each is read from TOML, checked and written back.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::reader::Value;
use super::units::{exact_bytes, exact_duration, parse_bytes, parse_duration};

/// A type that can stand behind a key.
pub(super) trait Setting: Sized + Clone + PartialEq {
    /// Reads it; the error says what is expected.
    fn read(value: &Value) -> Result<Self, String>;
    /// As TOML; `None` when unset.
    fn show(&self) -> Option<String>;
}

fn quoted(text: &str) -> Option<String> {
    Some(toml::Value::String(text.to_owned()).to_string())
}

impl Setting for String {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(format!("expected text in quotes, found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        quoted(self)
    }
}

impl Setting for bool {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Bool(yes) => Ok(*yes),
            other => Err(format!("expected true or false, found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Setting for u32 {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Integer(number, _) => {
                u32::try_from(*number).map_err(|_| format!("{number} is out of range; it is 0 to {}", u32::MAX))
            }
            other => Err(format!("expected a whole number, found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Setting for f64 {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Float(number) => Ok(*number),
            Value::Integer(number, _) => Ok(*number as f64),
            other => Err(format!("expected a number, found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        Some(toml::Value::Float(*self).to_string())
    }
}

impl Setting for PathBuf {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            // The daemon's working directory is no one's guess.
            Value::String(text) if Path::new(text).is_absolute() => Ok(PathBuf::from(text)),
            Value::String(text) => Err(format!("`{text}` is not an absolute path; start it with `/`")),
            other => Err(format!("expected a path in quotes, found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        quoted(&self.to_string_lossy())
    }
}

impl Setting for SocketAddr {
    fn read(value: &Value) -> Result<Self, String> {
        let expected = "expected an address and a port such as \"192.0.2.1:10809\" or \"[::]:10809\"";
        match value {
            Value::String(text) => text.parse().map_err(|_| format!("`{text}` is not that; {expected}")),
            _ => Err(expected.to_owned()),
        }
    }

    fn show(&self) -> Option<String> {
        quoted(&self.to_string())
    }
}

impl Setting for Vec<PathBuf> {
    fn read(value: &Value) -> Result<Self, String> {
        let Value::Array(items) = value else {
            return Err(format!("expected a list such as [\"/a\", \"/b\"], found {}", value.kind()));
        };
        items.iter().map(|item| PathBuf::read(&item.value)).collect()
    }

    fn show(&self) -> Option<String> {
        let texts: Vec<_> = self.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        Some(toml::Value::from(texts).to_string())
    }
}

impl Setting for Duration {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => parse_duration(text),
            other => Err(format!("expected a duration such as \"5s\", found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        quoted(&exact_duration(*self))
    }
}

impl<T: Setting> Setting for Option<T> {
    fn read(value: &Value) -> Result<Self, String> {
        T::read(value).map(Some)
    }

    fn show(&self) -> Option<String> {
        self.as_ref().and_then(T::show)
    }
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl Bytes {
    pub(super) const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    pub(super) const fn gib(gib: u64) -> Self {
        Self(gib << 30)
    }
}

impl Setting for Bytes {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => parse_bytes(text).map(Self),
            Value::Integer(number, _) => {
                u64::try_from(*number).map(Self).map_err(|_| format!("{number} is not a size; it cannot be negative"))
            }
            other => Err(format!("expected a size such as \"512MiB\", found {}", other.kind())),
        }
    }

    fn show(&self) -> Option<String> {
        quoted(&exact_bytes(self.0))
    }
}

/// A size, or a share of the host's memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RamSize {
    Bytes(u64),
    /// 0 < percent ≤ 90.
    Percent(f64),
}

impl RamSize {
    /// Bytes on a host with that much memory.
    #[must_use]
    pub fn resolve(self, host_ram_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (host_ram_bytes as f64 * percent / 100.0) as u64,
        }
    }
}

impl Setting for RamSize {
    fn read(value: &Value) -> Result<Self, String> {
        if let Value::String(text) = value
            && let Some(number) = text.trim().strip_suffix('%')
        {
            return match number.trim().parse::<f64>() {
                // The rest of the host needs memory as well: above this, guests would be swapped for their own cache.
                Ok(percent) if percent > 0.0 && percent <= 90.0 => Ok(Self::Percent(percent)),
                _ => Err(format!("`{text}` is not a share of memory; it is above 0% and at most 90%")),
            };
        }
        match Bytes::read(value) {
            Ok(Bytes(bytes)) => Ok(Self::Bytes(bytes)),
            Err(_) => Err("expected a size such as \"512MiB\" or a share of memory such as \"10%\"".to_owned()),
        }
    }

    fn show(&self) -> Option<String> {
        match self {
            Self::Bytes(bytes) => quoted(&exact_bytes(*bytes)),
            Self::Percent(percent) => quoted(&format!("{percent}%")),
        }
    }
}

/// A rate in bytes a second, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateLimit {
    Unlimited,
    BytesPerSecond(u64),
}

impl Setting for RateLimit {
    fn read(value: &Value) -> Result<Self, String> {
        let expected = || "expected \"unlimited\" or a rate such as \"100MiB/s\"".to_owned();
        match value {
            Value::String(text) if text == "unlimited" => Ok(Self::Unlimited),
            Value::String(text) => {
                let size = text.trim().strip_suffix("/s").ok_or_else(expected)?;
                parse_bytes(size).map(Self::BytesPerSecond).map_err(|_| expected())
            }
            _ => Err(expected()),
        }
    }

    fn show(&self) -> Option<String> {
        match self {
            Self::Unlimited => quoted("unlimited"),
            Self::BytesPerSecond(bytes) => quoted(&format!("{}/s", exact_bytes(*bytes))),
        }
    }
}

/// A number, or left to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Auto,
    Fixed(u32),
}

impl Count {
    /// The fixed number, or what `auto` gives.
    pub fn unwrap_or_else(self, auto: impl FnOnce() -> u32) -> u32 {
        match self {
            Self::Auto => auto(),
            Self::Fixed(number) => number,
        }
    }
}

impl Setting for Count {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) if text == "auto" => Ok(Self::Auto),
            Value::Integer(..) => u32::read(value).map(Self::Fixed),
            _ => Err("expected \"auto\" or a whole number".to_owned()),
        }
    }

    fn show(&self) -> Option<String> {
        match self {
            Self::Auto => quoted("auto"),
            Self::Fixed(number) => number.show(),
        }
    }
}

/// Permission bits of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(pub u32);

impl Setting for Mode {
    fn read(value: &Value) -> Result<Self, String> {
        let mode = match value {
            Value::String(text) => u32::from_str_radix(text.trim_start_matches("0o"), 8).ok(),
            Value::Integer(number, 8) => u32::try_from(*number).ok(),
            _ => None,
        };
        match mode {
            Some(mode) if mode <= 0o777 => Ok(Self(mode)),
            _ => Err("expected permission bits in octal such as \"0660\"".to_owned()),
        }
    }

    fn show(&self) -> Option<String> {
        quoted(&format!("{:04o}", self.0))
    }
}

macro_rules! word {
    ($(#[$doc:meta])* $Type:ident { $($(#[$vdoc:meta])* $Variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $Type { $($(#[$vdoc])* $Variant,)* }

        impl Setting for $Type {
            fn read(value: &Value) -> Result<Self, String> {
                match value {
                    $(Value::String(text) if text == $text => Ok(Self::$Variant),)*
                    _ => Err(format!("expected one of {}", [$(concat!("\"", $text, "\"")),*].join(", "))),
                }
            }

            fn show(&self) -> Option<String> {
                match self { $(Self::$Variant => quoted($text),)* }
            }
        }
    };
}

word! {
    /// Whether the RAM tier uses huge pages.
    HugePages {
        /// Where the host has them free; ordinary pages otherwise.
        Try = "try",
        /// Never.
        No = "no",
        /// Refuse to start without.
        Require = "require",
    }
}

word! {
    /// What the daemon gives up.
    SandboxMode {
        /// User, capabilities, files and system calls, as far as the kernel can.
        Full = "full",
        /// Nothing but what its memory helper has: for debugging.
        Off = "off",
    }
}

word! {
    /// What carries out I/O.
    Engine {
        /// io_uring where the kernel allows it, else a thread pool.
        Auto = "auto",
        IoUring = "io_uring",
        ThreadPool = "thread_pool",
    }
}

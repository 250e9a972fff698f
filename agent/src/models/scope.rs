//! What a model is for.

use std::fmt;

/// All storages, or one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Every storage that has no champion of its own.
    Global,
    /// A storage, by its identity.
    Storage(String),
}

impl Scope {
    /// As the database and the API name it. A storage's identity contains a `:`, so that none is called `global`.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Global => "global",
            Self::Storage(identity) => identity,
        }
    }

    #[must_use]
    pub fn of(key: &str) -> Self {
        match key {
            "global" => Self::Global,
            identity => Self::Storage(identity.to_owned()),
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

//! Small things that are kept under a name: events that are to come, announced activity.

use rusqlite::params;

use crate::store::writer::Pending;
use crate::store::{Store, StoreError, readable};

/// Longest value.
const VALUE_MAX: usize = 1 << 20;

impl Store {
    /// Keeps a value under a name, in place of the one before. Errors: `WrongState` of one above 1 MiB.
    pub fn keep(&self, name: String, value: Vec<u8>) -> Pending {
        if value.len() > VALUE_MAX {
            let length = value.len();
            let error = format!("`{name}` is {length} bytes long, at most {VALUE_MAX} are kept");
            return Pending::failed(StoreError::WrongState(error));
        }
        self.inner.writer.submit(value.len() as u64, false, move |connection| {
            connection
                .prepare_cached("REPLACE INTO kept (name, value) VALUES (?, ?)")?
                .execute(params![name, value])?;
            Ok(())
        })
    }

    /// Keeps it no longer; nothing happens where there is none.
    pub fn unkeep(&self, name: String) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            connection.prepare_cached("DELETE FROM kept WHERE name = ?")?.execute([&name])?;
            Ok(())
        })
    }

    /// Names that begin like this, and their values.
    pub fn kept(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.read("read what is kept in", |connection| {
            let sql = "SELECT name, value FROM kept WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name";
            let mut statement = connection.prepare_cached(sql)?;
            readable("programs and events", statement.query_map([prefix], |row| Ok((row.get(0)?, row.get(1)?)))?)
        })
    }
}

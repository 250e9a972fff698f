//! Sizes of disks: stores that somebody has made larger, and those that are made larger from here, while guests use them.
//!
//! - [`Disks::refresh_size`]: the regular look; [`Disks::refresh_sizes`]: at all, when a reload asks for it
//! - [`Disks::resize`]: an operator's order
//!
//! A guest is told of a size once its store has it. Nothing here makes a store smaller.

use super::disks::{Disks, Entry, Host, Served};
use crate::config::units::{exact_bytes, human_bytes, human_sizes};
use prestage_cache::OpenError;
use prestage_cache::backend::StoreError;
use prestage_cache::types::PAGE_BYTES;
use prestage_integration::api::types::DiskResized;
use prestage_integration::api::{ApiError, ErrorCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a look at a store's size has found.
struct Look {
    before: u64,
    size: u64,
    /// The hypervisor has taken note; `None`: nothing was to be told.
    told: Option<bool>,
}

impl Disks {
    /// Asks all stores for their size, servers too, and tells the guests of those that have grown. Blocks.
    pub(super) fn refresh_sizes(&self, host: &Host) {
        for entry in self.list() {
            self.refresh_size(host, &entry, true);
        }
    }

    /// The same of one disk. Asking an NBD server takes a new connection, so that is only done when somebody wants it (`ask_servers`).
    pub(super) fn refresh_size(&self, host: &Host, entry: &Entry, ask_servers: bool) {
        let Ok(served) = &entry.state else { return };
        if !ask_servers && !["file:", "qcow2:"].iter().any(|scheme| served.storage.identity().starts_with(scheme)) {
            return;
        }
        // Whoever is at it tells what there is to tell.
        let Some(_alone) = served.sizing.try_lock() else { return };
        let name = &entry.definition.name;
        if let Err(error) = look(host, name, served) {
            // Every few seconds the same: loud once, and in `status` for as long as it lasts.
            let text = error.to_string();
            let mut told = served.size_trouble.lock();
            if *told != text {
                tracing::warn!(disk = name, %error, "the store's size");
                *told = text;
            }
        }
    }

    /// Looks at the size of a disk's store, after making it `grow_to` bytes large if that is asked for, and tells the guests of all disks on
    /// it. Blocks.
    ///
    /// # Errors
    /// The store cannot be made larger, or asked; then nobody is told anything.
    pub(super) fn resize(&self, host: &Host, name: &str, grow_to: Option<u64>) -> Result<DiskResized, ApiError> {
        let entry = self.get(name)?;
        let served = served(&entry)?;
        let alone = served.sizing.lock();
        if let Some(size) = grow_to {
            served.storage.grow(size).map_err(|error| refused(name, size, &error))?;
        }
        let Look { before, size, told } = look(host, name, served).map_err(|error| store_failed(&error))?;
        drop(alone);
        self.tell_others(host, name, served);
        let mut notes = Vec::new();
        if told == Some(false) && entry.is_connected() {
            notes.push(
                "its hypervisor cannot be told while it is connected: the guest sees the size when its machine is started anew"
                    .to_owned(),
            );
        }
        if before != size && served.nbd.as_ref().is_some_and(|nbd| !nbd.clients().is_empty()) {
            notes.push("NBD clients see the size when they connect anew".to_owned());
        }
        if grow_to.is_some() {
            notes.extend(beyond_its_room(served, size));
        }
        if grow_to.is_none() && before == size && served.storage.identity().starts_with("qcow2:") {
            notes.push("the size of an image is looked at when its disk is opened".to_owned());
        }
        let told = told == Some(true);
        Ok(DiskResized { disk: name.to_owned(), before_bytes: before, after_bytes: size, told, notes })
    }

    /// Has those look who are on the same store.
    fn tell_others(&self, host: &Host, name: &str, served: &Served) {
        for entry in self.list() {
            let Ok(other) = &entry.state else { continue };
            let same = entry.definition.name != name && other.storage.id() == served.storage.id();
            let Some(_alone) = same.then(|| other.sizing.lock()) else { continue };
            if let Err(error) = look(host, &entry.definition.name, other) {
                tracing::warn!(disk = entry.definition.name, %error, "the store's size");
            }
        }
    }
}

/// What is said of a file that is larger than its file system could hold.
fn beyond_its_room(served: &Served, size: u64) -> Option<String> {
    let room = served.storage.file()?.room_bytes().ok()??;
    let [room_for, size_of] = human_sizes([room, size]);
    (size > room).then(|| {
        format!(
            "its file system has room for {room_for} of these {size_of}, with what the file takes there now: the guest's writes fail once \
             that is full"
        )
    })
}

fn served(entry: &Entry) -> Result<&Arc<Served>, ApiError> {
    entry.state.as_ref().map_err(|reason| {
        let detail = format!("disk `{}` is not served: {reason}", entry.definition.name);
        ApiError::new(ErrorCode::StoreFailed, detail)
    })
}

/// Asks the store for its size, and tells the guest of another one. The caller holds `sizing`.
fn look(host: &Host, name: &str, served: &Served) -> Result<Look, OpenError> {
    let size = served.storage.refresh_size()?;
    served.size_trouble.lock().clear();
    let before = served.capacity_bytes.swap(size, Ordering::Relaxed);
    if before == size {
        return Ok(Look { before, size, told: None });
    }
    if !before.is_multiple_of(PAGE_BYTES as u64) {
        // A page of which the store had a part was kept with zeroes behind it, where there may be something now.
        host.cache.drop_ram(Some(&served.storage));
        host.cache.drop_ssd(Some(&served.storage));
    }
    // The learner takes note of the new end.
    host.learner.add_storage(served.storage.clone());
    let told = served.export.lock().as_ref().map(|export| export.resize(size));
    let told = match told {
        Some(Ok(told)) => {
            tracing::info!(disk = name, before, size, told, "disk has a new size");
            Some(told)
        }
        Some(Err(error)) => {
            tracing::error!(disk = name, %error, "new size not offered");
            Some(false)
        }
        None => None,
    };
    Ok(Look { before, size, told })
}

fn store_failed(error: &OpenError) -> ApiError {
    ApiError::new(ErrorCode::StoreFailed, error.to_string())
}

/// Why a store was not made larger, in the words of the command.
fn refused(name: &str, asked: u64, error: &OpenError) -> ApiError {
    match error {
        OpenError::Store(StoreError::Smaller { now_bytes, .. }) => ApiError::invalid(format!(
            "disk `{name}` has {} ({}) and is not made smaller: {} would cut off what its guest has there",
            human_bytes(*now_bytes),
            exact_bytes(*now_bytes),
            exact_bytes(asked)
        )),
        OpenError::Store(StoreError::BadSize { .. }) => ApiError::invalid(format!(
            "{} is no size for disk `{name}`; it is a positive multiple of 512 bytes, and less than 8 EiB",
            exact_bytes(asked)
        )),
        OpenError::Store(StoreError::TooLarge { most_bytes, .. }) => ApiError::invalid(format!(
            "{} is too large for disk `{name}`: its file system takes files of {} at most ({})",
            exact_bytes(asked),
            human_bytes(*most_bytes),
            exact_bytes(*most_bytes)
        )),
        OpenError::Store(StoreError::NotGrown { .. }) => ApiError::new(
            ErrorCode::NotPossible,
            format!("{error}; then `prestagectl disk resize {name}` without a size tells the guest"),
        ),
        OpenError::Store(StoreError::ReadOnly { .. }) => ApiError::new(
            ErrorCode::NotPossible,
            format!(
                "disk `{name}` is read-only, and so is its store to prestaged: make that larger elsewhere; then `prestagectl disk \
                 resize {name}` without a size tells the guest"
            ),
        ),
        OpenError::Store(StoreError::NoSpace { .. }) => ApiError::new(ErrorCode::NoSpace, error.to_string()),
        other => store_failed(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_size_is_the_requests_fault_and_a_store_that_was_cut_is_the_stores() {
        let store = || "file:/d".to_owned();
        let size_bytes = 1 << 63;
        let bad = refused("d", size_bytes, &StoreError::BadSize { store: store(), size_bytes }.into());
        assert_eq!(bad.code, ErrorCode::InvalidRequest);
        assert!(bad.detail.starts_with("8192PiB is no size for disk `d`; it is a positive multiple of 512"), "{bad:?}");
        let beyond = StoreError::TooLarge { store: store(), asked_bytes: 1 << 60, most_bytes: (1 << 44) - 4096 };
        let beyond = refused("d", 1 << 60, &beyond.into());
        assert_eq!(beyond.code, ErrorCode::InvalidRequest);
        assert!(
            beyond.detail.contains("1024PiB is too large for disk `d`")
                && beyond.detail.contains("at most (17179869180KiB)"),
            "{beyond:?}"
        );
        let cut = StoreError::Shrunk { store: store(), was_bytes: 8192, now_bytes: 4096 };
        assert_eq!(refused("d", 16384, &cut.into()).code, ErrorCode::StoreFailed);
    }
}

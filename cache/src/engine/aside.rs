//! Work that may take as long as a device or a server that does not answer: done on a thread of its own, so that nobody waits for
//! longer than he wants to.
//!
//! - [`AsideFile`]: a file of a shard whose closing may hang
//! - [`within`]: anything that may hang, with a limit

use super::shard::Shard;
use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How often it is looked whether the last operation on a file is over.
const LOOK: Duration = Duration::from_millis(5);

/// Says for as long as a clone of it lives that a file is open: from before it is until `close(2)` has returned.
pub(crate) type OpenMark = Arc<()>;

/// Runs `act` on a thread of its own and waits for it at most so long. `None`: it goes on by itself, and its value is dropped there.
///
/// # Errors
/// There is no thread for it, or it panicked.
pub fn within<T: Send + 'static>(
    name: &str,
    limit: Duration,
    act: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Option<T>> {
    let (done, ended) = channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _ = done.send(act());
    })?;
    match ended.recv_timeout(limit) {
        Ok(value) => Ok(Some(value)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other(format!("thread `{name}` panicked"))),
    }
}

/// Closes a file on a thread of its own: FUSE and network file systems ask their server at every `close(2)`.
pub(crate) fn close_aside(file: impl Into<OwnedFd>, mark: OpenMark) {
    let file = file.into();
    let close = move || {
        drop(file);
        drop(mark);
    };
    if let Err(error) = std::thread::Builder::new().name("close".to_owned()).spawn(close) {
        tracing::warn!(%error, "no thread to close a file; whoever closed it waited for it");
    }
}

/// A file on its shard. If [operations on it may block](super::blocks_in_kernel), so may its closing, which is not left to the
/// shard then: it follows the last operation, on a thread of its own.
#[derive(Debug)]
pub(crate) struct AsideFile {
    // Dropped in this order: what is left then is under way.
    file: Rc<OwnedFd>,
    _closing: Closing,
}

impl AsideFile {
    pub(crate) fn new(shard: &Shard, file: OwnedFd, aside: bool, mark: OpenMark) -> AsideFile {
        let file = Rc::new(file);
        if aside {
            shard.run_aside(&file);
        }
        let closing = Closing { last: Last { file: Some(Rc::clone(&file)), mark }, aside, shard: shard.clone() };
        AsideFile { file, _closing: closing }
    }

    /// Whether operations on it are under way.
    pub(crate) fn is_in_use(&self) -> bool {
        Rc::strong_count(&self.file) > 2
    }
}

impl Deref for AsideFile {
    type Target = Rc<OwnedFd>;
    fn deref(&self) -> &Rc<OwnedFd> {
        &self.file
    }
}

#[derive(Debug)]
struct Closing {
    last: Last,
    aside: bool,
    shard: Shard,
}

impl Drop for Closing {
    fn drop(&mut self) {
        if !self.aside {
            self.last.file = None;
            return;
        }
        let last = Last { file: self.last.file.take(), mark: self.last.mark.clone() };
        if last.is_alone() {
            return;
        }
        if self.shard.is_stopping() {
            // It runs no tasks any more, and is not to hang at its end: the file is closed with the process.
            std::mem::forget(last);
            return;
        }
        let shard = self.shard.clone();
        self.shard.spawn(async move {
            while !last.is_alone() {
                shard.sleep(LOOK).await;
            }
        });
    }
}

#[derive(Debug)]
struct Last {
    file: Option<Rc<OwnedFd>>,
    mark: OpenMark,
}

impl Last {
    fn is_alone(&self) -> bool {
        self.file.as_ref().is_none_or(|file| Rc::strong_count(file) == 1)
    }
}

impl Drop for Last {
    /// Of a task that is dropped with its shard the file is left as above.
    fn drop(&mut self) {
        if !self.is_alone() {
            std::mem::forget(self.file.take());
        } else if let Some(file) = self.file.take().and_then(Rc::into_inner) {
            close_aside(file, self.mark.clone());
        }
    }
}

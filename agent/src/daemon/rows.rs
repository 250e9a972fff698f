//! A disk's requests as CSV, live and from the database, and why one of its pages was or was not prefetched.

use super::Shared;
use super::control::{served, store_error};
use crate::learner::tap::{Batch, Reader};
use crate::store::segment::{AccessOp as StoredOp, AccessRecord};
use crate::store::{SegmentRow, StoreError};
use futures_util::stream::unfold;
use prestage_cache::access::AccessOp;
use prestage_cache::types::PAGE_BYTES;
use prestage_integration::api::types::Explained;
use prestage_integration::api::{ApiError, Bytes, ErrorCode, Rows};
use std::collections::VecDeque;
use std::fmt::Write;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const HEADER: &str = "ts_us,op,offset,len\n";
/// How long the learner may take over a question. It answers within milliseconds unless it is far behind.
const LEARNER_ANSWERS: Duration = Duration::from_secs(5);

/// Asks the learner, which may be busy: nobody waits for it for ever.
async fn answer<T>(question: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::time::timeout(LEARNER_ANSWERS, question).await.map_err(|_| {
        let limit = LEARNER_ANSWERS.as_secs();
        ApiError::new(ErrorCode::Timeout, format!("the learner is busy and did not answer within {limit} s; try again"))
    })
}

/// A row; a discard of more than that is several, for no reader of traces expects a request of many gigabytes.
const ROW_BYTES: u64 = 1 << 30;

/// Text cannot fail to be written to.
fn row(text: &mut String, at_us: u64, op: char, mut offset: u64, mut len: u64) {
    while len > ROW_BYTES {
        let _ = writeln!(text, "{at_us},{op},{offset},{ROW_BYTES}");
        (offset, len) = (offset.saturating_add(ROW_BYTES), len - ROW_BYTES);
    }
    let _ = writeln!(text, "{at_us},{op},{offset},{len}");
}

/// One batch of a recording.
fn recorded(batch: &Batch, epoch_us: u64) -> String {
    let mut text = String::with_capacity(batch.accesses.len() * 40);
    if batch.lost > 0 {
        let _ = writeln!(text, "# missing {}: of all disks, the learner was too slow", batch.lost);
    }
    for access in &batch.accesses {
        let op = match access.op {
            AccessOp::Read => 'R',
            AccessOp::Write => 'W',
            AccessOp::Discard => 'D',
        };
        let at_us = epoch_us.saturating_add(u64::try_from(access.at.as_micros()).unwrap_or(u64::MAX));
        row(&mut text, at_us, op, access.offset, u64::from(access.len));
    }
    if batch.missing > 0 {
        let _ = writeln!(text, "# missing {}: the reader was too slow", batch.missing);
    }
    text
}

/// The disk's requests from now on.
pub(super) async fn trace(daemon: &Shared, name: &str) -> Result<Rows, ApiError> {
    let id = served(daemon, name)?.id;
    let reader = answer(daemon.learner.trace(id)).await?;
    let reader = reader.ok_or_else(|| {
        let detail = "too many recordings run at once; end one of them first";
        ApiError::new(ErrorCode::Unavailable, detail)
    })?;
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch_us = u64::try_from(unix.saturating_sub(daemon.cache.now()).as_micros()).unwrap_or(u64::MAX);
    enum Next {
        Header(Reader),
        Batch(Reader),
        Nothing,
    }
    Ok(Rows::new(unfold(Next::Header(reader), move |next| async move {
        let (text, next) = match next {
            Next::Header(reader) => (HEADER.to_owned(), Next::Batch(reader)),
            Next::Batch(mut reader) => match reader.recv().await {
                Some(batch) => (recorded(&batch, epoch_us), Next::Batch(reader)),
                None => ("# end: the disk is no longer served\n".to_owned(), Next::Nothing),
            },
            Next::Nothing => return None,
        };
        Some((Ok(Bytes::from(text)), next))
    })))
}

/// What the database has of the disk.
pub(super) async fn history(daemon: &Shared, name: &str, since_us: u64) -> Result<Rows, ApiError> {
    let served = served(daemon, name)?;
    let vm = daemon.disks.get(name)?.definition.vm.unwrap_or_default();
    let place = daemon.questions.stream()?;
    let shared = daemon.clone();
    let segments = daemon.questions.ask(move || {
        shared.store.segments(served.storage.identity(), Some(&vm), since_us, u64::MAX).map_err(|e| store_error(&e))
    });
    let state = (daemon.clone(), VecDeque::from(segments.await??), Stage::Header, place);
    Ok(Rows::new(unfold(state, move |(daemon, mut segments, stage, place)| async move {
        let (text, stage) = match stage {
            Stage::Header => (Ok(HEADER.to_owned()), Stage::Segments),
            Stage::Segments => match segments.pop_front() {
                Some(segment) => (stored(&daemon, segment, since_us).await, Stage::Segments),
                None => (Ok("# end: so far the history\n".to_owned()), Stage::Nothing),
            },
            Stage::Nothing => return None,
        };
        Some((text.map(Bytes::from), (daemon, segments, stage, place)))
    })))
}

enum Stage {
    Header,
    Segments,
    Nothing,
}

/// One segment of history. What cannot be read is told in its place and holds up nothing.
async fn stored(daemon: &Shared, segment: SegmentRow, since_us: u64) -> io::Result<String> {
    let store = daemon.store.clone();
    let read = move || match store.segment(segment.id) {
        Ok(accesses) => Ok(stored_rows(&accesses, since_us)),
        Err(StoreError::NotFound { .. }) => {
            Ok(format!("# missing {}: removed meanwhile, the history has its limits\n", segment.accesses))
        }
        Err(StoreError::Segment(error)) => Ok(format!("# missing {}: {error}\n", segment.accesses)),
        Err(error) => Err(io::Error::other(error)),
    };
    daemon.questions.wait(read).await.map_err(io::Error::other)?
}

fn stored_rows(accesses: &[AccessRecord], since_us: u64) -> String {
    let mut text = String::with_capacity(accesses.len() * 40);
    let page = PAGE_BYTES as u64;
    for access in accesses.iter().filter(|access| access.at_us >= since_us) {
        let op = match access.op {
            StoredOp::Read => 'R',
            StoredOp::Write => 'W',
            StoredOp::Discard => 'D',
        };
        // Pages are bounded where they are decoded: their bytes fit.
        row(&mut text, access.at_us, op, access.page.saturating_mul(page), u64::from(access.pages) * page);
    }
    text
}

/// Why the page at an offset was or was not prefetched.
pub(super) async fn explain(daemon: &Shared, name: &str, offset_bytes: u64) -> Result<Explained, ApiError> {
    let served = served(daemon, name)?;
    let size = served.storage.info().size_bytes;
    if offset_bytes >= size {
        return Err(ApiError::invalid(format!("offset {offset_bytes} is beyond disk `{name}` of {size} bytes")));
    }
    let page = offset_bytes / PAGE_BYTES as u64;
    let explained = answer(daemon.learner.explain(served.storage.id(), page)).await?;
    let explained = explained.ok_or_else(|| {
        ApiError::new(ErrorCode::Unavailable, "the learner does not know this storage; see `prestagectl status`")
    })?;
    let guest = served.counters.snapshot();
    let waited = guest.served_ssd + guest.served_store;
    let miss_us = (waited > 0).then(|| guest.read_wait_us as f64 / waited as f64);
    Ok(Explained { disk: name.to_owned(), miss_us, ..explained })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_cache::access::Access;
    use prestage_cache::types::StorageId;

    #[test]
    fn a_batch_is_exact_to_the_byte_and_says_what_is_missing_where() {
        let access = |at, op, offset, len| {
            let at = Duration::from_micros(at);
            Access { at, disk: 0, storage: StorageId(0), op, offset, len, waits: false }
        };
        let accesses = vec![access(1, AccessOp::Read, 512, 1024), access(2, AccessOp::Discard, 1 << 40, 3 << 30)];
        assert_eq!(
            recorded(&Batch { accesses, missing: 7, lost: 3 }, 1000),
            "# missing 3: of all disks, the learner was too slow\n1001,R,512,1024\n1002,D,1099511627776,1073741824\n\
             1002,D,1100585369600,1073741824\n1002,D,1101659111424,1073741824\n# missing 7: the reader was too slow\n"
        );
    }

    #[test]
    fn history_is_in_bytes_and_begins_where_asked() {
        let record = |at_us, op, page, pages| AccessRecord { at_us, op, page, pages };
        let accesses = [record(5, StoredOp::Read, 1, 1), record(6, StoredOp::Write, 2, 3)];
        assert_eq!(stored_rows(&accesses, 0), "5,R,4096,4096\n6,W,8192,12288\n");
        assert_eq!(stored_rows(&accesses, 6), "6,W,8192,12288\n");
    }
}

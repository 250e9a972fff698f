//! Jobs side by side, one thread a core, results in the jobs' order: how many threads there are changes no figure.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail};

/// Runs `work` on every job. The first error ends the run, in the order of the jobs.
pub(crate) fn each<J: Sync, R: Send>(jobs: &[J], work: impl Fn(&J) -> Result<R> + Sync) -> Result<Vec<R>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
    let done: Mutex<Vec<(usize, Result<R>)>> = Mutex::new(Vec::with_capacity(jobs.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(jobs.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index).filter(|_| index < failed.load(Ordering::Relaxed)) else { return };
                    let result = work(job);
                    if result.is_err() {
                        failed.fetch_min(index, Ordering::Relaxed);
                    }
                    done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    let results: Vec<R> = done.into_iter().map(|(_, result)| result).collect::<Result<_>>()?;
    if results.len() != jobs.len() {
        bail!("{} of {} jobs were done", results.len(), jobs.len());
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_jobs_order_and_the_first_error_counts() {
        let jobs: Vec<u64> = (0..100).collect();
        assert_eq!(each(&jobs, |job| Ok(job * 2)).unwrap(), (0..100).map(|job| job * 2).collect::<Vec<_>>());
        let failing = |job: &u64| if *job % 40 == 7 { bail!("job {job}") } else { Ok(()) };
        assert_eq!(each(&jobs, failing).unwrap_err().to_string(), "job 7");
    }
}

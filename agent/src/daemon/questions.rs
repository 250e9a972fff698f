//! How many questions about history are answered at a time.
//!
//! Each takes a processor for up to tens of milliseconds that guests' reads want too, and one of the API's connections while it waits. So
//! few are answered at once, some wait, and what comes beyond that is told to come again.

use super::control::blocking;
use prestage_integration::api::{ApiError, ErrorCode};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Questions answered at the same time.
const ANSWERED: usize = 2;
/// Questions answered or waiting.
const ASKED: usize = 32;
/// Histories on their way to readers, who take as long as they like.
const STREAMS: usize = 8;

/// See the module's head.
#[derive(Debug)]
pub(super) struct Questions {
    asked: Semaphore,
    answered: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Default for Questions {
    fn default() -> Self {
        Self {
            asked: Semaphore::new(ASKED),
            answered: Arc::new(Semaphore::new(ANSWERED)),
            streams: Arc::new(Semaphore::new(STREAMS)),
        }
    }
}

/// What a question gives that is not to be answered now.
fn busy(what: &str, most: usize) -> ApiError {
    ApiError::new(ErrorCode::Busy, format!("{most} {what} already; try again in a second"))
}

impl Questions {
    /// Answers a question on a thread for what blocks. Errors: `Busy`.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _asked = self.asked.try_acquire().map_err(|_| busy("questions about history wait", ASKED))?;
        self.wait(question).await
    }

    /// The same for a part of an answer that has begun: it waits its turn.
    pub(super) async fn wait<T: Send + 'static>(
        &self,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        // Never closed.
        let answered = Arc::clone(&self.answered).acquire_owned().await;
        let answered = answered.map_err(|error| ApiError::internal(error.to_string()))?;
        blocking(move || {
            // The thread's: a client that hangs up does not end what it has begun.
            let _answered = answered;
            question()
        })
        .await
    }

    /// A place for a history that is read row by row, free again when it is dropped. Errors: `Busy`.
    pub(super) fn stream(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.streams).try_acquire_owned().map_err(|_| busy("histories are being read", STREAMS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    #[tokio::test]
    async fn few_are_answered_at_once_some_wait_and_others_are_sent_away() {
        let questions = Arc::new(Questions::default());
        let (gate, opened) = channel::<()>();
        let opened = Arc::new(std::sync::Mutex::new(opened));
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..ASKED {
            let (questions, opened) = (questions.clone(), opened.clone());
            let (running, most) = (running.clone(), most.clone());
            asked.spawn(async move {
                let question = move || {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    opened.lock().unwrap().recv().unwrap();
                    running.fetch_sub(1, Ordering::SeqCst);
                };
                questions.ask(question).await
            });
        }
        // Ends by the event: all of them have been asked.
        while questions.asked.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(questions.ask(|| ()).await.unwrap_err().code, ErrorCode::Busy);
        (0..ASKED).for_each(|_| gate.send(()).unwrap());
        while let Some(answer) = asked.join_next().await {
            answer.unwrap().unwrap();
        }
        assert!((1..=ANSWERED).contains(&most.load(Ordering::SeqCst)));
        questions.ask(|| ()).await.unwrap();
    }

    #[test]
    fn histories_being_read_are_counted_until_they_are_dropped() {
        let questions = Questions::default();
        let streams: Vec<_> = (0..STREAMS).map(|_| questions.stream().unwrap()).collect();
        assert_eq!(questions.stream().unwrap_err().code, ErrorCode::Busy);
        drop(streams);
        assert!(questions.stream().is_ok());
    }
}

//! This project as a contender: a real prestaged, which runs in its own rounds only.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::pages::{Memory, Usage};
use prestage_tests::process::wait_until;
use serde_json::Value;

use super::contender::Contender;

/// The name the touches are announced by.
const PROGRAM: &str = "toucher";

/// After the guest's answer, for work that is still under way; it counts.
const TAIL: Duration = Duration::from_millis(500);

/// What it knows of the guest when a round begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Knowledge {
    /// What it has learned in its earlier rounds.
    Kept,
    /// Nothing: it is a new daemon in every round.
    Nothing,
}

/// prestaged, stopped between its rounds so that it neither sees nor disturbs those of others.
#[derive(Debug)]
pub(super) struct Project {
    guest: String,
    options: DaemonOptions,
    knowledge: Knowledge,
    /// None: the touch is not announced, but for the first, so that it is known.
    lead: Option<Duration>,
    announced_once: bool,
    daemon: Option<Arc<Mutex<Prestaged>>>,
    before: Usage,
    announced: Option<JoinHandle<Result<Value>>>,
}

impl Project {
    pub(super) fn new(guest: &str, options: &DaemonOptions, knowledge: Knowledge, lead: Option<Duration>) -> Self {
        let (guest, options) = (guest.to_owned(), options.clone());
        Self {
            guest,
            options,
            knowledge,
            lead,
            announced_once: false,
            daemon: None,
            before: Usage::default(),
            announced: None,
        }
    }
}

fn usage(daemon: &Prestaged) -> Result<Usage> {
    Usage::of_family(daemon.pid().context("prestaged does not run")?)
}

impl Contender for Project {
    fn name(&self) -> String {
        match (self.knowledge, self.lead) {
            (Knowledge::Nothing, _) => "prestage, unlearned",
            (Knowledge::Kept, Some(_)) => "prestage, announced",
            (Knowledge::Kept, None) => "prestage, not told",
        }
        .to_owned()
    }

    fn lead(&self) -> Option<Duration> {
        self.lead
    }

    fn prepare(&mut self) -> Result<()> {
        if self.knowledge == Knowledge::Nothing {
            self.daemon = None;
        }
        let daemon = match &self.daemon {
            Some(daemon) => {
                daemon.lock().unwrap_or_else(PoisonError::into_inner).resume()?;
                Arc::clone(daemon)
            }
            None => Arc::new(Mutex::new(Prestaged::start(&self.options)?)),
        };
        let held = daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let watched = || {
            let vm = held.ctl(&["vm", "show", &self.guest]);
            Ok(vm.is_ok_and(|vm| vm["pages"]["signal"].is_string()))
        };
        wait_until("prestaged's watch over the guest's memory", Duration::from_secs(60), watched)
            .with_context(|| held.last_words())?;
        drop(held);
        self.daemon = Some(daemon);
        Ok(())
    }

    fn start(&mut self, _: &Arc<Memory>) -> Result<()> {
        let daemon = Arc::clone(self.daemon.as_ref().context("prestaged does not run")?);
        self.before = usage(&daemon.lock().unwrap_or_else(PoisonError::into_inner))?;
        let first = !std::mem::replace(&mut self.announced_once, true);
        if self.lead.is_none() && !(first && self.knowledge == Knowledge::Kept) {
            return Ok(());
        }
        let guest = self.guest.clone();
        self.announced = Some(std::thread::spawn(move || {
            let daemon = daemon.lock().unwrap_or_else(PoisonError::into_inner);
            daemon.ctl(&["execution", "start", &guest, PROGRAM])
        }));
        Ok(())
    }

    fn settle(&mut self) -> Result<Duration> {
        let started = self.announced.take().map(JoinHandle::join).transpose();
        let started = started.map_err(|_| anyhow!("the thread that announces has ended"))?.transpose()?;
        let daemon = self.daemon.as_ref().context("prestaged does not run")?;
        let mut daemon = daemon.lock().unwrap_or_else(PoisonError::into_inner);
        std::thread::sleep(TAIL);
        let used = usage(&daemon)?.since(&self.before);
        if let Some(started) = started {
            daemon.ctl(&["execution", "end", &started["id"].to_string()])?;
        }
        daemon.stop()?;
        Ok(used.cpu)
    }
}

//! The simulated host: when what is asked for arrives, and who goes short.
//!
//! Actuation takes what it took when measured (libvirt 11.3, QEMU 10.0, Debian 12 guests):
//!
//! - a vCPU is there after 0.25 s and online within a second; less CPU (a quota) takes effect at once;
//! - by balloon 424 MiB come back to a guest in 1.2 s, and are taken from it in 4.8 s; by virtio-mem 512 MiB come in 0.3 s
//!   and go in 1.9 s; more takes longer in proportion.
//!
//! **A host given away more than once.** CPU: max-min fair, as the kernel's scheduler shares it. Memory: guests fill
//! what they have with page cache, so what is given is touched; what does not fit is swapped out, the least used first.
//! Pages that a guest comes to need again are swapped in at [`SWAP_IN`] bytes a second for the whole host: until then
//! it goes short. Demand beyond the host is shared max-min.

use serde::Serialize;

/// Bytes a second that a host swaps in: random pages from an SSD with the kernel's readahead.
pub(super) const SWAP_IN: f64 = 200.0 * 1048576.0;
/// Seconds until more CPU is online.
const CPU_RAISE_S: f64 = 1.0;
/// Less than this is rounding.
const EPSILON: f64 = 1e-9;

/// Cores or memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Cpu,
    Memory,
}

/// By which means memory comes and goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBy {
    #[default]
    Balloon,
    VirtioMem,
}

impl MemoryBy {
    /// Bytes that were moved when it was measured, and how many seconds they took to come and to go.
    const fn measured(self) -> (f64, f64, f64) {
        match self {
            Self::Balloon => (424.0 * 1048576.0, 1.2, 4.8),
            Self::VirtioMem => (512.0 * 1048576.0, 0.3, 1.9),
        }
    }

    /// Bytes that come in so many seconds.
    pub(super) fn comes_in(self, seconds: f64) -> f64 {
        let (bytes, grow_s, _) = self.measured();
        bytes / grow_s * seconds
    }
}

/// A machine's share of one resource.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Share {
    /// What it wants.
    pub(super) demand: f64,
    /// What it has been given.
    pub(super) have: f64,
    /// What it is to have.
    target: f64,
    /// Units a second towards the target; for CPU, seconds left.
    pace: f64,
    /// What of it is there: the host may have given away more than it has.
    pub(super) there: f64,
    /// Runs.
    pub(super) on: bool,
}

impl Share {
    /// What it uses: at most what is there.
    pub(super) fn used(&self) -> f64 {
        self.demand.min(self.there)
    }

    /// Whether it goes short.
    pub(super) fn short(&self) -> bool {
        self.on && self.demand > self.there * (1.0 + EPSILON) + EPSILON
    }
}

/// One resource of the host.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    kind: Kind,
    by: MemoryBy,
    pub(super) capacity: f64,
    pub(super) shares: Vec<Share>,
    moving: bool,
}

impl Pool {
    pub(super) fn new(kind: Kind, by: MemoryBy, capacity: f64, machines: usize) -> Self {
        Self { kind, by, capacity, shares: vec![Share::default(); machines], moving: true }
    }

    /// A machine's demand from now on, and whether it runs at all. One that starts has what is `given`, all of it
    /// there.
    pub(super) fn demand(&mut self, machine: usize, on: bool, demand: f64, given: f64) {
        let share = &mut self.shares[machine];
        if on && !share.on {
            *share = Share { have: given, target: given, there: given, ..Share::default() };
        }
        if !on {
            *share = Share::default();
        }
        (share.on, share.demand) = (on, demand);
        self.moving = true;
    }

    /// Asks for a change; whether it is one.
    pub(super) fn ask(&mut self, machine: usize, target: f64) -> bool {
        let share = &mut self.shares[machine];
        if !share.on || !target.is_finite() || (target - share.target).abs() <= 1e-6 * share.target.max(1e-6) {
            return false;
        }
        share.target = target.max(0.0);
        let change = (share.target - share.have).abs();
        match self.kind {
            Kind::Cpu if share.target < share.have => share.have = share.target,
            Kind::Cpu => share.pace = CPU_RAISE_S,
            Kind::Memory => {
                let (bytes, grow_s, shrink_s) = self.by.measured();
                let seconds = if share.target > share.have { grow_s } else { shrink_s };
                share.pace = change / (seconds * (change / bytes).max(1.0));
            }
        }
        self.moving = true;
        true
    }

    /// Whether anything changes by itself with time.
    pub(super) fn moving(&self) -> bool {
        self.moving
    }

    /// A second passes (or more, while nothing moves).
    pub(super) fn pass(&mut self, seconds: f64) {
        if !self.moving {
            return;
        }
        self.moving = false;
        for share in self.shares.iter_mut().filter(|share| share.on && share.have != share.target) {
            match self.kind {
                Kind::Cpu => {
                    share.pace -= seconds;
                    if share.pace <= EPSILON {
                        share.have = share.target;
                    }
                }
                Kind::Memory => {
                    let left = share.target - share.have;
                    let step = (share.pace * seconds).min(left.abs());
                    let had = share.have;
                    share.have = if step + 1.0 >= left.abs() { share.target } else { had + step.copysign(left) };
                    // Pages that are new to a guest need room only.
                    share.there += (share.have - had).max(0.0);
                }
            }
            self.moving |= share.have != share.target;
        }
        match self.kind {
            Kind::Cpu => self.schedule(),
            Kind::Memory => self.page(seconds),
        }
    }

    /// What the scheduler gives each, max-min fair.
    fn schedule(&mut self) {
        let wanted: f64 = self.shares.iter().map(|share| share.demand.min(share.have)).sum();
        let level = if wanted > self.capacity { level(&self.shares, self.capacity) } else { f64::INFINITY };
        for share in &mut self.shares {
            // Nobody is held back below the level; there is what it may have.
            share.there = share.have.min(level);
        }
    }

    /// Swaps out what does not fit and swaps in what is needed.
    fn page(&mut self, seconds: f64) {
        let given: f64 = self.shares.iter().map(|share| share.have).sum();
        if given <= self.capacity * (1.0 + 1e-12) {
            // What was swapped out before is not held against anybody.
            self.shares.iter_mut().for_each(|share| share.there = share.have);
            return;
        }
        let wanted: f64 = self.shares.iter().map(|share| share.demand.min(share.have)).sum();
        let level = if wanted > self.capacity { level(&self.shares, self.capacity) } else { f64::INFINITY };
        let mut missing = 0.0;
        for share in &mut self.shares {
            share.there = share.there.min(share.have);
            missing += (share.demand.min(share.have).min(level) - share.there).max(0.0);
        }
        let came = if missing > 0.0 { (SWAP_IN * seconds / missing).min(1.0) } else { 1.0 };
        self.moving |= came < 1.0;
        for share in &mut self.shares {
            let wants = share.demand.min(share.have).min(level);
            share.there += came * (wants - share.there).max(0.0);
        }
        // Room is made by those who do not need theirs.
        let there: f64 = self.shares.iter().map(|share| share.there).sum();
        let spare: f64 =
            self.shares.iter().map(|share| (share.there - share.demand.min(share.have).min(level)).max(0.0)).sum();
        let out = if spare > 0.0 { ((there - self.capacity).max(0.0) / spare).min(1.0) } else { 0.0 };
        for share in &mut self.shares {
            let spare = (share.there - share.demand.min(share.have).min(level)).max(0.0);
            share.there -= out * spare;
        }
    }

    /// Allocated and not used, of what exists.
    pub(super) fn unused(&self) -> f64 {
        let given: f64 = self.shares.iter().map(|share| share.have).sum();
        let used: f64 = self.shares.iter().map(Share::used).sum();
        (given.min(self.capacity) - used).max(0.0)
    }

    /// Given to nobody.
    pub(super) fn free(&self) -> f64 {
        (self.capacity - self.shares.iter().map(|share| share.have).sum::<f64>()).max(0.0)
    }
}

/// The level at which demands, each up to it, come to the capacity.
fn level(shares: &[Share], capacity: f64) -> f64 {
    let mut wants: Vec<f64> = shares.iter().map(|share| share.demand.min(share.have)).collect();
    wants.sort_unstable_by(f64::total_cmp);
    let (mut rest, machines) = (capacity, wants.len());
    for (at, want) in wants.into_iter().enumerate() {
        let each = rest / (machines - at) as f64;
        if want >= each {
            return each;
        }
        rest -= want;
    }
    f64::INFINITY
}

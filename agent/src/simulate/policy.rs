//! Who decides: what it sees, and what it may ask for.

/// What can be seen of a machine's resource from the host.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Resource {
    /// What it uses; at most what it has.
    pub used: f64,
    /// What it has been given.
    pub have: f64,
    /// What it was provisioned with: the most it may have.
    pub provisioned: f64,
    /// Share of the last 10 s in which it went short (PSI some).
    pub stalled: f64,
}

/// What can be seen of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Seen {
    pub on: bool,
    pub cpu: Resource,
    /// Bytes.
    pub memory: Resource,
}

/// What a machine is to have; `None`: as it is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Target {
    pub cpu: Option<f64>,
    pub memory: Option<f64>,
}

/// What can be seen of the host.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct HostSeen {
    pub cores: f64,
    pub memory: f64,
    /// Share of the cores that idle.
    pub cpu_free: f64,
    /// Share of the memory that is given to nobody.
    pub memory_free: f64,
}

/// A contestant.
pub trait Policy {
    fn name(&self) -> String;
    /// Seconds between its looks at the host.
    fn loop_s(&self) -> u64;
    /// Whether it is also called within a second or two when a machine starts to go short.
    fn woken(&self) -> bool {
        false
    }
    /// A step of history of machine number `vm` as the host saw it, training part included.
    fn observe(&mut self, _vm: usize, _at_s: u64, _cpu: f64, _memory: f64) {}
    /// Decides; `targets` come empty, one a machine.
    fn decide(&mut self, now_s: u64, host: &HostSeen, seen: &[Seen], targets: &mut [Target]);
}

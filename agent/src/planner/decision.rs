//! Decisions, with the numbers they rest on.

use super::{Mode, Resource, VmId};
use serde::Serialize;
use std::fmt;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Raise,
    Lower,
    /// Something spoke for a change and something else against it.
    Hold,
    /// A change is needed and cannot be had, or only part of it.
    Refuse,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Use has come too near to what is allocated.
    Use,
    /// The forecast goes beyond what is allocated.
    Foreseen,
    /// Work waits.
    Pressure,
    /// The guest has killed something for want of memory.
    Oom,
    /// Less than the policy's minimum or what is reserved.
    Floor,
    /// More than the policy's maximum.
    Maximum,
    /// A whole window of less use.
    Idle,
    /// The host is short and others come first.
    Shortage,
    /// The last change or regret is not long enough ago.
    CoolDown,
    /// The policy says that this only grows.
    NeverLower,
    /// The measurement is too old.
    Stale,
    /// So many changes that the rest of the hour's are kept for raises.
    Changes,
    /// The last change had no effect.
    NoEffect,
    /// The last change is still under way.
    UnderWay,
    /// The machine lacks the means; see [`Decision::missing`].
    Unable,
}

/// What a decision was made from, in the resource's unit.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Numbers {
    /// In use at the last measurement.
    pub used: f64,
    /// Highest use of the window.
    pub window_peak: f64,
    /// What the forecast exceeds with the stated risk only.
    pub foreseen: Option<f64>,
    /// Least that it may have: policy and reservations.
    pub floor: f64,
    /// Most that it may have.
    pub cap: f64,
    /// What it should have, if there were enough.
    pub wanted: f64,
    /// On the host, given to nobody.
    pub free: f64,
    /// PSI some, avg10, 0 to 1.
    pub pressure: f64,
    /// Seconds until what is held back is tried again, where that is known.
    pub again_s: Option<u64>,
}

/// What is to become of a machine's resource.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decision {
    pub vm: VmId,
    pub resource: Resource,
    pub kind: Kind,
    pub reason: Reason,
    /// As read back.
    pub before: f64,
    /// The same as `before` for what is held or refused.
    pub to: f64,
    pub mode: Mode,
    pub numbers: Numbers,
    /// Has grown without pause for an hour; limited to its share while the host is short.
    pub runaway: bool,
    /// The means that it lacks.
    pub missing: Option<&'static str>,
}

impl fmt::Display for Decision {
    /// One line for people and the audit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let human = |amount: f64| self.resource.human(amount);
        let n = &self.numbers;
        let (before, to, used) = (human(self.before), human(self.to), human(n.used));
        match self.kind {
            Kind::Raise => write!(f, "{} from {before} to {to}: ", self.resource)?,
            Kind::Lower => write!(f, "{} from {before} down to {to}: ", self.resource)?,
            Kind::Hold => write!(f, "{} stays at {before}: ", self.resource)?,
            Kind::Refuse => write!(f, "{} stays at {before} instead of {}: ", self.resource, human(n.wanted))?,
        }
        match self.reason {
            Reason::Use => write!(f, "{used} in use")?,
            Reason::Foreseen => write!(f, "{} foreseen, {used} in use", human(n.foreseen.unwrap_or(0.0)))?,
            Reason::Pressure => write!(f, "work waits {:.0} % of the time, {used} in use", n.pressure * 100.0)?,
            Reason::Oom => write!(f, "the guest has run out of memory, {used} in use")?,
            Reason::Floor => write!(f, "minimum and reservations come to {}", human(n.floor))?,
            Reason::Maximum => write!(f, "at most {} by its policy", human(n.cap))?,
            Reason::Idle => write!(f, "at most {} used in the whole window", human(n.window_peak))?,
            Reason::Shortage => write!(f, "the host is short, {} free, others come first", human(n.free))?,
            Reason::CoolDown => write!(f, "too soon after the last change, {used} in use")?,
            Reason::NeverLower => write!(f, "never lowered by its policy, {used} in use")?,
            Reason::Stale => f.write_str("the last measurement is too old")?,
            Reason::Changes => f.write_str("too many changes within the hour")?,
            Reason::NoEffect => f.write_str("the last change had no effect")?,
            Reason::UnderWay => {
                write!(f, "the last change is still under way, {used} in use")?;
                if let Some(foreseen) = n.foreseen {
                    write!(f, ", {} foreseen", human(foreseen))?;
                }
            }
            Reason::Unable => f.write_str(self.missing.unwrap_or("the machine lacks the means"))?,
        }
        if let Some(again_s) = n.again_s.filter(|_| matches!(self.reason, Reason::Changes | Reason::NoEffect)) {
            write!(f, "; tried again in {again_s} s")?;
        }
        if self.kind == Kind::Raise && self.to >= n.cap && n.cap > 0.0 {
            f.write_str("; it can have no more")?;
        } else if self.kind == Kind::Raise && human(n.wanted) != to && n.wanted > self.to {
            write!(f, "; {} wanted, the host has {} free", human(n.wanted), human(n.free))?;
        }
        if self.runaway { f.write_str("; grows without pause") } else { Ok(()) }
    }
}

//! Numbers that libvirt keeps of a running VM: scheduler, block I/O, network.
//!
//! All are changed the same way: read, set, read again. What was set in part when libvirt reports an error is put back.

use std::ffi::CString;

use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use super::change::{DiskLimits, NetLimits, Setting};
use super::qdisc::Qdiscs;
use super::tunable::{Kind as Tuned, Number, Tunable, set_tunables, tunables};

/// tc, and so libvirt, counts a network's kilobytes in thousands of bytes.
const NET_UNIT: u64 = 1000;
/// The time over which a quota holds, in µs: libvirt's and the kernel's default.
const PERIOD_US: i128 = 100_000;
/// The kernel takes no quota below 1 ms.
const LEAST_QUOTA_US: i128 = 1000;

/// Why numbers were not changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TuneError {
    /// This driver or host does not have them.
    Unsupported(String),
    Failed {
        reason: String,
        left: String,
    },
}

/// The numbers before and after.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) before: Setting,
    pub(super) got: Setting,
}

/// Applies a setting that is a set of numbers.
pub(super) fn tune(domain: &Domain, to: &Setting) -> Result<Pair, TuneError> {
    let name =
        |name: &str| CString::new(name).map_err(|_| TuneError::Unsupported("its name has a NUL character".to_owned()));
    match to {
        Setting::Disk { target, .. } => set(domain, Tuned::Disk(&name(target)?), to),
        Setting::Network { device, .. } => {
            let before = Qdiscs::of(device);
            set(domain, Tuned::Interface(&name(device)?), to).map_err(|e| match (e, before.remove_new(device)) {
                (TuneError::Failed { reason, left }, Some(removed)) => {
                    TuneError::Failed { reason, left: format!("{left}; {removed}") }
                }
                (e, _) => e,
            })
        }
        Setting::DiskWeight(_) => set(domain, Tuned::BlockWeights, to),
        _ => set(domain, Tuned::Scheduler, to),
    }
}

fn set(domain: &Domain, kind: Tuned<'_>, to: &Setting) -> Result<Pair, TuneError> {
    let before = tunables(domain, kind).map_err(|e| unreadable(domain, &e))?;
    let wanted = wanted(&before, to).map_err(TuneError::Unsupported)?;
    let Err(error) = set_tunables(domain, kind, &wanted) else {
        let after = tunables(domain, kind).map_err(|e| TuneError::Failed {
            reason: format!("it was set but can't be read back: {}", e.message()),
            left: "it is not known how it is now".to_owned(),
        })?;
        return Ok(Pair { before: setting(&before, to), got: setting(&after, to) });
    };
    if is_unsupported(&error) {
        return Err(unsupported(&error));
    }
    let left = match tunables(domain, kind) {
        Ok(now) if same(&now, &before, &wanted) => "nothing was changed".to_owned(),
        _ => match set_tunables(domain, kind, &only(&before, &wanted)) {
            Ok(()) => "it was put back".to_owned(),
            Err(e) => format!("putting it back failed too: {}", e.message()),
        },
    };
    Err(TuneError::Failed { reason: error.message().trim_end().to_owned(), left })
}

fn is_unsupported(error: &Error) -> bool {
    matches!(error.code(), ErrorNumber::NoSupport | ErrorNumber::ArgumentUnsupported | ErrorNumber::ConfigUnsupported)
}

fn unsupported(error: &Error) -> TuneError {
    TuneError::Unsupported(error.message().to_owned())
}

/// What can't even be read of a running VM is not there: no such control group, no such driver function.
fn unreadable(domain: &Domain, error: &Error) -> TuneError {
    match domain.is_active() {
        Ok(true) => unsupported(error),
        _ => TuneError::Failed { reason: error.message().to_owned(), left: "it does not run any more".to_owned() },
    }
}

/// Those of `numbers` that `names` has.
fn only(numbers: &[Tunable], names: &[Tunable]) -> Vec<Tunable> {
    numbers.iter().filter(|n| names.iter().any(|w| w.name == n.name)).cloned().collect()
}

fn same(a: &[Tunable], b: &[Tunable], names: &[Tunable]) -> bool {
    only(a, names) == only(b, names)
}

fn find(numbers: &[Tunable], name: &str) -> Option<Number> {
    numbers.iter().find(|t| t.name == name).map(|t| t.number)
}

/// The names of a disk's limits, and their fields.
fn disk_fields(l: &DiskLimits) -> [(&'static str, Option<u64>); 6] {
    [
        ("total_bytes_sec", l.total_bps),
        ("read_bytes_sec", l.read_bps),
        ("write_bytes_sec", l.write_bps),
        ("total_iops_sec", l.total_ops),
        ("read_iops_sec", l.read_ops),
        ("write_iops_sec", l.write_ops),
    ]
}

/// What is to be set, in the types of what is there.
fn wanted(before: &[Tunable], to: &Setting) -> Result<Vec<Tunable>, String> {
    let number = |name: &str, value: i128| match find(before, name) {
        Some(number) => Ok(Tunable { name: name.to_owned(), number: number.with(value) }),
        None => {
            let has: Vec<_> = before.iter().map(|t| t.name.as_str()).collect();
            Err(format!(
                "this driver has no {name}; it has {}",
                if has.is_empty() { "none".into() } else { has.join(", ") }
            ))
        }
    };
    match to {
        Setting::CpuWeight(shares) => Ok(vec![number("cpu_shares", i128::from(*shares))?]),
        Setting::CpuQuota(cores) => {
            // The VM's own limit where libvirt has one; the limit of each vCPU has no meaning in cores of the VM.
            let period = find(before, "global_period").map_or(PERIOD_US, Number::value);
            let period = if period > 0 { period } else { PERIOD_US };
            let quota = match cores {
                Some(cores) => ((cores.max(0.0) * period as f64).round() as i128).max(LEAST_QUOTA_US),
                None => -1,
            };
            Ok(vec![number("global_period", period)?, number("global_quota", quota)?])
        }
        Setting::DiskWeight(weight) => Ok(vec![number("weight", i128::from(*weight))?]),
        Setting::Disk { limits, .. } => {
            disk_fields(limits).into_iter().map(|(name, limit)| number(name, limit.unwrap_or(0).into())).collect()
        }
        Setting::Network { limits, .. } => {
            // Both directions, with what else they have: before libvirt 12.4 what was not named was cleared.
            let mut all: Vec<Tunable> = before.to_vec();
            for (direction, limit) in [("inbound", limits.received_bps), ("outbound", limits.sent_bps)] {
                let average = format!("{direction}.average");
                let value = limit.map_or(0, |bps| bps.div_ceil(NET_UNIT).max(1));
                let number = number(&average, value.into())?;
                for tunable in all.iter_mut().filter(|t| t.name.starts_with(direction)) {
                    if tunable.name == average {
                        tunable.number = number.number;
                    } else if value == 0 {
                        // A peak without an average is refused.
                        tunable.number = tunable.number.with(0);
                    }
                }
            }
            Ok(all)
        }
        _ => Err("it is not a number that libvirt keeps".to_owned()),
    }
}

/// The setting that these numbers are.
fn setting(numbers: &[Tunable], like: &Setting) -> Setting {
    let value = |name: &str| find(numbers, name).map_or(0, Number::value);
    let limit = |name: &str| u64::try_from(value(name)).ok().filter(|&v| v > 0);
    match like {
        Setting::CpuWeight(_) => Setting::CpuWeight(limit("cpu_shares").unwrap_or(0)),
        Setting::CpuQuota(_) => {
            let (quota, period) = (value("global_quota"), value("global_period"));
            Setting::CpuQuota((quota > 0 && period > 0).then(|| quota as f64 / period as f64))
        }
        Setting::DiskWeight(_) => Setting::DiskWeight(limit("weight").and_then(|w| w.try_into().ok()).unwrap_or(0)),
        Setting::Disk { target, .. } => Setting::Disk {
            target: target.clone(),
            limits: DiskLimits {
                total_bps: limit("total_bytes_sec"),
                read_bps: limit("read_bytes_sec"),
                write_bps: limit("write_bytes_sec"),
                total_ops: limit("total_iops_sec"),
                read_ops: limit("read_iops_sec"),
                write_ops: limit("write_iops_sec"),
            },
        },
        Setting::Network { device, .. } => {
            let rate = |name: &str| limit(name).map(|units| units.saturating_mul(NET_UNIT));
            Setting::Network {
                device: device.clone(),
                limits: NetLimits { received_bps: rate("inbound.average"), sent_bps: rate("outbound.average") },
            }
        }
        other => other.clone(),
    }
}

/// Whether `got` is what was asked for, but for rounding.
pub(super) fn reached(asked: &Setting, got: &Setting) -> bool {
    match (asked, got) {
        (Setting::CpuQuota(Some(a)), Setting::CpuQuota(Some(b))) => (a - b).abs() <= 0.011,
        (Setting::Network { limits: a, .. }, Setting::Network { limits: b, .. }) => {
            let near = |a: Option<u64>, b: Option<u64>| match (a, b) {
                (Some(a), Some(b)) => b >= a && b - a <= NET_UNIT,
                (a, b) => a == b,
            };
            near(a.received_bps, b.received_bps) && near(a.sent_bps, b.sent_bps)
        }
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(list: &[(&str, Number)]) -> Vec<Tunable> {
        list.iter().map(|&(name, number)| Tunable { name: name.to_owned(), number }).collect()
    }

    #[test]
    fn a_quota_is_of_the_whole_vm_and_keeps_its_period() {
        let before = numbers(&[
            ("cpu_shares", Number::Ulong(100)),
            ("vcpu_quota", Number::Long(-1)),
            ("global_period", Number::Ulong(50_000)),
            ("global_quota", Number::Long(-1)),
        ]);
        let set = wanted(&before, &Setting::CpuQuota(Some(1.5))).unwrap();
        assert_eq!(set, numbers(&[("global_period", Number::Ulong(50_000)), ("global_quota", Number::Long(75_000))]));
        assert_eq!(setting(&set, &Setting::CpuQuota(None)), Setting::CpuQuota(Some(1.5)));
        let none = wanted(&before, &Setting::CpuQuota(None)).unwrap();
        assert_eq!(none[1].number, Number::Long(-1));
        assert_eq!(setting(&none, &Setting::CpuQuota(None)), Setting::CpuQuota(None));
        let tiny = wanted(&before, &Setting::CpuQuota(Some(0.0))).unwrap();
        assert_eq!(tiny[1].number, Number::Long(1000), "a quota of nothing would stop the VM");
        let other = numbers(&[("weight", Number::Uint(50))]);
        assert_eq!(wanted(&other, &Setting::CpuWeight(7)).unwrap_err(), "this driver has no cpu_shares; it has weight");
    }

    #[test]
    fn network_limits_leave_the_other_direction_as_it_is() {
        let before = numbers(&[
            ("inbound.average", Number::Uint(9)),
            ("inbound.peak", Number::Uint(20)),
            ("outbound.average", Number::Uint(5)),
            ("outbound.peak", Number::Uint(10)),
        ]);
        let limits = NetLimits { received_bps: None, sent_bps: Some(7500) };
        let to = Setting::Network { device: "vnet0".into(), limits };
        let set = wanted(&before, &to).unwrap();
        let values: Vec<_> = set.iter().map(|t| t.number.value()).collect();
        assert_eq!(values, [0, 0, 8, 10]);
        let got = setting(&set, &to);
        assert_eq!(
            got,
            Setting::Network { device: "vnet0".into(), limits: NetLimits { received_bps: None, sent_bps: Some(8000) } }
        );
        assert!(reached(&to, &got), "rounded up to what libvirt counts in");
    }

    #[test]
    fn disk_limits_are_all_named_so_that_old_ones_go() {
        let names: Vec<_> = disk_fields(&DiskLimits::default()).iter().map(|f| (f.0, Number::Ulong(3))).collect();
        let limits = DiskLimits { total_bps: Some(1 << 20), ..DiskLimits::default() };
        let to = Setting::Disk { target: "vda".into(), limits };
        let set = wanted(&numbers(&names), &to).unwrap();
        let values: Vec<_> = set.iter().map(|t| t.number.value()).collect();
        assert_eq!(values, [1 << 20, 0, 0, 0, 0, 0]);
        assert_eq!(setting(&set, &to), to);
    }
}

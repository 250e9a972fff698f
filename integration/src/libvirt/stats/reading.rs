//! One VM's figures as libvirt has them, by the names of `virConnectGetAllDomainStats`
//! (<https://libvirt.org/html/libvirt-libvirt-domain.html#virConnectGetAllDomainStats>). libvirt counts memory in KiB and
//! time in ns; here memory is in bytes.

use virt::sys;

use crate::libvirt::raw::Value;

/// What is asked for.
pub(super) const GROUPS: u32 = sys::VIR_DOMAIN_STATS_STATE
    | sys::VIR_DOMAIN_STATS_CPU_TOTAL
    | sys::VIR_DOMAIN_STATS_BALLOON
    | sys::VIR_DOMAIN_STATS_VCPU
    | sys::VIR_DOMAIN_STATS_INTERFACE
    | sys::VIR_DOMAIN_STATS_BLOCK;

/// More devices than a VM can have: what a damaged index may make this allocate.
const MOST_DEVICES: usize = 4096;

/// Counters and levels of one VM at one time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reading {
    /// `virDomainState`.
    pub state: Option<u32>,
    pub cpu: Cpu,
    pub memory: Memory,
    pub blocks: Vec<Block>,
    pub nets: Vec<Net>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Cpu {
    /// Time of the VM's process, ns.
    pub total_ns: Option<u64>,
    pub current: Option<u32>,
    pub maximum: Option<u32>,
    /// Sums over all vCPUs, ns.
    pub vcpu_ns: Option<u64>,
    pub delay_ns: Option<u64>,
    pub wait_ns: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Memory {
    pub current_bytes: Option<u64>,
    pub maximum_bytes: Option<u64>,
    pub resident_bytes: Option<u64>,
    pub guest: Guest,
}

/// What the balloon driver last said; fields it does not know are missing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Guest {
    pub total_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
    pub available_bytes: Option<u64>,
    pub cache_bytes: Option<u64>,
    pub swap_in_bytes: Option<u64>,
    pub swap_out_bytes: Option<u64>,
    pub major_faults: Option<u64>,
    /// Seconds since 1970, by the host's clock; 0: never.
    pub updated_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Block {
    pub target: String,
    pub read_bytes: Option<u64>,
    pub write_bytes: Option<u64>,
    pub reads: Option<u64>,
    pub writes: Option<u64>,
    pub flushes: Option<u64>,
    /// Time that requests waited, of all kinds, ns.
    pub wait_ns: u64,
    pub capacity_bytes: Option<u64>,
    pub allocation_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Net {
    pub device: String,
    /// Received by the guest.
    pub received_bytes: Option<u64>,
    pub sent_bytes: Option<u64>,
    pub received_packets: u64,
    pub sent_packets: u64,
    pub dropped_packets: u64,
}

impl Reading {
    /// Takes one parameter; those of no use are left alone.
    pub(super) fn take(&mut self, name: &str, value: Value<'_>) {
        let Some((group, rest)) = name.split_once('.') else { return };
        match group {
            "state" if rest == "state" => self.state = value.count().and_then(|v| v.try_into().ok()),
            "cpu" if rest == "time" => self.cpu.total_ns = value.count(),
            "vcpu" => self.cpu.take(rest, value),
            "balloon" => self.memory.take(rest, value),
            "block" => {
                if let Some((block, rest)) = device(&mut self.blocks, rest) {
                    block.take(rest, value);
                }
            }
            "net" => {
                if let Some((net, rest)) = device(&mut self.nets, rest) {
                    net.take(rest, value);
                }
            }
            _ => {}
        }
    }
}

/// `3.rd.bytes` → the third device and `rd.bytes`.
fn device<'d, 't, D: Default + Clone>(devices: &'d mut Vec<D>, text: &'t str) -> Option<(&'d mut D, &'t str)> {
    let (index, rest) = text.split_once('.')?;
    let index: usize = index.parse().ok().filter(|&i| i < MOST_DEVICES)?;
    if devices.len() <= index {
        devices.resize(index + 1, D::default());
    }
    devices.get_mut(index).map(|device| (device, rest))
}

fn add(sum: &mut Option<u64>, value: Value<'_>) {
    if let Some(value) = value.count() {
        *sum = Some(sum.unwrap_or(0).saturating_add(value));
    }
}

impl Cpu {
    fn take(&mut self, rest: &str, value: Value<'_>) {
        let small = || value.count().and_then(|v| v.try_into().ok());
        match rest {
            "current" => self.current = small(),
            "maximum" => self.maximum = small(),
            _ => match rest.split_once('.') {
                Some((_, "time")) => add(&mut self.vcpu_ns, value),
                Some((_, "delay")) => add(&mut self.delay_ns, value),
                Some((_, "wait")) => add(&mut self.wait_ns, value),
                _ => {}
            },
        }
    }
}

impl Memory {
    fn take(&mut self, rest: &str, value: Value<'_>) {
        let bytes = || value.count().map(|kib| kib.saturating_mul(1024));
        match rest {
            "current" => self.current_bytes = bytes(),
            "maximum" => self.maximum_bytes = bytes(),
            "rss" => self.resident_bytes = bytes(),
            "available" => self.guest.total_bytes = bytes(),
            "unused" => self.guest.free_bytes = bytes(),
            "usable" => self.guest.available_bytes = bytes(),
            "disk_caches" => self.guest.cache_bytes = bytes(),
            "swap_in" => self.guest.swap_in_bytes = bytes(),
            "swap_out" => self.guest.swap_out_bytes = bytes(),
            "major_fault" => self.guest.major_faults = value.count(),
            "last-update" => self.guest.updated_s = value.count(),
            _ => {}
        }
    }
}

impl Block {
    fn take(&mut self, rest: &str, value: Value<'_>) {
        match rest {
            "name" => self.target = text(value),
            "rd.bytes" => self.read_bytes = value.count(),
            "wr.bytes" => self.write_bytes = value.count(),
            "rd.reqs" => self.reads = value.count(),
            "wr.reqs" => self.writes = value.count(),
            "fl.reqs" => self.flushes = value.count(),
            "rd.times" | "wr.times" | "fl.times" => {
                self.wait_ns = self.wait_ns.saturating_add(value.count().unwrap_or(0));
            }
            "capacity" => self.capacity_bytes = value.count(),
            "allocation" => self.allocation_bytes = value.count(),
            _ => {}
        }
    }
}

impl Net {
    fn take(&mut self, rest: &str, value: Value<'_>) {
        let count = || value.count().unwrap_or(0);
        match rest {
            "name" => self.device = text(value),
            "rx.bytes" => self.received_bytes = value.count(),
            "tx.bytes" => self.sent_bytes = value.count(),
            "rx.pkts" => self.received_packets = count(),
            "tx.pkts" => self.sent_packets = count(),
            "rx.drop" | "tx.drop" => self.dropped_packets = self.dropped_packets.saturating_add(count()),
            _ => {}
        }
    }
}

fn text(value: Value<'_>) -> String {
    match value {
        Value::Text(text) => text.to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_qemu_are_read() {
        let mut reading = Reading::default();
        for (name, value) in [
            ("state.state", Value::Int(1)),
            ("cpu.time", Value::Ulong(9)),
            ("vcpu.current", Value::Uint(2)),
            ("vcpu.maximum", Value::Uint(4)),
            ("vcpu.0.time", Value::Ulong(3)),
            ("vcpu.1.time", Value::Ulong(4)),
            ("vcpu.1.delay", Value::Ulong(5)),
            ("balloon.current", Value::Ulong(2)),
            ("balloon.usable", Value::Ulong(1)),
            ("balloon.last-update", Value::Ulong(77)),
            ("block.count", Value::Uint(1)),
            ("block.1.name", Value::Text("vdb")),
            ("block.1.rd.bytes", Value::Ulong(6)),
            ("block.1.rd.times", Value::Ulong(7)),
            ("block.1.wr.times", Value::Ulong(1)),
            ("net.0.name", Value::Text("vnet0")),
            ("net.0.rx.drop", Value::Ulong(8)),
            ("net.99999999.rx.drop", Value::Ulong(8)),
            ("perf.cmt", Value::Double(1.0)),
            ("nonsense", Value::Bool(true)),
        ] {
            reading.take(name, value);
        }
        assert_eq!(reading.state, Some(1));
        assert_eq!((reading.cpu.total_ns, reading.cpu.vcpu_ns, reading.cpu.delay_ns), (Some(9), Some(7), Some(5)));
        assert_eq!((reading.cpu.current, reading.cpu.maximum), (Some(2), Some(4)));
        assert_eq!((reading.memory.current_bytes, reading.memory.guest.available_bytes), (Some(2048), Some(1024)));
        assert_eq!(reading.memory.guest.updated_s, Some(77));
        assert_eq!(reading.blocks.len(), 2);
        assert_eq!((reading.blocks[1].target.as_str(), reading.blocks[1].read_bytes), ("vdb", Some(6)));
        assert_eq!(reading.blocks[1].wait_ns, 8);
        assert_eq!((reading.nets.len(), reading.nets[0].dropped_packets), (1, 8));
    }
}

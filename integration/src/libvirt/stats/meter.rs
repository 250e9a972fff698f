//! Readings → samples.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::reading::{Block, Cpu, Guest, Net, Reading};
use super::sample::{CpuSample, DiskRates, DiskSample, GuestMemory, MemorySample, NetRates, NetSample, VmSample};
use crate::libvirt::hypervisor::state_of;
use crate::libvirt::vm::VmId;

/// Two readings closer than this give no rate: the clock's own error would be too large a part of it.
const SHORTEST: Duration = Duration::from_millis(10);

/// Remembers the last reading of each VM. Time is passed in.
///
/// Where a group of figures is missing, because the hypervisor was busy, the one before stays, and the next rate is the mean
/// over both turns.
#[derive(Debug, Default)]
pub struct Meter {
    last: HashMap<Uuid, Last>,
}

#[derive(Debug)]
struct Last {
    instance: u32,
    cpu: (Instant, Cpu),
    blocks: (Instant, Vec<Block>),
    nets: (Instant, Vec<Net>),
    guest: Guest,
    swapping: Swapping,
}

/// Rates by the guest's own figures, which are only as recent as its last word.
#[derive(Debug, Default, Clone, Copy)]
struct Swapping {
    swapped_in_bps: Option<f64>,
    swapped_out_bps: Option<f64>,
    major_faults: Option<f64>,
}

impl Meter {
    /// One turn. VMs that are not among the readings are forgotten. `at` and `at_us` are the same moment, by a steady clock
    /// and in µs since 1970.
    pub fn turn(&mut self, at: Instant, at_us: u64, readings: Vec<(VmId, u32, Reading)>) -> Vec<VmSample> {
        let mut old = std::mem::take(&mut self.last);
        let mut samples = Vec::with_capacity(readings.len());
        for (vm, instance, reading) in readings {
            let before = old.remove(&vm.uuid).filter(|last| last.instance == instance);
            let (sample, last) = turn_one(at, at_us, vm, instance, reading, before);
            self.last.insert(sample.vm.uuid, last);
            samples.push(sample);
        }
        samples
    }
}

fn turn_one(
    at: Instant,
    at_us: u64,
    vm: VmId,
    instance: u32,
    reading: Reading,
    before: Option<Last>,
) -> (VmSample, Last) {
    let elapsed = |since: Instant| {
        let elapsed = at.saturating_duration_since(since);
        (elapsed >= SHORTEST).then_some(elapsed.as_secs_f64())
    };
    let swapping = match &before {
        Some(last) => swapping(&last.guest, &reading.memory.guest, last.swapping),
        None => Swapping::default(),
    };
    let cpu = cpu(&reading.cpu, before.as_ref().and_then(|l| Some((elapsed(l.cpu.0)?, &l.cpu.1))));
    let disks = disks(&reading.blocks, before.as_ref().and_then(|l| Some((elapsed(l.blocks.0)?, &*l.blocks.1))));
    let nets = nets(&reading.nets, before.as_ref().and_then(|l| Some((elapsed(l.nets.0)?, &*l.nets.1))));
    let guest = &reading.memory.guest;
    let memory = MemorySample {
        maximum_bytes: reading.memory.maximum_bytes,
        current_bytes: reading.memory.current_bytes,
        resident_bytes: reading.memory.resident_bytes,
        guest: guest_memory(guest, at_us, swapping),
        period: None,
    };
    let guest = if guest.updated_s.is_some() { *guest } else { before.as_ref().map_or(*guest, |l| l.guest) };
    let (old_cpu, old_blocks, old_nets) = match before {
        Some(last) => (Some(last.cpu), Some(last.blocks), Some(last.nets)),
        None => (None, None, None),
    };
    let kept_cpu = old_cpu.filter(|_| reading.cpu.vcpu_ns.is_none() && reading.cpu.total_ns.is_none());
    let kept_blocks = old_blocks.filter(|_| reading.blocks.iter().all(|b| b.reads.is_none()));
    let kept_nets = old_nets.filter(|_| reading.nets.iter().all(|n| n.received_bytes.is_none()));
    let state = state_of(reading.state.unwrap_or(u32::MAX));
    let sample = VmSample { vm, instance, at_us, state, cpu, memory, disks, nets, pressure: None };
    let last = Last {
        instance,
        cpu: kept_cpu.unwrap_or((at, reading.cpu)),
        blocks: kept_blocks.unwrap_or((at, reading.blocks)),
        nets: kept_nets.unwrap_or((at, reading.nets)),
        guest,
        swapping,
    };
    (sample, last)
}

/// What a counter grew by; `None` if it is unknown or was reset.
fn grown(before: Option<u64>, now: Option<u64>) -> Option<f64> {
    now?.checked_sub(before?).map(|growth| growth as f64)
}

fn cpu(now: &Cpu, before: Option<(f64, &Cpu)>) -> CpuSample {
    let cores = |of: fn(&Cpu) -> Option<u64>| {
        let (seconds, before) = before?;
        Some(grown(of(before), of(now))? / 1e9 / seconds)
    };
    CpuSample {
        vcpus: now.current,
        vcpus_max: now.maximum,
        used_cores: cores(|c| c.vcpu_ns),
        total_cores: cores(|c| c.total_ns),
        delayed_cores: cores(|c| c.delay_ns),
        waiting_cores: cores(|c| c.wait_ns),
    }
}

fn disks(now: &[Block], before: Option<(f64, &[Block])>) -> Vec<DiskSample> {
    let rates = |now: &Block| {
        let (seconds, before) = before?;
        let before = before.iter().find(|b| b.target == now.target)?;
        let rate = |of: fn(&Block) -> Option<u64>| Some(grown(of(before), of(now))? / seconds);
        Some(DiskRates {
            read_bps: rate(|b| b.read_bytes)?,
            write_bps: rate(|b| b.write_bytes)?,
            read_ops: rate(|b| b.reads)?,
            write_ops: rate(|b| b.writes)?,
            flush_ops: rate(|b| b.flushes).unwrap_or(0.0),
            under_way: rate(|b| Some(b.wait_ns)).unwrap_or(0.0) / 1e9,
        })
    };
    let sample = |block: &Block| DiskSample {
        target: block.target.clone(),
        rates: rates(block),
        capacity_bytes: block.capacity_bytes,
        allocation_bytes: block.allocation_bytes,
    };
    now.iter().filter(|b| !b.target.is_empty()).map(sample).collect()
}

fn nets(now: &[Net], before: Option<(f64, &[Net])>) -> Vec<NetSample> {
    let rates = |now: &Net| {
        let (seconds, before) = before?;
        let before = before.iter().find(|n| n.device == now.device)?;
        let rate = |of: fn(&Net) -> Option<u64>| Some(grown(of(before), of(now))? / seconds);
        Some(NetRates {
            received_bps: rate(|n| n.received_bytes)?,
            sent_bps: rate(|n| n.sent_bytes)?,
            received_packets: rate(|n| Some(n.received_packets))?,
            sent_packets: rate(|n| Some(n.sent_packets))?,
            dropped_packets: rate(|n| Some(n.dropped_packets))?,
        })
    };
    let sample = |net: &Net| NetSample { device: net.device.clone(), rates: rates(net) };
    now.iter().filter(|n| !n.device.is_empty()).map(sample).collect()
}

/// The rates between two words of the guest; without a new word those of before.
fn swapping(before: &Guest, now: &Guest, last: Swapping) -> Swapping {
    let (Some(from), Some(to)) = (before.updated_s, now.updated_s) else { return last };
    if to == from {
        return last;
    }
    if to < from {
        // The clock was set back, or the guest was put back to an earlier state.
        return Swapping::default();
    }
    let seconds = (to - from) as f64;
    let rate = |of: fn(&Guest) -> Option<u64>| Some(grown(of(before), of(now))? / seconds);
    Swapping {
        swapped_in_bps: rate(|g| g.swap_in_bytes),
        swapped_out_bps: rate(|g| g.swap_out_bytes),
        major_faults: rate(|g| g.major_faults),
    }
}

/// What the guest says, if it ever said something.
pub(in crate::libvirt) fn guest_memory_of(guest: &Guest, at_us: u64) -> Option<GuestMemory> {
    guest_memory(guest, at_us, Swapping::default())
}

fn guest_memory(guest: &Guest, at_us: u64, swapping: Swapping) -> Option<GuestMemory> {
    let updated_us = guest.updated_s.filter(|&s| s > 0)?.saturating_mul(1_000_000);
    Some(GuestMemory {
        total_bytes: guest.total_bytes?,
        free_bytes: guest.free_bytes?,
        available_bytes: guest.available_bytes,
        cache_bytes: guest.cache_bytes,
        swap_in_bps: swapping.swapped_in_bps,
        swap_out_bps: swapping.swapped_out_bps,
        major_faults: swapping.major_faults,
        // A word from the future is from before the clock was set back: nobody knows how old it is, and it is not new.
        age: Duration::from_micros(at_us.abs_diff(updated_us)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(vcpu_s: u64, read_bytes: Option<u64>) -> Reading {
        let block = Block {
            target: "vda".into(),
            read_bytes,
            write_bytes: read_bytes,
            reads: read_bytes,
            writes: read_bytes,
            ..Block::default()
        };
        let cpu = Cpu { vcpu_ns: Some(vcpu_s * 1_000_000_000), current: Some(2), ..Cpu::default() };
        Reading { state: Some(1), cpu, blocks: vec![block], ..Reading::default() }
    }

    fn vm() -> VmId {
        VmId { uuid: Uuid::from_u128(1), name: "a".into() }
    }

    /// A turn `seconds` after the start.
    fn turn(meter: &mut Meter, start: Instant, seconds: u64, instance: u32, reading: Reading) -> VmSample {
        let at = start + Duration::from_secs(seconds);
        meter.turn(at, 1_000_000 * (1000 + seconds), vec![(vm(), instance, reading)]).remove(0)
    }

    #[test]
    fn rates_need_two_turns_of_one_instance() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let first = turn(&mut meter, start, 0, 1, reading(10, Some(0)));
        assert_eq!((first.cpu.used_cores, first.disk_bps(), first.cpu.vcpus), (None, None, Some(2)));
        let second = turn(&mut meter, start, 2, 1, reading(13, Some(4096)));
        assert_eq!((second.cpu.used_cores, second.disk_bps()), (Some(1.5), Some(4096.0)));
        assert_eq!(second.net_bps(), None, "no interface, no rate");
        let restarted = turn(&mut meter, start, 3, 2, reading(14, Some(8192)));
        assert_eq!((restarted.cpu.used_cores, restarted.disk_bps()), (None, None));
        let reset = turn(&mut meter, start, 4, 2, reading(1, Some(0)));
        assert_eq!((reset.cpu.used_cores, reset.disk_bps()), (None, None), "a counter that fell gives no rate");
        let after = turn(&mut meter, start, 5, 2, reading(2, Some(10)));
        assert_eq!((after.cpu.used_cores, after.disk_bps()), (Some(1.0), Some(20.0)));
    }

    #[test]
    fn a_busy_hypervisor_makes_the_next_rate_a_longer_mean() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        turn(&mut meter, start, 0, 1, reading(0, Some(0)));
        let busy = Reading { blocks: vec![], cpu: reading(1, None).cpu, ..Reading::default() };
        let sample = turn(&mut meter, start, 1, 1, busy);
        assert_eq!((sample.cpu.used_cores, sample.disk_bps()), (Some(1.0), None));
        let sample = turn(&mut meter, start, 2, 1, reading(3, Some(1000)));
        assert_eq!((sample.cpu.used_cores, sample.disk_bps()), (Some(2.0), Some(1000.0)));
    }

    #[test]
    fn a_word_from_before_the_clock_was_set_back_is_old() {
        let said = |updated_s| Guest {
            total_bytes: Some(u64::MAX),
            free_bytes: Some(0),
            swap_in_bytes: Some(u64::MAX),
            updated_s: Some(updated_s),
            ..Guest::default()
        };
        let hour = guest_memory_of(&said(7200), 3_600_000_000).unwrap();
        assert!(!hour.is_fresh(Duration::from_secs(2)) && hour.age == Duration::from_secs(3600));
        assert_eq!(hour.used_bytes(), u64::MAX);
        let second = guest_memory_of(&said(3601), 3_600_000_000).unwrap();
        assert!(second.is_fresh(Duration::from_secs(1)), "stamps are rounded");
        assert!(!guest_memory_of(&said(u64::MAX), 0).unwrap().is_fresh(Duration::from_secs(9)));
        let before = Swapping { swapped_in_bps: Some(9.0), ..Swapping::default() };
        assert_eq!(swapping(&said(7200), &said(3600), before).swapped_in_bps, None);
        assert_eq!(swapping(&said(7200), &said(7200), before).swapped_in_bps, Some(9.0));
    }

    #[test]
    fn what_the_guest_says_has_an_age_and_its_own_pace() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let said = |updated_s, swap_in| {
            let mut reading = reading(0, None);
            reading.memory.guest = Guest {
                total_bytes: Some(1000),
                free_bytes: Some(100),
                available_bytes: Some(400),
                swap_in_bytes: Some(swap_in),
                updated_s: Some(updated_s),
                ..Guest::default()
            };
            reading
        };
        assert_eq!(turn(&mut meter, start, 0, 1, said(0, 0)).memory.guest, None, "it has never said anything");
        turn(&mut meter, start, 1, 1, said(1000, 0));
        let guest = turn(&mut meter, start, 6, 1, said(1005, 50)).memory.guest.unwrap();
        assert_eq!((guest.swap_in_bps, guest.age), (Some(10.0), Duration::from_secs(1)));
        assert_eq!((guest.used_bytes(), guest.spare_bytes()), (600, 400));
        let silent = turn(&mut meter, start, 21, 1, said(1005, 50)).memory.guest.unwrap();
        assert_eq!((silent.swap_in_bps, silent.age), (Some(10.0), Duration::from_secs(16)));
        assert!(silent.is_fresh(Duration::from_secs(6)) && !silent.is_fresh(Duration::from_secs(5)));
    }
}

//! What is measured: requests, and who answers them.

use super::load::{Job, Op, Order};
use super::servers::Who;

pub(super) const HIT_QD1: &str = "RAM hit, read 4 KiB, QD1";
pub(super) const HIT_QD32: &str = "RAM hit, read 4 KiB, QD32";
pub(super) const HIT_SEQUENTIAL: &str = "RAM hit, read 128 KiB sequential, QD8";
pub(super) const NBD_QD1: &str = "NBD, read 4 KiB, QD1";
pub(super) const NBD_QD32: &str = "NBD, read 4 KiB, QD32";
pub(super) const NBD_SEQUENTIAL: &str = "NBD, read 128 KiB sequential, QD8";
pub(super) const MISS_QD1: &str = "miss, read 4 KiB, QD1";
pub(super) const MISS_QD32: &str = "miss, read 4 KiB, QD32";
pub(super) const WRITE_QD1: &str = "write-through 4 KiB, QD1";
pub(super) const WRITE_QD32: &str = "write-through 4 KiB, QD32";

/// Those in which this project's daemon must answer from RAM.
pub(super) const ALL_HITS: [&str; 6] = [HIT_QD1, HIT_QD32, HIT_SEQUENTIAL, NBD_QD1, NBD_QD32, NBD_SEQUENTIAL];
/// By the number of disks that are exported.
pub(super) const ALL_SCALES: [&str; 4] =
    ["64 clients, 1 disk", "64 clients, 10 disks", "64 clients, 100 disks", "64 clients, 300 disks"];

/// Requests of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) job: Job,
}

/// The cases of one kind of serving.
#[derive(Debug)]
pub(super) struct Suite {
    pub(super) servers: &'static [Who],
    /// Past every cache.
    pub(super) direct: bool,
    pub(super) cases: Vec<Case>,
}

fn case(name: &'static str, op: Op, order: Order, block_bytes: usize, depth: usize, span_bytes: u64) -> Case {
    Case { name, job: Job { op, order, block_bytes, depth, start_bytes: 0, span_bytes, check: true } }
}

const SMALL: usize = 4 << 10;
const LARGE: usize = 128 << 10;

/// Reads of what is in RAM, over vhost-user-blk.
pub(super) fn hits(span_bytes: u64) -> Suite {
    let cases = vec![
        case(HIT_QD1, Op::Read, Order::Random, SMALL, 1, span_bytes),
        case(HIT_QD32, Op::Read, Order::Random, SMALL, 32, span_bytes),
        case(HIT_SEQUENTIAL, Op::Read, Order::Sequential, LARGE, 8, span_bytes),
    ];
    Suite { servers: &[Who::Prestaged, Who::Qsd, Who::QsdTuned, Who::Ceiling], direct: false, cases }
}

/// The same over NBD.
pub(super) fn nbd(span_bytes: u64) -> Suite {
    let cases = vec![
        case(NBD_QD1, Op::Read, Order::Random, SMALL, 1, span_bytes),
        case(NBD_QD32, Op::Read, Order::Random, SMALL, 32, span_bytes),
        case(NBD_SEQUENTIAL, Op::Read, Order::Sequential, LARGE, 8, span_bytes),
    ];
    Suite { servers: &[Who::PrestagedNbd, Who::Nbdkit, Who::QemuNbd, Who::CeilingNbd], direct: false, cases }
}

/// Reads of what is in no cache, and writes. Each have a half of the disk: what is read is as it was made, in every round.
pub(super) fn direct(size_bytes: u64) -> Suite {
    let half = size_bytes / 2;
    let mut cases = vec![
        case(MISS_QD1, Op::Read, Order::Random, SMALL, 1, half),
        case(MISS_QD32, Op::Read, Order::Random, SMALL, 32, half),
        case(WRITE_QD1, Op::Write, Order::Random, SMALL, 1, half),
        case(WRITE_QD32, Op::Write, Order::Random, SMALL, 32, half),
    ];
    cases.iter_mut().filter(|case| case.job.op == Op::Write).for_each(|case| case.job.start_bytes = half);
    Suite { servers: &[Who::Prestaged, Who::Qsd, Who::QsdTuned], direct: true, cases }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_that_another_case_writes() {
        let Suite { cases, .. } = direct(1 << 30);
        let part = |job: &Job| job.start_bytes..job.start_bytes + job.span_bytes;
        let (writes, reads): (Vec<&Case>, Vec<&Case>) = cases.iter().partition(|case| case.job.op == Op::Write);
        assert!(!writes.is_empty() && !reads.is_empty());
        for (write, read) in
            writes.iter().flat_map(|write| reads.iter().map(move |read| (part(&write.job), part(&read.job))))
        {
            assert!(write.end <= read.start || read.end <= write.start, "{write:?} and {read:?}");
        }
    }
}

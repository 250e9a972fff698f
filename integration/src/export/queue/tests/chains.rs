//! Random descriptor chains, mostly valid, against a parser that works byte by byte.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::export::ByteRange;

const SIZE: u16 = 32;
const CAPACITY: u64 = 1 << 20;
/// Few, so that chains reach it.
const SEG_MAX: u32 = 6;
/// Where indirect tables go.
const TABLE: u64 = LOW + 0x8000;

#[derive(Debug, Clone)]
struct Plan {
    kind: u32,
    sector: u64,
    readable: usize,
    writable: usize,
    payload: Vec<(u64, u32, u32)>,
    cuts: (Vec<Index>, Vec<Index>),
    places: Vec<(u8, u16)>,
    /// Descriptors in the ring; the rest goes to an indirect table.
    direct: Index,
    ring_order: Vec<u16>,
    table_order: Vec<u16>,
    harm: Option<(Index, Harm)>,
}

#[derive(Debug, Clone)]
enum Harm {
    Addr(u64),
    Len(u32),
    Flags(u16),
    Next(u16),
}

fn plan() -> impl Strategy<Value = Plan> {
    let kind = prop_oneof![
        4 => Just(0_u32), 4 => Just(1), 1 => Just(4), 1 => Just(8), 1 => Just(11), 1 => Just(13), 1 => any::<u32>(),
    ];
    let sector = prop_oneof![6 => 0..2040_u64, 2 => 2036..2052_u64, 1 => any::<u64>()];
    let bytes = || prop_oneof![3 => Just(0_usize), 6 => (1..9_usize).prop_map(|n| n * 512), 2 => 0..600_usize];
    let range = (prop_oneof![3 => 0..2048_u64, 1 => any::<u64>()], prop_oneof![0..64_u32, any::<u32>()], 0..3_u32);
    let cuts = || prop::collection::vec(any::<Index>(), 0..5);
    let harm = (
        any::<Index>(),
        prop_oneof![
            prop_oneof![any::<u64>(), LOW - 64..LOW + 64, HIGH + REGION_BYTES - 64..HIGH + REGION_BYTES + 64]
                .prop_map(Harm::Addr),
            prop_oneof![any::<u32>(), 0..64_u32].prop_map(Harm::Len),
            prop_oneof![any::<u16>(), 0..8_u16].prop_map(Harm::Flags),
            prop_oneof![any::<u16>(), 0..SIZE].prop_map(Harm::Next),
        ],
    );
    let order = || Just((0..SIZE).collect::<Vec<u16>>()).prop_shuffle();
    (
        (kind, sector, bytes(), bytes(), prop::collection::vec(range, 0..4)),
        (cuts(), cuts()),
        prop::collection::vec((0..4_u8, 0..0x2000_u16), 16),
        any::<Index>(),
        (order(), order()),
        prop::option::weighted(0.3, harm),
    )
        .prop_map(|((kind, sector, readable, writable, payload), cuts, places, direct, orders, harm)| Plan {
            kind,
            sector,
            readable: if kind == 11 || kind == 13 { 16 * payload.len() } else { readable },
            writable,
            payload,
            cuts,
            places,
            direct,
            ring_order: orders.0,
            table_order: orders.1,
            harm,
        })
}

/// Cuts `len` bytes into pieces; empty ones stay in.
fn cut(len: usize, cuts: &[Index]) -> Vec<usize> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(len + 1)).collect();
    at.extend([0, len]);
    at.sort_unstable();
    at.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// Lays the chain out in the guest's memory and makes it available.
fn lay_out(driver: &mut Driver, plan: &Plan) -> u16 {
    let mut bytes = header_bytes(plan.kind, plan.sector).to_vec();
    if plan.kind == 11 || plan.kind == 13 {
        for (sector, sectors, flags) in &plan.payload {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
    }
    bytes.resize(16 + plan.readable, 0x5A);
    let pieces: Vec<(usize, u16)> = (cut(bytes.len(), &plan.cuts.0).into_iter().map(|len| (len, 0)))
        .chain(cut(plan.writable + 1, &plan.cuts.1).into_iter().map(|len| (len, WRITE)))
        .collect();
    let mut bytes = &bytes[..];
    let mut descs = Vec::new();
    for (turn, ((len, flags), (where_to, offset))) in pieces.iter().zip(&plan.places).enumerate() {
        let apart = turn as u64 * 0x4000 + u64::from(*offset);
        let addr = match where_to {
            0 | 1 => BUFFERS + apart,
            2 => HIGH + apart,
            _ if turn == 0 => ADJACENT - 7,
            _ => ADJACENT + 0x8000 + apart,
        };
        if *flags == 0 {
            driver.write(addr, &bytes[..*len]);
            bytes = &bytes[*len..];
        }
        descs.push(Desc { addr, len: *len as u32, flags: *flags, next: 0 });
    }
    let direct = plan.direct.index(descs.len() + 1);
    let in_table = descs.len() - direct;
    // The head of an indirect table is its first entry.
    let mut table_order = plan.table_order.clone();
    let zero = table_order.iter().position(|at| *at == 0).unwrap();
    table_order.swap(0, zero);
    let table_entries = table_order[..in_table].iter().max().map_or(0, |last| last + 1);
    let place = |turn: usize| {
        if turn < direct { (LOW, plan.ring_order[turn]) } else { (TABLE, table_order[turn - direct]) }
    };
    for (turn, desc) in descs.iter_mut().enumerate() {
        let last = turn + 1 == pieces.len();
        if !last {
            desc.flags |= NEXT;
            desc.next = if turn + 1 == direct { plan.ring_order[direct] } else { place(turn + 1).1 };
        }
        if let Some((_, harm)) = plan.harm.as_ref().filter(|(which, _)| which.index(pieces.len()) == turn) {
            match harm {
                Harm::Addr(addr) => desc.addr = *addr,
                Harm::Len(len) => desc.len = *len,
                Harm::Flags(flags) => desc.flags = *flags,
                Harm::Next(next) => desc.next = *next,
            }
        }
        let (table, at) = place(turn);
        driver.describe_at(table, at, *desc);
    }
    if in_table > 0 {
        let len = 16 * u32::from(table_entries);
        driver.describe(plan.ring_order[direct], Desc { addr: TABLE, len, flags: INDIRECT, next: 0 });
    }
    driver.make_available(plan.ring_order[0]);
    plan.ring_order[0]
}

#[derive(Debug, PartialEq)]
enum Expected {
    Broken,
    /// Status, its address, bytes written.
    Answer(u8, u64, u32),
    /// What, the addresses of its bytes, the status's address.
    Request(RequestKind, Vec<u64>, u64),
}

/// The addresses of a chain's readable and writable bytes.
fn walk(driver: &Driver, head: u16) -> Option<(Vec<u64>, Vec<u64>, u32)> {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let (mut table, mut entries, mut at) = (LOW, u32::from(SIZE), head);
    let (mut seen, mut limit, mut indirect) = (0, u32::from(SIZE), false);
    let mut writing = false;
    loop {
        if u32::from(at) >= entries {
            return None;
        }
        let raw = driver.read(table + 16 * u64::from(at), 16);
        let addr = u64::from_le_bytes(raw[..8].try_into().unwrap());
        let len = u32::from_le_bytes(raw[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(raw[12..14].try_into().unwrap());
        let next = u16::from_le_bytes(raw[14..].try_into().unwrap());
        if flags & INDIRECT != 0 {
            let one_region = [LOW, ADJACENT, HIGH].iter().any(|start| {
                (*start..=start + REGION_BYTES).contains(&addr) && addr + u64::from(len) <= start + REGION_BYTES
            });
            if indirect || flags & NEXT != 0 || len == 0 || len % 16 != 0 || !one_region {
                return None;
            }
            (table, entries, at, indirect) = (addr, len / 16, 0, true);
            limit = seen + entries.min(1024);
            continue;
        }
        seen += 1;
        if seen > limit || (writing && flags & WRITE == 0) || !Driver::holds(addr, u64::from(len)) {
            return None;
        }
        writing = flags & WRITE != 0;
        let bytes = if writing { &mut writable } else { &mut readable };
        bytes.extend(addr..addr + u64::from(len));
        if flags & NEXT == 0 {
            return Some((readable, writable, seen));
        }
        at = next;
    }
}

fn expect(driver: &Driver, head: u16) -> Expected {
    let Some((readable, mut data_in, descriptors)) = walk(driver, head) else { return Expected::Broken };
    let Some(status) = data_in.pop() else { return Expected::Broken };
    let answer = |value| Expected::Answer(value, status, 1);
    let fetch = |addresses: &[u64]| -> Vec<u8> { addresses.iter().map(|at| driver.read(*at, 1)[0]).collect() };
    if readable.len() < 16 {
        return answer(1);
    }
    let (header, data_out) = readable.split_at(16);
    let header = fetch(header);
    let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
    let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
    let inside = |sector: u64, bytes: u64| {
        bytes > 0 && bytes.is_multiple_of(512) && u128::from(sector) * 512 + u128::from(bytes) <= u128::from(CAPACITY)
    };
    match kind {
        0 | 1 => {
            let data = if kind == 0 { data_in } else { data_out.to_vec() };
            let len = data.len() as u64;
            if !inside(sector, len) || descriptors > SEG_MAX + 2 {
                return answer(1);
            }
            let (offset_bytes, len_bytes) = (sector * 512, len as u32);
            let kind = if kind == 0 {
                RequestKind::Read { offset_bytes, len_bytes }
            } else {
                RequestKind::Write { offset_bytes, len_bytes }
            };
            Expected::Request(kind, data, status)
        }
        4 => Expected::Request(RequestKind::Flush, vec![], status),
        8 => Expected::Answer(0, status, data_in.len().min(20) as u32 + 1),
        11 | 13 => {
            if data_out.is_empty() || data_out.len() % 16 != 0 || data_out.len() > 16 * 16 {
                return answer(1);
            }
            let (mut ranges, mut unmap) = (Vec::new(), true);
            for raw in fetch(data_out).chunks(16) {
                let sector = u64::from_le_bytes(raw[..8].try_into().unwrap());
                let sectors = u32::from_le_bytes(raw[8..12].try_into().unwrap());
                let flags = u32::from_le_bytes(raw[12..].try_into().unwrap());
                if flags > u32::from(kind == 13) {
                    return answer(2);
                }
                let max = if kind == 11 { 1 << 22 } else { 1 << 17 };
                if !inside(sector, u64::from(sectors) * 512) || sectors > max {
                    return answer(1);
                }
                unmap &= flags == 1;
                ranges.push(ByteRange { offset_bytes: sector * 512, len_bytes: u64::from(sectors) * 512 });
            }
            let kind =
                if kind == 11 { RequestKind::Discard { ranges } } else { RequestKind::WriteZeroes { ranges, unmap } };
            Expected::Request(kind, vec![], status)
        }
        _ => answer(2),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn any_chain_means_what_the_naive_parser_says(plan in plan()) {
        let config = DiskConfig { seg_max: SEG_MAX, ..DiskConfig::new(CAPACITY) };
        let mut driver = Driver::new(SIZE, config);
        let head = lay_out(&mut driver, &plan);
        let expected = expect(&driver, head);
        let mut queue = driver.queue();
        match (queue.pop(), expected) {
            (Err(error), expected) => prop_assert_eq!(expected, Expected::Broken, "{}", error),
            (Ok(None), Expected::Answer(status, at, written)) => {
                prop_assert_eq!(driver.read(at, 1), [status]);
                prop_assert_eq!(driver.take_used(), [(head, written)]);
            }
            (Ok(Some(request)), Expected::Request(kind, addresses, status)) => {
                prop_assert_eq!(request.kind(), &kind);
                prop_assert_eq!(request.data_len(), addresses.len() as u64);
                let mut expected: Vec<u8> = addresses.iter().map(|at| driver.read(*at, 1)[0]).collect();
                let mut data = vec![0; expected.len()];
                for (turn, piece) in data.chunks_mut(777).enumerate() {
                    request.copy_from_guest(turn as u64 * 777, piece).unwrap();
                }
                prop_assert_eq!(&data, &expected);
                let reads = matches!(kind, RequestKind::Read { .. });
                if reads {
                    // Two descriptors may name one byte; the later one's stays.
                    let fresh: Vec<u8> = (0..data.len()).map(|at| (at * 7) as u8).collect();
                    for (turn, piece) in fresh.chunks(777).enumerate() {
                        request.copy_to_guest(turn as u64 * 777, piece).unwrap();
                    }
                    let memory: std::collections::HashMap<_, _> = addresses.iter().zip(&fresh).collect();
                    expected = addresses.iter().map(|at| *memory[at]).collect();
                    data = addresses.iter().map(|at| driver.read(*at, 1)[0]).collect();
                    prop_assert_eq!(&data, &expected);
                }
                let written = if reads { data.len() as u32 + 1 } else { 1 };
                driver.write(status, &[0xFF]);
                queue.complete(request, Status::Ok);
                prop_assert_eq!(driver.read(status, 1), [0]);
                prop_assert_eq!(driver.take_used(), [(head, written)]);
            }
            (got, expected) => prop_assert!(false, "got {got:?}, expected {expected:?}"),
        }
    }
}

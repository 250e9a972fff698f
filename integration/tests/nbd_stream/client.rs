//! What clients say, mostly right: [`any_client`], streams of bytes with some of them changed.

use crate::messages::{BLOCK_STATUS, DISCONNECT, READ, WRITE, go, option, request, text};
use crate::server::{Input, NAMES, SIZE};
use proptest::prelude::*;

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![9 => prop::sample::select(&NAMES[..]), 1 => Just("none")];
    let query = prop::sample::select(vec!["base:allocation", "base:", "qemu:dirty-bitmap:x"]);
    let queries = prop::collection::vec(query, 0..3);
    prop_oneof![
        4 => Just(option(8, &[])),
        4 => (name.clone(), queries, 9u32..11).prop_map(|(name, queries, number)| {
            let count = (queries.len() as u32).to_be_bytes();
            let queries = queries.iter().flat_map(|query| text(query)).collect();
            option(number, &[text(name), count.to_vec(), queries].concat())
        }),
        2 => (name, prop::collection::vec(0u16..5, 0..4)).prop_map(|(name, items)| option(6, &go(name, &items))),
        1 => Just(option(3, &[])),
        1 => Just(option(5, &[])),
        1 => (0u32..14, prop::collection::vec(any::<u8>(), 0..60)).prop_map(|(number, data)| option(number, &data)),
        1 => (0u32..14, 16_300usize..16_500).prop_map(|(number, len)| option(number, &vec![0; len])),
    ]
}

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![12 => prop::sample::select(vec![READ, WRITE, 3, 4, 5, 6, BLOCK_STATUS]), 1 => 0u16..20];
    let flags = prop_oneof![4 => Just(0u16), 2 => Just(1u16), 1 => 0u16..64, 1 => any::<u16>()];
    let offset = prop_oneof![6 => 0u64..1 << 20, 2 => SIZE - 5000..SIZE + 5, 1 => any::<u64>()];
    let len = prop_oneof![1 => Just(0u32), 6 => 1u32..6000, 1 => (32 << 20) - 2..(32 << 20) + 2u32, 1 => any::<u32>()];
    (kind, flags, 0u64..1000, offset, len).prop_map(|(kind, flags, cookie, offset, len)| {
        // A flush has no range.
        let (offset, len) = if kind == 3 && cookie > 100 { (0, 0) } else { (offset, len) };
        // What is longer than this the client does not send to its end.
        let payload = if kind == WRITE { (len as usize).min(20_000) } else { 0 };
        [request(kind, flags, cookie, offset, len), vec![0x5a; payload]].concat()
    })
}

/// Structured replies, what is allocated, and the export for which that was asked.
fn all_of(name: &str) -> Vec<u8> {
    let context = option(10, &[text(name), 1u32.to_be_bytes().to_vec(), text("base:allocation")].concat());
    [option(8, &[]), context, option(7, &go(name, &[]))].concat()
}

/// Negotiation, requests, and a few bytes that are wrong.
pub(crate) fn any_client() -> impl Strategy<Value = Input> {
    let entry = prop_oneof![
        4 => prop::sample::select(&NAMES[..]).prop_map(all_of),
        3 => prop::sample::select(&NAMES[..]).prop_map(|name| option(7, &go(name, &[3]))),
        1 => prop::sample::select(&NAMES[..]).prop_map(|name| option(1, name.as_bytes())),
        1 => Just(option(2, &[])),
    ];
    let flags = prop_oneof![6 => Just(3u32), 2 => Just(1u32), 1 => 0u32..6];
    let options = prop::collection::vec(any_option(), 0..6);
    let requests = prop::collection::vec(any_request(), 0..30);
    let changes = prop_oneof![
        2 => Just(Vec::new()),
        1 => prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ];
    let goodbye = any::<bool>();
    let how = (prop::collection::vec(prop_oneof![0u16..60, any::<u16>()], 0..6), any::<bool>(), any::<u64>());
    (flags, options, entry, requests, goodbye, changes, how).prop_map(
        |(flags, options, entry, requests, goodbye, changes, (pieces, tls, order))| {
            let first = if tls { option(5, &[]) } else { Vec::new() };
            let last = if goodbye { request(DISCONNECT, 0, 0, 0, 0) } else { Vec::new() };
            let mut bytes =
                [flags.to_be_bytes().to_vec(), first, options.concat(), entry, requests.concat(), last].concat();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            // The server lets go of what came together with the question for TLS.
            let pieces = if tls { vec![4, 16].into_iter().chain(pieces).collect() } else { pieces };
            Input { bytes, pieces, tls, order }
        },
    )
}

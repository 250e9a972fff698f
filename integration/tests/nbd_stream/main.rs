//! Whatever a client sends, in whatever pieces: the server's side of NBD does not panic, holds no more than it may, and answers
//! every request once, or closes.
//!
//! - `server.rs`: [`server::serve`], a server without sockets
//! - `messages.rs`: [`judge`], an independent look at the answers
//! - `client.rs`: streams that are mostly right
//!
//! The fuzz target `nbd` (tests/fuzz) goes on from here with the first two.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod client;
mod messages;
mod server;

use messages::judge;
use proptest::prelude::*;
use proptest::test_runner::Config;
use server::Input;

/// A fuzzer's bytes: some say how the others come.
fn input_of(data: &[u8]) -> Input {
    let (how, bytes) = data.split_at(data.len().min(12));
    let word =
        |at: usize| u16::from_be_bytes([how.get(at).copied().unwrap_or(0), how.get(at + 1).copied().unwrap_or(0)]);
    let order = how.iter().fold(0, |sum: u64, byte| sum.rotate_left(8) ^ u64::from(*byte));
    Input { bytes: bytes.to_vec(), pieces: vec![word(0), word(2) % 64, word(4)], tls: word(6) % 2 == 1, order }
}

proptest! {
    #![proptest_config(Config::with_cases(2000))]

    #[test]
    fn every_request_of_a_client_that_is_mostly_right_is_answered_once(input in client::any_client()) {
        judge(&input);
    }

    #[test]
    fn pieces_change_nothing(input in client::any_client(), pieces in prop::collection::vec(1u16..300, 1..5)) {
        let input = Input { tls: false, ..input };
        let (whole, cut) = (judge(&Input { pieces: Vec::new(), ..input.clone() }), judge(&Input { pieces, ..input }));
        prop_assert_eq!(whole.negotiated, cut.negotiated);
        prop_assert_eq!(whole.requests, cut.requests);
        prop_assert_eq!(whole.ended, cut.ended);
    }

    #[test]
    fn any_bytes_at_all_are_survived(data in prop::collection::vec(any::<u8>(), 0..300), entered in any::<bool>()) {
        judge(&input_of(&data));
        if entered {
            // Behind a negotiation that went well.
            let entry = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";
            let served = judge(&Input { bytes: [&entry[..], &data].concat(), pieces: vec![7], tls: false, order: 1 });
            prop_assert!(served.agreement.is_some());
        }
    }
}

/// The generator is worth something only if most of what it makes gets in, and reaches every command.
#[test]
fn most_clients_get_in_and_all_commands_are_carried_out() {
    use prestage_integration::export::nbd::Command;
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut entered, mut answered, mut kinds) = (0, 0, [0u32; 7]);
    for _ in 0..400 {
        let served = judge(&client::any_client().new_tree(&mut runner).unwrap().current());
        entered += u32::from(served.agreement.is_some());
        answered += served.answers.len();
        for request in &served.requests {
            kinds[match request.command {
                Command::Read => 0,
                Command::Write { .. } => 1,
                Command::Flush => 2,
                Command::Trim { .. } => 3,
                Command::Cache => 4,
                Command::WriteZeroes { .. } => 5,
                Command::BlockStatus { .. } => 6,
            }] += 1;
        }
    }
    println!("{entered} of 400 got in, {answered} requests were answered, of these by command: {kinds:?}");
    assert!(
        entered >= 200 && answered >= 1000 && kinds.iter().all(|count| *count >= 20),
        "{entered} {answered} {kinds:?}"
    );
}

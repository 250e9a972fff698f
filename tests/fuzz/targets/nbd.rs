//! NBD clients: negotiation and requests, mostly right, and some of the bytes changed; or any bytes at all. What must hold is
//! told in `integration/tests/nbd_stream`, whose server and judge these are.
#![no_main]

#[path = "../../../integration/tests/nbd_stream/messages.rs"]
mod messages;
#[path = "../../../integration/tests/nbd_stream/server.rs"]
mod server;

use arbitrary::{Result, Unstructured};
use messages::{WRITE, go, judge, option, request, text};
use server::{Input, NAMES, SIZE};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // The bytes have run out: no client.
    if let Ok(input) = client(&mut Unstructured::new(data)) {
        judge(&input);
    }
});

fn client(bytes: &mut Unstructured<'_>) -> Result<Input> {
    let tls = bytes.ratio(1, 8)?;
    let mut stream = if bytes.ratio(7, 8)? { 3_u32 } else { bytes.arbitrary()? }.to_be_bytes().to_vec();
    let mut pieces = vec![4, 16];
    if tls {
        stream.extend(option(5, &[]));
    } else {
        pieces.clear();
    }
    for _ in 0..bytes.int_in_range(0..=4_u8)? {
        let name = *bytes.choose(&["", "disk", "fixed", "none"])?;
        stream.extend(match bytes.int_in_range(0..=5_u8)? {
            0 | 1 => option(8, &[]),
            2 => {
                let queries = [1_u32.to_be_bytes().to_vec(), text("base:allocation")].concat();
                option(bytes.int_in_range(9..=10)?, &[text(name), queries].concat())
            }
            3 => option(6, &go(name, &[bytes.arbitrary()?])),
            4 => option(3, &[]),
            _ => {
                let len = usize::from(bytes.arbitrary::<u8>()?).min(bytes.len());
                option(bytes.arbitrary()?, bytes.bytes(len)?)
            }
        });
    }
    let name = *bytes.choose(&NAMES)?;
    stream.extend(match bytes.int_in_range(0..=3_u8)? {
        0 => option(1, name.as_bytes()),
        _ => option(7, &go(name, &[3])),
    });
    for _ in 0..bytes.int_in_range(0..=24_u8)? {
        let kind = match bytes.int_in_range(0..=8_u16)? {
            2 | 8 => bytes.arbitrary()?,
            known => known,
        };
        let flags = if bytes.ratio(3, 4)? { bytes.int_in_range(0..=1)? } else { bytes.arbitrary()? };
        let offset = match bytes.int_in_range(0..=3_u8)? {
            0 | 1 => u64::from(bytes.arbitrary::<u16>()?),
            2 => SIZE - u64::from(bytes.arbitrary::<u16>()?),
            _ => bytes.arbitrary()?,
        };
        let len = match bytes.int_in_range(0..=3_u8)? {
            0..=2 => u32::from(bytes.arbitrary::<u16>()?),
            _ => bytes.arbitrary()?,
        };
        stream.extend(request(kind, flags, bytes.arbitrary::<u8>()?.into(), offset, len));
        if kind == WRITE {
            // What is longer than this is not sent to its end.
            stream.extend(vec![0x5a; (len as usize).min(20_000)]);
        }
    }
    for _ in 0..bytes.int_in_range(0..=3_u8)? {
        let at = bytes.choose_index(stream.len())?;
        stream[at] = bytes.arbitrary()?;
    }
    let order = bytes.arbitrary()?;
    for _ in 0..bytes.int_in_range(0..=4_u8)? {
        pieces.push(bytes.arbitrary()?);
    }
    Ok(Input { bytes: stream, pieces, tls, order })
}

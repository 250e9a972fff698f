//! Every format of trace, right and wrong.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use prestage_predictor::Op::{Discard, Read, Write};
use prestage_replay::trace::{BlktraceAction, ReadOptions, TraceFormat};
use prestage_replay::{Request, TraceError, TraceReader};
use proptest::prelude::*;
use std::io::{Cursor, Write as _};

const FORMATS: [TraceFormat; 4] = [TraceFormat::Csv, TraceFormat::Vscsi, TraceFormat::Blktrace, TraceFormat::Nbdkit];

fn reader(bytes: impl Into<Vec<u8>>, options: ReadOptions) -> Result<TraceReader, TraceError> {
    TraceReader::new("t", Cursor::new(bytes.into()), options)
}

fn read(bytes: impl Into<Vec<u8>>, options: ReadOptions) -> Result<Vec<Request>, String> {
    reader(bytes, options).and_then(Iterator::collect).map_err(|error| error.to_string())
}

fn sniffed(bytes: impl Into<Vec<u8>>) -> Vec<Request> {
    read(bytes, ReadOptions::default()).unwrap()
}

fn request(at_us: u64, op: prestage_predictor::Op, offset: u64, len: u32) -> Request {
    Request { at_us, op, offset, len }
}

#[test]
fn csv_with_and_without_a_header_in_any_case() {
    let expected = [request(5, Read, 4096, 512), request(9, Write, 0, 8192), request(9, Discard, 1 << 40, 1)];
    let rows = "5,r,4096,512\r\n\n 9 , WRITE, 0, 8192\n9,R,77,0\n9,Discard,1099511627776,1";
    assert_eq!(sniffed(rows), expected);
    assert_eq!(sniffed(format!("ts_us,op,offset,len\n{rows}")), expected);
}

#[test]
fn csv_from_windows_and_a_first_row_that_is_no_header() {
    let expected = [request(5, Read, 4096, 512)];
    assert_eq!(sniffed("\u{feff}ts_us,op,offset,len\r\n5,R,4096,512\r\n"), expected);
    assert_eq!(sniffed("\u{feff}5,R,4096,512\r\n"), expected);
    // A number, if a bad one: not the name of a column.
    for row in ["-5,R,4096,512", "5us,R,4096,512", "x,R,4096,512"] {
        let error = read(format!("{row}\n5,R,4096,512\n"), ReadOptions::default()).unwrap_err();
        assert!(error.starts_with(&format!("t:1: bad CSV row `{row}`")), "{error}");
    }
}

#[test]
fn a_trace_is_a_file() {
    let error = TraceReader::open(std::path::Path::new("/dev/null"), ReadOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/dev/null is a pipe or device, and a trace is read more than once; copy it into a file"
    );
}

#[test]
fn compressed_traces_are_known_by_their_magic() {
    let text = "5,R,4096,512\n6,R,8192,512\n";
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(text.as_bytes()).unwrap();
    let gz = gz.finish().unwrap();
    assert_eq!(sniffed(gz.clone()), sniffed(text));
    assert_eq!(sniffed([gz.clone(), gz.clone()].concat()).len(), 4);
    let zst = zstd::encode_all(text.as_bytes(), 1).unwrap();
    assert_eq!(sniffed(zst), sniffed(text));
    let cut = read(&gz[..gz.len() - 9], ReadOptions::default()).unwrap_err();
    assert!(cut.starts_with("t: ") && cut.contains("deflate"), "{cut}");
}

#[test]
fn vscsi_in_both_versions_and_byte_orders() {
    let expected = [request(0, Write, 42_932_745 * 512, 512), request(242_639, Read, 512, 65_536)];
    let rows: [(u32, u16, u64, u64); 3] =
        [(512, 0x2a, 42_932_745, 5_000_000), (0, 0x35, 0, 5_000_001), (65_536, 0x88, 1, 5_242_639)];
    for version in [1u16, 2] {
        for big_endian in [false, true] {
            let mut bytes = Vec::new();
            let mut put = |value: u64, width: usize| {
                let field = value.to_le_bytes();
                let field = &field[..width];
                if big_endian { bytes.extend(field.iter().rev()) } else { bytes.extend(field) }
            };
            for (len, cmd, lbn, ts) in rows {
                let (cmd, ver) = (u64::from(cmd), u64::from(version << 8));
                let head: &[(u64, usize)] = if version == 1 {
                    &[(7, 4), (u64::from(len), 4), (1, 4), (cmd, 2), (ver, 2)]
                } else {
                    &[(cmd, 2), (ver, 2), (7, 4), (u64::from(len), 4), (1, 4)]
                };
                for (value, width) in head.iter().chain(&[(lbn, 8), (ts, 8)]) {
                    put(*value, *width);
                }
                if version == 2 {
                    put(99, 8);
                }
            }
            assert_eq!(sniffed(bytes.clone()), expected, "version {version}, big endian {big_endian}");
            bytes.pop();
            let cut = read(bytes, ReadOptions::default()).unwrap_err();
            assert!(cut.starts_with("t:3: bad vscsi row: expected a record of"), "{cut}");
        }
    }
}

#[test]
fn blktrace_takes_one_event_a_request() {
    let text = "\
  8,0    3        1     0.000100000   697  Q   R 223490 + 8 [dd]
  8,0    3        2     0.000101500   697  G   R 223490 + 8 [dd]
  8,0    3        3     0.000102000   697  P   N [dd]
  8,0    3        4     0.000150999   697  D   R 223490 + 8 [dd]
  8,0    1       11     0.000200000     0  C   R 223490 + 8 [0]
  8,0    3        5     1.000200000   697  Q  WS 8 + 16 [kworker/3:1 H]
  8,0    3        5     1.000200000   697  Q FWS [kworker/3:1 H]
  8,0    3        6     1.000300000   697  Q  DS 64 + 128 [fstrim]
  8,0    0        0     1.000400000     0  m   N cfq idle=0
CPU0 (8,0):
 Reads Queued:           1,        4KiB\t Writes Queued:           1,        8KiB
";
    let queued = [
        request(0, Read, 223_490 * 512, 4096),
        request(1_000_100, Write, 4096, 8192),
        request(1_000_200, Discard, 32_768, 65_536),
    ];
    assert_eq!(sniffed(text), queued);
    let issued = ReadOptions { blktrace_action: BlktraceAction::Issued, ..ReadOptions::default() };
    assert_eq!(read(text, issued).unwrap(), [request(0, Read, 223_490 * 512, 4096)]);
    let two = "8,0 3 1 0.000100000 697 Q R 0 + 8 [dd]\n8,16 3 1 0.000100000 697 Q R 0 + 8 [dd]\n";
    let error = read(two, ReadOptions::default()).unwrap_err();
    assert!(error.starts_with("t:2: bad blktrace row `8,16 3 1") && error.contains("one device, 8,0"), "{error}");
}

#[test]
fn nbdkit_log_across_midnight() {
    let text = "\
2020-02-29 23:59:59.999999 connection=1 Connect export=\"\" tls=0 size=0x40000000 write=1 flush=1 ...
2020-02-29 23:59:59.999999 connection=1 Read id=1 offset=0x0 count=0x10000 ...
2020-03-01 00:00:00.000004 connection=1 ...Read id=1 return=0 (Success)
2020-03-01 00:00:00.000009 connection=1 Write id=2 offset=0x1000 count=0x200 fua=0 ...
2020-03-01 00:00:00.000010 connection=1 Flush id=3 ...
2020-03-01 00:00:00.000011 Zero id=4 offset=0x2000 count=0x400 may_trim=1 ...
2020-03-01 00:00:01.000011 connection=1 Disconnect transactions=4
";
    let expected = [request(0, Read, 0, 65_536), request(10, Write, 4096, 512), request(12, Discard, 8192, 1024)];
    assert_eq!(sniffed(text), expected);
}

#[test]
fn bad_rows_are_named_or_left_out() {
    let text = "ts_us,op,offset,len\n1,R,0,512\n2,X,0,512\n3,R,0\n4,R,0,512\n3,R,0,512\n";
    let error = read(text, ReadOptions::default()).unwrap_err();
    assert_eq!(
        error,
        "t:3: bad CSV row `2,X,0,512`: expected ts_us,op,offset,len with whole numbers and op R, W or D, as in \
         1000,R,4096,512; --skip-bad N leaves out up to N such rows"
    );
    let some = |skip_bad| ReadOptions { skip_bad, ..ReadOptions::default() };
    assert!(read(text, some(1)).unwrap_err().starts_with("t:4: bad CSV row `3,R,0`"));
    let mut reader = reader(text, some(2)).unwrap();
    let requests: Vec<Request> = reader.by_ref().map(Result::unwrap).collect();
    assert_eq!(requests.iter().map(|request| request.at_us).collect::<Vec<_>>(), [1, 4, 4]);
    assert_eq!((reader.skipped_rows(), reader.clamped_rows()), (2, 1));

    for (row, expected) in [
        ("1,R,0,4294967296", "a length up to 2 GiB"),
        ("1,R,18446744073709551615,4096", "an offset below 256 TiB"),
        ("1,R,\u{1b}[31m,4096", "bad CSV row `1,R,\\u{1b}[31m,4096`"),
        (&format!("1,R,0,{}", "9".repeat(5000)), "a line of at most 4096 bytes"),
    ] {
        let error = read(row, ReadOptions { format: Some(TraceFormat::Csv), ..ReadOptions::default() }).unwrap_err();
        assert!(error.starts_with("t:1: ") && error.contains(expected), "{error}");
    }
    assert_eq!(read("", ReadOptions::default()).unwrap_err(), "t is empty");
    assert!(read("hello\n", ReadOptions::default()).unwrap_err().contains("name it with --format"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn csv_comes_back_as_it_was_written(
        rows in prop::collection::vec((0u64..1 << 50, 0usize..3, 0u64..1 << 47, 1u32..1 << 31), 1..40), header: bool,
    ) {
        let mut rows = rows;
        rows.sort_by_key(|row| row.0);
        let mut text = if header { "ts_us,op,offset,len\n".to_owned() } else { String::new() };
        for (at_us, op, offset, len) in &rows {
            text += &format!("{at_us},{},{offset},{len}\n", ["R", "W", "D"][*op]);
        }
        let expected: Vec<Request> =
            rows.into_iter().map(|(at_us, op, offset, len)| request(at_us, [Read, Write, Discard][op], offset, len)).collect();
        prop_assert_eq!(sniffed(text), expected);
    }

    #[test]
    fn any_bytes_are_read_or_refused(noise in prop::collection::vec(any::<u8>(), 0..600), skip_bad in 0u64..4) {
        for format in FORMATS.map(Some).into_iter().chain([None]) {
            let _ = read(noise.clone(), ReadOptions { format, skip_bad, ..ReadOptions::default() });
        }
        for magic in [&[0x1f, 0x8b, 8, 0][..], &[0x28, 0xb5, 0x2f, 0xfd][..], &[1, 0, 2, 2][..]] {
            let _ = read([magic, &noise].concat(), ReadOptions::default());
        }
    }

    #[test]
    fn almost_right_text_is_read_or_refused(
        rows in prop::collection::vec(
            prop_oneof![
                "[0-9]{0,20}[,. ][RWDrwdx]{0,2}[, ][0-9]{0,20},[0-9]{0,20}",
                "[ 0-9]{0,3},[0-9]{0,3} [0-9] [0-9] [0-9]{0,21}\\.[0-9]{0,9} 1 [QD] [RWDN]{1,2} [0-9]{1,20} \\+ [0-9]{1,20}",
                "20[0-9]{2}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{6} (Read|Trim) offset=0x[0-9a-f]{0,17} count=[0-9]{0,21}",
            ],
            1..6,
        ),
    ) {
        for format in FORMATS.map(Some).into_iter().chain([None]) {
            if let Ok(requests) = read(rows.join("\n"), ReadOptions { format, skip_bad: 3, ..ReadOptions::default() }) {
                prop_assert!(requests.is_sorted_by_key(|request| request.at_us));
                prop_assert!(requests.iter().all(|request| request.len > 0 && request.pages().count() > 0));
            }
        }
    }
}

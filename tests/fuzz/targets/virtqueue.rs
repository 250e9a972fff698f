//! A hostile guest and its front-end: see `prestage_integration::export::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| prestage_integration::export::fuzzing::guest(data));

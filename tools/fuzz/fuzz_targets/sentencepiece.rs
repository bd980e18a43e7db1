//! A `tokenizer.model` of arbitrary bytes: refused, or rewritten.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = bitmill_calibrate::to_tokenizer_json(bytes);
});

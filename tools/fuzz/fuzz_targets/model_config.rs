//! A model's `config.json` of arbitrary text: refused by the name of a key, or a model whose tensors can be listed.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(config) = serde_json::from_str::<serde_json::Value>(text) else { return };
    if let Ok(spec) = bitmill_models::spec(&config) {
        let _ = spec.block_tensors(0);
    }
});

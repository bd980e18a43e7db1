//! A `config.json` of arbitrary text: refused, or every module name can be looked up.

#![no_main]

use bitmill_checkpoint::Dialect;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // The first line is a module name, the rest the quantization_config.
    let (module, json) = text.split_once('\n').unwrap_or(("lm_head", text));
    let Ok(block) = serde_json::from_str::<serde_json::Value>(json) else { return };
    if let Ok(Some(dialect)) = Dialect::of(&serde_json::json!({"quantization_config": block})) {
        let _ = dialect.scheme_of(module);
        let _ = dialect.format().name();
    }
});

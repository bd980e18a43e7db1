//! GGUF files of arbitrary bytes: refused, or every weight in them can be computed.

#![no_main]

use bitmill_checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(checkpoint) = Checkpoint::gguf_in_memory(bytes.to_vec()) else { return };
    let _ = bitmill_models::spec(checkpoint.config());
    for name in checkpoint.names() {
        if let Some(module) = name.strip_suffix(".weight")
            && let Ok(weight) = checkpoint.weight(module)
        {
            let [rows, cols] = weight.shape();
            assert_eq!(weight.to_f32().expect("a weight is numbers").len(), rows * cols);
        }
    }
});

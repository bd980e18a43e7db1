//! A shard of arbitrary bytes: refused, or every tensor of it can be read.

#![no_main]

use bitmill_checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(checkpoint) = Checkpoint::in_memory(serde_json::json!({}), bytes.to_vec()) else { return };
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).expect("a listed tensor exists");
        assert_eq!(tensor.bytes.len(), checkpoint.spec(name).expect("and is described").bytes());
        let _ = tensor.to_f32();
        let _ = tensor.first_non_finite();
    }
});

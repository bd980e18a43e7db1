//! Every format's decoder on a shard of arbitrary bytes: refused, or the weights can be computed.

#![no_main]

use bitmill_checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

// Two bytes choose the configuration, the rest is the shard.
fuzz_target!(|input: (u8, u8, &[u8])| {
    let (method, details, shard) = input;
    let bits = details % 8 + 1;
    let symmetric = details & 8 == 0;
    let group = [-1, 1, 8, 32][usize::from(details >> 4) % 4];
    let format = ["pack-quantized", "int-quantized", "naive-quantized"][usize::from(method) % 3];
    let version = if details & 64 == 0 { "gptq" } else { "gptq_v2" };
    let block = match method % 6 {
        3 => json!({"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": version}),
        4 => json!({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true}),
        5 => json!({"quant_method": "bitmill", "format": "binary", "group_size": group}),
        _ => json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"g": {
            "targets": ["Linear"],
            "weights": {"num_bits": bits, "symmetric": symmetric, "group_size": group}
        }}}),
    };
    let Ok(checkpoint) = Checkpoint::in_memory(json!({"quantization_config": block}), shard.to_vec()) else { return };
    for name in checkpoint.names() {
        if let Some((module, _)) = name.rsplit_once('.')
            && let Ok(weight) = checkpoint.weight(module)
        {
            let [rows, cols] = weight.shape();
            assert_eq!(weight.to_f32().expect("a weight is numbers").len(), rows * cols);
        }
    }
});

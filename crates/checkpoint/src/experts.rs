//! Experts that a file stores stacked, as the matrices of a model folder.
//!
//! Releases of transformers keep all experts of a block in two tensors, `experts.gate_up_proj [experts, 2 · width, hidden]` and
//! `experts.down_proj [experts, hidden, width]`; loaders want a matrix for each. Every expert's part is a run of bytes, so
//! they are given the names of matrices when the file is opened, and nothing else needs to know. Stacks of Llama 4 lie the
//! other way round, `[experts, hidden, 2 · width]` and `[experts, width, hidden]`: their matrices are read from columns.
//! Those of other architectures that lie so are left as they are, since it is not known how their columns are dealt out.

use crate::formats::gpt_oss;
use crate::shard::Shard;
use crate::tensor::is_dense;
use crate::{Order, TensorSpec};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;

/// More experts than any model has; a header that claims more is left as it is.
const MOST: usize = 1 << 12;
const BOTH: &str = ".experts.gate_up_proj";
const DOWN: &str = ".experts.down_proj";

/// Architectures whose stacks lie in columns.
const LLAMA4: [&str; 2] = ["llama4", "llama4_text"];

/// Suffixes of stacks of 4-bit numbers.
const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";

/// What stands before the experts of a block and before its router in memory, and on the hub.
const MIXTRAL: [&str; 2] = [".mlp", ".block_sparse_moe"];

/// Gives the parts of stacked experts in `shards` names of their own, those of the hub for the architecture of `config`.
pub(crate) fn unstack(config: &Value, shards: &mut [Shard]) {
    let mixtral = config["model_type"] == "mixtral";
    let columns = LLAMA4.iter().any(|name| config["model_type"] == *name);
    let stacks = stacks(shards, columns);
    for shard in shards {
        for block in &stacks {
            let renamed = if mixtral { on_the_hub(block) } else { block.clone() };
            for (stack, parts) in [(BOTH, &["gate_proj", "up_proj"][..]), (DOWN, &["down_proj"])] {
                let Some((spec, range)) = shard.tensors.remove(&format!("{block}{stack}")) else { continue };
                for Matrix { expert, part, shape, bytes, order } in split(&spec, &range, parts.len(), columns) {
                    let part = if mixtral { short(parts[part]) } else { parts[part] };
                    let name = format!("{renamed}.experts.{expert}.{part}.weight");
                    let spec = TensorSpec { name: name.clone(), dtype: spec.dtype, shape: shape.into() };
                    shard.tensors.insert(name.clone(), (spec, bytes));
                    if order != Order::Rows {
                        shard.orders.insert(name, order);
                    }
                }
            }
            let router = shard.tensors.remove(&format!("{block}.gate.weight"));
            if let Some((spec, range)) = router {
                let name = format!("{renamed}.gate.weight");
                shard.tensors.insert(name.clone(), (TensorSpec { name, ..spec }, range));
            }
        }
    }
}

/// Gives the experts of gpt-oss, `X_blocks` U8 `[experts, out, in/32, 16]` and `X_scales` U8 `[experts, out, in/32]`, the
/// names and shapes of one matrix `[experts · out, in]` of compressed-tensors' `mxfp4-pack-quantized`, `X.weight_packed` and
/// `X.weight_scale`, whose bytes they are. Returns the number of experts of every `X`.
pub(crate) fn stacked_blocks(config: &Value, shards: &mut [Shard]) -> BTreeMap<String, usize> {
    if config["quantization_config"]["quant_method"] != gpt_oss::METHOD {
        return BTreeMap::new();
    }
    let specs = || shards.iter().flat_map(|shard| shard.tensors.values()).map(|(spec, _)| spec);
    let scales: BTreeMap<&str, &[usize]> = specs()
        .filter(|spec| spec.dtype == Dtype::U8)
        .filter_map(|spec| Some((spec.name.strip_suffix(SCALES)?, &spec.shape[..])))
        .collect();
    let stack = |spec: &TensorSpec| {
        let module = spec.name.strip_suffix(BLOCKS).filter(|_| spec.dtype == Dtype::U8)?;
        let &[experts, out, groups, 16] = &spec.shape[..] else { return None };
        let whole = scales.get(module) == Some(&&[experts, out, groups][..]) && ![experts, out, groups].contains(&0);
        whole.then(|| (module.to_owned(), experts))
    };
    let stacks: BTreeMap<String, usize> = specs().filter_map(stack).collect();
    for shard in shards {
        for module in stacks.keys() {
            for (suffix, part) in [(BLOCKS, "weight_packed"), (SCALES, "weight_scale")] {
                let Some((spec, range)) = shard.tensors.remove(&format!("{module}{suffix}")) else { continue };
                let (name, row) = (format!("{module}.{part}"), spec.shape[2..].iter().product());
                let spec = TensorSpec::new(name.clone(), spec.dtype, vec![spec.shape[0] * spec.shape[1], row]);
                shard.tensors.insert(name, (spec, range));
            }
        }
    }
    stacks
}

/// The blocks whose experts are stacked as is understood, by rows or by columns.
fn stacks(shards: &[Shard], columns: bool) -> Vec<String> {
    let specs = || shards.iter().flat_map(|shard| shard.tensors.values()).map(|(spec, _)| spec);
    let stacked = |spec: &TensorSpec| is_dense(spec.dtype) && !spec.shape.contains(&0) && spec.shape[0] <= MOST;
    let of = |ending: &str| -> BTreeMap<String, [usize; 3]> {
        let named = specs().filter_map(|spec| Some((spec.name.strip_suffix(ending)?.to_owned(), spec)));
        let solid = named.filter_map(|(block, spec)| Some((block, spec.shape.as_slice().try_into().ok()?, spec)));
        solid.filter(|(_, _, spec)| stacked(spec)).map(|(block, shape, _)| (block, shape)).collect()
    };
    let downs = of(DOWN);
    let fits = |(block, [experts, both, hidden]): (String, [usize; 3])| {
        let [others, out, width] = *downs.get(&block)?;
        let ([both, hidden], [out, width]) =
            if columns { ([hidden, both], [width, out]) } else { ([both, hidden], [out, width]) };
        (experts == others && out == hidden && width.checked_mul(2) == Some(both)).then_some(block)
    };
    of(BOTH).into_iter().filter_map(fits).collect()
}

/// One matrix of a stack.
struct Matrix {
    expert: usize,
    part: usize,
    /// `[out, in]`.
    shape: [usize; 2],
    bytes: Range<usize>,
    order: Order,
}

/// Every matrix of a stack, of which each expert has `parts`, lying one after the other or, in `columns`, side by side.
fn split(spec: &TensorSpec, range: &Range<usize>, parts: usize, columns: bool) -> impl Iterator<Item = Matrix> {
    let (experts, rows, width) = (spec.shape[0], spec.shape[1], spec.shape[2]);
    let run = |i: usize, of: usize| {
        let size = (range.end - range.start) / of;
        range.start + i * size..range.start + (i + 1) * size
    };
    (0..experts * parts).map(move |i| {
        let (expert, part) = (i / parts, i % parts);
        if columns {
            let own = width / parts;
            let order = Order::Columns { first: part * own, width };
            return Matrix { expert, part, shape: [own, rows], bytes: run(expert, experts), order };
        }
        Matrix { expert, part, shape: [rows / parts, width], bytes: run(i, experts * parts), order: Order::Rows }
    })
}

/// `model.layers.0.mlp` as the hub writes it for Mixtral.
fn on_the_hub(block: &str) -> String {
    let [memory, hub] = MIXTRAL;
    block.strip_suffix(memory).map_or_else(|| block.to_owned(), |before| format!("{before}{hub}"))
}

/// A part of an expert as the hub writes it for Mixtral.
fn short(part: &str) -> &'static str {
    match part {
        "gate_proj" => "w1",
        "up_proj" => "w3",
        _ => "w2",
    }
}

#[cfg(test)]
mod tests {
    use crate::Checkpoint;
    use safetensors::tensor::TensorView;
    use safetensors::{Dtype, serialize};
    use serde_json::json;

    /// A checkpoint of f32 tensors whose numbers count up from 0.
    fn stored(model_type: &str, tensors: &[(&str, &[usize])]) -> Checkpoint {
        let numbers = |shape: &[usize]| -> Vec<u8> {
            (0..shape.iter().product::<usize>()).flat_map(|i| (i as f32).to_le_bytes()).collect()
        };
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| numbers(shape)).collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
            (name.to_string(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
        });
        let file = serialize(views, None).unwrap();
        Checkpoint::in_memory(json!({"model_type": model_type}), file).unwrap()
    }

    #[test]
    fn a_stack_is_read_as_its_matrices() {
        let stacks: [(&str, &[usize]); 3] = [
            ("b.0.mlp.experts.gate_up_proj", &[3, 4, 5]),
            ("b.0.mlp.experts.down_proj", &[3, 5, 2]),
            ("b.0.mlp.gate.weight", &[3, 5]),
        ];
        let own = stored("qwen3_moe", &stacks);
        let values = |c: &Checkpoint, name: &str| c.tensor(name).unwrap().to_f32().unwrap();
        let from = |start: usize| (start..start + 10).map(|v| v as f32).collect::<Vec<_>>();
        assert_eq!(own.names().count(), 10);
        assert_eq!(own.shape_of("b.0.mlp.experts.2.gate_proj.weight").unwrap(), [2, 5]);
        assert_eq!(values(&own, "b.0.mlp.experts.2.gate_proj.weight"), from(40));
        assert_eq!(values(&own, "b.0.mlp.experts.2.up_proj.weight"), from(50));
        assert_eq!(own.shape_of("b.0.mlp.experts.1.down_proj.weight").unwrap(), [5, 2]);
        assert_eq!(values(&own, "b.0.mlp.experts.1.down_proj.weight"), from(10));
        let mixtral = stored("mixtral", &stacks);
        assert_eq!(values(&mixtral, "b.0.block_sparse_moe.experts.2.w3.weight"), from(50));
        assert_eq!(values(&mixtral, "b.0.block_sparse_moe.experts.1.w2.weight"), from(10));
        assert!(mixtral.contains("b.0.block_sparse_moe.gate.weight") && !mixtral.contains("b.0.mlp.gate.weight"));
    }

    #[test]
    fn a_stack_of_columns_is_read_as_its_matrices() {
        // Of two experts with hidden 5 and width 3; more rows than a band of them.
        for (hidden, width) in [(5, 3), (7, 130)] {
            let stacks: [(&str, &[usize]); 2] = [
                ("b.0.feed_forward.experts.gate_up_proj", &[2, hidden, 2 * width]),
                ("b.0.feed_forward.experts.down_proj", &[2, width, hidden]),
            ];
            let own = stored("llama4_text", &stacks);
            assert_eq!(own.names().count(), 6);
            for (part, first, columns, [out, inner]) in [
                ("gate_proj", 0, 2 * width, [width, hidden]),
                ("up_proj", width, 2 * width, [width, hidden]),
                ("down_proj", 0, hidden, [hidden, width]),
            ] {
                let name = format!("b.0.feed_forward.experts.1.{part}.weight");
                let view = own.tensor(&name).unwrap();
                assert_eq!(view.shape, [out, inner]);
                let at = |i: usize| (inner * columns + i % inner * columns + first + i / inner) as f32;
                let expected: Vec<f32> = (0..out * inner).map(at).collect();
                assert_eq!(view.to_f32().unwrap(), expected, "{part}");
                assert_eq!(*view.by_rows(), *expected.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
            }
        }
    }

    #[test]
    fn what_is_no_stack_of_matrices_stays_as_it_is() {
        for (both, down) in [
            // The other way round, without its counterpart, of other sizes, empty.
            ([3, 5, 4], Some([3, 2, 5])),
            ([3, 4, 5], None),
            ([3, 4, 5], Some([2, 5, 2])),
            ([3, 4, 5], Some([3, 5, 3])),
            ([3, 0, 5], Some([3, 5, 0])),
        ] {
            let mut tensors: Vec<(&str, &[usize])> = vec![("b.mlp.experts.gate_up_proj", &both)];
            tensors.extend(down.as_ref().map(|d| ("b.mlp.experts.down_proj", &d[..])));
            let own = stored("mixtral", &tensors);
            assert_eq!(own.names().count(), tensors.len(), "{both:?} {down:?}");
            assert_eq!(own.shape_of("b.mlp.experts.gate_up_proj").unwrap(), both);
        }
    }
}

//! Decoding: sequences that grow by one token each at a time, with the keys and values of what came before kept.
//!
//! Many sequences grow in step, so that every weight is read once for all of them. The pieces are those of the forward
//! pass over a window; only attention is another loop, since every sequence has keys of its own.

use crate::attention::Scoring;
use crate::backward::values;
use crate::{Block, Embedding, Error, Role, RopeTable, ops};
use bitmill_kernels::{Level, axpys, fill_chunks};
use candle_core::{Device, Tensor};

/// Sequences of equal length under construction.
pub struct Decoder<'a> {
    embedding: &'a Embedding,
    blocks: Vec<&'a Block>,
    rope: &'a RopeTable,
    /// By block, then sequence.
    caches: Vec<Vec<Cache>>,
    capacity: usize,
    length: usize,
}

/// Keys that a query meets at a time.
const LANES: usize = 16;

/// Keys and values of one sequence in one block.
struct Cache {
    /// `[kv_heads, head_dim, capacity]`: a query meets all keys in one loop over contiguous scores.
    keys: Vec<f32>,
    /// `[capacity, kv_heads · head_dim]`.
    values: Vec<f32>,
    capacity: usize,
}

impl<'a> Decoder<'a> {
    /// No tokens yet, of `sequences` sequences that may grow to `capacity` tokens. `rope` must serve windows of
    /// `capacity`, whose frequencies every position uses.
    ///
    /// # Errors
    /// [`Error::Window`] when `rope` was built for another length.
    pub fn new(
        embedding: &'a Embedding,
        blocks: impl IntoIterator<Item = &'a Block>,
        rope: &'a RopeTable,
        sequences: usize,
        capacity: usize,
    ) -> Result<Self, Error> {
        rope.serves(capacity)?;
        let blocks: Vec<&Block> = blocks.into_iter().collect();
        let cache =
            |width: usize| Cache { keys: vec![0.0; width * capacity], values: vec![0.0; width * capacity], capacity };
        let caches = blocks.iter().map(|b| {
            let width = b.kv_width()?;
            Ok((0..sequences).map(|_| cache(width)).collect())
        });
        let caches = caches.collect::<Result<_, Error>>()?;
        Ok(Decoder { embedding, blocks, rope, caches, capacity, length: 0 })
    }

    /// Tokens that every sequence has.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Begins the only sequence with `tokens`, all at once; returns the residual stream `[1, hidden]` of the last of them
    /// after the last block.
    ///
    /// # Errors
    /// As [`Decoder::step`]; [`Error::Window`] for no tokens.
    ///
    /// # Panics
    /// Where there are several sequences, or one that has begun: a caller's bug.
    pub fn begin(&mut self, tokens: &[u32]) -> Result<Tensor, Error> {
        assert!(self.length == 0 && self.caches.iter().all(|c| c.len() == 1), "one sequence that has not begun");
        let count = tokens.len();
        if count == 0 || count > self.capacity {
            return Err(Error::Window { tokens: count, shortest: 1, longest: self.capacity });
        }
        let mut h = self.embedding.embed(tokens)?;
        for (block, caches) in self.blocks.iter().zip(&mut self.caches) {
            // The frequencies are those of the length that the sequence may grow to.
            let heads = block.turned(&block.attn_in(&h)?, self.rope.of_block(block.index, self.capacity)?)?;
            caches[0].fill(&values(&heads.k)?, &values(&heads.v)?, block.head_dim);
            let (middle, x) = block.mlp_in(&h, &block.attend(&heads)?)?;
            h = block.finish(&middle, &block.mlp_out(&x)?)?;
        }
        self.length = count;
        Ok(h.narrow(0, count - 1, 1)?.contiguous()?)
    }

    /// Adds a token to every sequence; returns the residual stream `[sequences, hidden]` after the last block, from which
    /// the head predicts the next.
    ///
    /// # Errors
    /// [`Error::Token`] for an id beyond the vocabulary; [`Error::Window`] beyond the capacity, [`Error::Positions`] beyond
    /// learned positions.
    pub fn step(&mut self, tokens: &[u32]) -> Result<Tensor, Error> {
        if self.length == self.capacity {
            return Err(Error::Window { tokens: self.length + 1, shortest: 1, longest: self.capacity });
        }
        let mut h = self.embedding.embed_next(tokens, self.length)?;
        for (block, caches) in self.blocks.iter().zip(&mut self.caches) {
            let x = block.attend_next(&block.attn_in(&h)?, self.rope, caches, self.length)?;
            let (middle, x) = block.mlp_in(&h, &x)?;
            h = block.finish(&middle, &block.mlp_out(&x)?)?;
        }
        self.length += 1;
        Ok(h)
    }
}

impl Block {
    /// Channels of the keys of all heads.
    fn kv_width(&self) -> Result<usize, Error> {
        match &self.shares.qkv {
            Some([_, k, _]) => Ok(k.iter().map(std::ops::Range::len).sum()),
            None => Ok(self.at(Role::K).matrix.rows()),
        }
    }

    /// [`Block::attn_out`] of the next token of every sequence: `x [sequences, hidden]` at position `at`.
    fn attend_next(&self, x: &Tensor, rope: &RopeTable, caches: &mut [Cache], at: usize) -> Result<Tensor, Error> {
        let rows = x.dim(0)?;
        let [mut q, mut k, v] = self.read([Role::Q, Role::K, Role::V], (Role::Qkv, self.shares.qkv.as_ref()), x)?;
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            (q, k) = (self.norm_heads(&q, q_norm)?, self.norm_heads(&k, k_norm)?);
        }
        if let Some(tempering) = self.tempering {
            ops::scale(&q, tempering.factor(at))?;
        }
        let (kv_width, group, dim) = (v.dim(1)?, self.group, self.head_dim);
        // Every row stands at the same position.
        let (q, k) = match rope.of_block(self.index, caches.first().map_or(1, |c| c.capacity))? {
            Some((cos, sin)) => {
                let row = |t: &Tensor| t.narrow(0, at, 1)?.repeat((rows, 1));
                let (cos, sin) = (row(cos)?, row(sin)?);
                let rotate = |x: &Tensor, group| ops::rotate(x, (&cos, &sin), (dim, group), self.pairs);
                (rotate(&q, group)?, rotate(&k, 1)?)
            }
            None => (self.by_head(&q, group)?, self.by_head(&k, 1)?),
        };
        let (k, v) = self.kept(k, v)?;
        let [q, k, v] = [q, k, v].map(|t| t.flatten_all()?.to_vec1::<f32>());
        let (q, k, v) = (q?, k?, v?);
        let first = self.scoring.sight.of(at, at + 1).start;
        for (row, cache) in caches.iter_mut().enumerate() {
            for head in 0..kv_width / dim {
                // Keys come by key-value head, then sequence.
                let key = &k[(head * rows + row) * dim..][..dim];
                cache.push(head, at, key, &v[row * kv_width + head * dim..][..dim], kv_width);
            }
        }
        let (heads, caches) = (kv_width / dim, &*caches);
        let mut out = vec![0.0f32; rows * kv_width * group];
        // By sequence, then head.
        let adds = 2 * out.len() * (at + 1 - first);
        fill_chunks(&mut out, group * dim, adds, |i, out| {
            let (row, head) = (i / heads, i % heads);
            let q = q[(head * rows + row) * group * dim..][..group * dim].chunks_exact(dim);
            let each = q.zip(out.chunks_exact_mut(dim));
            each.for_each(|(q, out)| caches[row].attend(q, (head, kv_width), first..at + 1, self.scoring, out));
        });
        Ok(Tensor::from_vec(out, (rows, kv_width * group), &Device::Cpu)?)
    }
}

impl Cache {
    /// Keeps the first `tokens` keys `[kv_heads, tokens, head_dim]` and values `[tokens, kv_heads · head_dim]`.
    fn fill(&mut self, keys: &[f32], values: &[f32], dim: usize) {
        self.values[..values.len()].copy_from_slice(values);
        let tokens = keys.len() / (self.keys.len() / self.capacity);
        for (head, keys) in keys.chunks_exact(tokens * dim).enumerate() {
            for (at, key) in keys.chunks_exact(dim).enumerate() {
                for (j, &k) in key.iter().enumerate() {
                    self.keys[(head * dim + j) * self.capacity + at] = k;
                }
            }
        }
    }

    fn push(&mut self, head: usize, at: usize, key: &[f32], value: &[f32], width: usize) {
        let dim = key.len();
        for (j, &k) in key.iter().enumerate() {
            self.keys[(head * dim + j) * self.capacity + at] = k;
        }
        self.values[at * width + head * dim..][..dim].copy_from_slice(value);
    }

    /// Mixes the values of the positions `seen` by the query `q [head_dim]`.
    fn attend(
        &self,
        q: &[f32],
        (head, width): (usize, usize),
        seen: std::ops::Range<usize>,
        scoring: Scoring,
        out: &mut [f32],
    ) {
        let (dim, level) = (q.len(), Level::best());
        // Whole registers of keys, where the cache has as many: the last are of no token, and of no use.
        let whole = seen.len().next_multiple_of(LANES).min(self.capacity - seen.start);
        let mut scores = vec![0.0f32; whole];
        axpys(level, q, (&self.keys[head * dim * self.capacity + seen.start..], self.capacity), &mut scores);
        let scores = &mut scores[..seen.len()];
        scoring.weigh(scores);
        axpys(level, scores, (&self.values[seen.start * width + head * dim..], width), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Head, spec};
    use serde_json::json;
    use std::collections::BTreeMap;

    #[test]
    fn tokens_one_by_one_see_what_a_window_sees() {
        let base = json!({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 40});
        for (model_type, more) in [
            ("llama", json!({})),
            ("qwen3", json!({"head_dim": 16})),
            ("mistral", json!({"sliding_window": 5})),
            ("qwen2", json!({})),
            (
                "gemma2",
                json!({"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9}),
            ),
            ("gemma3_text", json!({"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2})),
            ("phi3", json!({"partial_rotary_factor": 0.5})),
            ("olmo2", json!({})),
            ("granite", json!({"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.3})),
            ("smollm3", json!({"no_rope_layer_interval": 2})),
            (
                "llama4_text",
                json!({"head_dim": 8, "no_rope_layers": [1, 0], "attention_chunk_size": 5, "moe_layers": [1],
                    "intermediate_size_mlp": 40, "num_local_experts": 3, "floor_scale": 3, "attn_scale": 0.7}),
            ),
            ("gpt_neox", json!({})),
            ("gpt2", json!({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 12})),
            ("opt", json!({"ffn_dim": 48, "max_position_embeddings": 12})),
        ] {
            let mut config = base.clone();
            config["model_type"] = json!(model_type);
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let spec = spec(&config).unwrap();
            let random = |shape: &[usize]| Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap();
            let weights: BTreeMap<String, Tensor> =
                spec.tensors().into_iter().map(|slot| (slot.name, random(&slot.shape))).collect();
            let embedding = Embedding::load(&spec, &weights).unwrap();
            let blocks: Vec<Block> = (0..spec.layers).map(|i| Block::load(&spec, i, &weights).unwrap()).collect();
            let head = Head::load(&spec, &weights).unwrap();
            let rope = RopeTable::new(&spec.ropes, 12).unwrap();
            let texts: Vec<Vec<u32>> = (0..3u32).map(|s| (0..12).map(|t| (7 * s + 5 * t) % 40).collect()).collect();
            let mut decoder = Decoder::new(&embedding, &blocks, &rope, texts.len(), 12).unwrap();
            let windows: Vec<Vec<Vec<f32>>> = texts
                .iter()
                .map(|text| {
                    let mut h = embedding.embed(text).unwrap();
                    for block in &blocks {
                        h = block.forward(&h, &rope).unwrap();
                    }
                    head.logits(&h).unwrap().to_vec2().unwrap()
                })
                .collect();
            for t in 0..12 {
                assert_eq!(decoder.length(), t);
                let tokens: Vec<u32> = texts.iter().map(|text| text[t]).collect();
                let logits = head.logits(&decoder.step(&tokens).unwrap()).unwrap().to_vec2::<f32>().unwrap();
                for (logits, window) in logits.iter().zip(&windows) {
                    for (a, b) in logits.iter().zip(&window[t]) {
                        assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{model_type}, token {t}: {a} {b}");
                    }
                }
            }
            assert!(matches!(decoder.step(&[1, 1, 1]), Err(Error::Window { longest: 12, .. })), "beyond the capacity");
            // A prompt at once, and tokens after it.
            let mut decoder = Decoder::new(&embedding, &blocks, &rope, 1, 12).unwrap();
            let mut h = decoder.begin(&texts[0][..7]).unwrap();
            for t in 6..12 {
                let logits = head.logits(&h).unwrap().to_vec2::<f32>().unwrap();
                for (a, b) in logits[0].iter().zip(&windows[0][t]) {
                    assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{model_type}, token {t} after 7: {a} {b}");
                }
                if t < 11 {
                    h = decoder.step(&texts[0][t + 1..][..1]).unwrap();
                }
            }
        }
    }
}

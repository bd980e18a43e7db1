//! Text that a model writes itself: data where there is none, and new data where there is little (LLM-QAT, arXiv 2305.17888).
//!
//! Every text goes on from a few given tokens, by sampling from the model's predictions as they are. What a model says is
//! what its rounded self will have to say like it.

use crate::{Error, uniform};
use bitmill_models::{Block, Decoder, Embedding, Head, ModelSpec, RopeTable, draw, softmax};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Bytes of keys and values that texts in progress may take, which bounds how many grow at a time.
const CACHE: usize = 1 << 30;
/// Texts that grow at a time, at most: enough for their product with a weight to be worth reading it.
const TOGETHER: usize = 128;

/// A text.
#[derive(Debug)]
pub struct Written {
    /// Its tokens, those it was given included.
    pub tokens: Vec<u32>,
    /// The model's last hidden states on it, `[tokens, hidden]`.
    pub states: Tensor,
}

/// A model, writing.
#[derive(Debug, Clone, Copy)]
pub struct Author<'a> {
    /// Its embedding.
    pub embedding: &'a Embedding,
    /// Its blocks.
    pub blocks: &'a [Block],
    /// Its head.
    pub head: &'a Head,
    /// Its rotations.
    pub rope: &'a RopeTable,
    /// Tokens of a text.
    pub length: usize,
}

/// Bytes of the keys and values of a text of `length` tokens.
fn cache(spec: &ModelSpec, length: usize) -> usize {
    spec.layers * length * 2 * spec.kv_heads * spec.head_dim * size_of::<f32>()
}

/// How many texts of `length` tokens grow at a time. It fixes the shapes of products, so it depends on the model and the
/// length alone.
#[must_use]
pub fn together(spec: &ModelSpec, length: usize) -> usize {
    (CACHE / cache(spec, length).max(1)).clamp(1, TOGETHER)
}

/// Bytes that texts of `length` tokens take while they are written: keys, values and last hidden states.
#[must_use]
pub fn author_memory(spec: &ModelSpec, length: usize) -> usize {
    together(spec, length) * (cache(spec, length) + length * spec.hidden * size_of::<f32>())
}

impl Author<'_> {
    /// Goes on with `texts`, which are of one length, not empty and not longer than they are to be. `random(w, i)` is number
    /// `i`, from 1 on, drawn for text `w`.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn write(
        self,
        mut texts: Vec<Vec<u32>>,
        random: &(dyn Fn(usize, u64) -> u64 + Sync),
    ) -> Result<Vec<Written>, Error> {
        let prompt = texts.first().map_or(0, Vec::len);
        let mut states = vec![Vec::new(); texts.len()];
        let mut decoder = Decoder::new(self.embedding, self.blocks, self.rope, texts.len(), self.length)?;
        for at in 0..self.length {
            let h = decoder.step(&texts.iter().map(|text| text[at]).collect::<Vec<_>>())?;
            let width = h.dim(1)?;
            let rows = h.flatten_all()?.to_vec1::<f32>()?;
            states.iter_mut().zip(rows.chunks_exact(width)).for_each(|(states, row)| states.extend_from_slice(row));
            if at + 1 < prompt || at + 1 == self.length {
                continue;
            }
            let mut logits = self.head.logits(&h)?.flatten_all()?.to_vec1::<f32>()?;
            let vocab = logits.len() / texts.len();
            let each = texts.par_iter_mut().zip(logits.par_chunks_exact_mut(vocab)).enumerate();
            each.for_each(|(w, (text, row))| {
                softmax(row, 1.0);
                text.push(draw(row, uniform(random(w, at as u64))) as u32);
            });
        }
        let width = states.first().map_or(0, Vec::len) / self.length;
        let written = |(tokens, states)| {
            let states = Tensor::from_vec(states, (self.length, width), &Device::Cpu)?;
            Ok(Written { tokens, states })
        };
        texts.into_iter().zip(states).map(written).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splitmix;
    use std::collections::BTreeMap;

    #[test]
    fn texts_go_on_from_what_they_are_given_with_the_states_of_the_forward_pass() {
        let config = serde_json::json!({"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 40});
        let spec = bitmill_models::spec(&config).unwrap();
        let random = |shape: &[usize]| Tensor::randn(0.0f32, 0.3, shape, &Device::Cpu).unwrap();
        let weights: BTreeMap<String, Tensor> =
            spec.tensors().into_iter().map(|slot| (slot.name, random(&slot.shape))).collect();
        let embedding = Embedding::load(&spec, &weights).unwrap();
        let blocks: Vec<Block> = (0..spec.layers).map(|i| Block::load(&spec, i, &weights).unwrap()).collect();
        let (head, rope) = (Head::load(&spec, &weights).unwrap(), RopeTable::new(&spec.ropes, 48).unwrap());
        let author = Author { embedding: &embedding, blocks: &blocks, head: &head, rope: &rope, length: 48 };
        assert_eq!(together(&spec, 48), TOGETHER);
        // Two blocks, two heads of eight channels, keys and values in f32: 256 bytes a token, and 64 of hidden states.
        assert_eq!(author_memory(&spec, 48), TOGETHER * 48 * (256 + 64));
        assert_eq!(together(&spec, 1 << 30), 1);
        let starts: Vec<Vec<u32>> = (0..3u32).map(|w| (0..16).map(|t| (w + 3 * t) % 40).collect()).collect();
        let drawn = |seed: u64| move |w: usize, i: u64| splitmix(seed ^ splitmix(i ^ ((w as u64) << 32)));
        let written = author.write(starts.clone(), &drawn(1)).unwrap();
        assert_eq!(written.len(), 3);
        for (text, start) in written.iter().zip(&starts) {
            assert_eq!((text.tokens.len(), &text.tokens[..16]), (48, &start[..]));
            let mut h = embedding.embed(&text.tokens).unwrap();
            for block in &blocks {
                h = block.forward(&h, &rope).unwrap();
            }
            let (h, states) = (h.to_vec2::<f32>().unwrap().concat(), text.states.to_vec2::<f32>().unwrap().concat());
            assert!(h.iter().zip(&states).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs().max(1.0)));
        }
        let tokens = |seed: u64| -> Vec<Vec<u32>> {
            author.write(starts.clone(), &drawn(seed)).unwrap().into_iter().map(|w| w.tokens).collect()
        };
        assert_eq!(tokens(1), written.iter().map(|w| w.tokens.clone()).collect::<Vec<_>>());
        assert_ne!(tokens(1), tokens(2), "other numbers, other texts");
    }
}

//! Text that the full-precision model writes itself, to learn from besides the calibration text.
//!
//! A few windows seen many times are learned by heart: their names and turns of phrase, not what the model knows. What the
//! teacher writes is new in every pass, needs no data, and is what the student has to say like it (LLM-QAT,
//! arXiv 2305.17888). Each text goes on from a few tokens taken out of a calibration window, so it also stays near the
//! calibration text.

use crate::Error;
use bitmill_calibrate::uniform;
use bitmill_models::{Block, Decoder, Embedding, Head, ModelSpec, RopeTable, draw, softmax};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Tokens that a text starts from, the first of its window among them.
const PROMPT: usize = 16;
/// Bytes of keys and values that texts in progress may take, which bounds how many grow at a time.
const CACHE: usize = 1 << 30;
/// Texts that grow at a time, at most: enough for their product with a weight to be worth reading it.
const TOGETHER: usize = 32;

/// A text, and the teacher's last hidden states on it `[tokens, hidden]`.
pub(super) struct Written {
    pub(super) tokens: Vec<u32>,
    pub(super) states: Tensor,
}

/// The full-precision model, writing.
#[derive(Clone, Copy)]
pub(super) struct Author<'a> {
    pub(super) embedding: &'a Embedding,
    pub(super) blocks: &'a [Block],
    pub(super) head: &'a Head,
    pub(super) rope: &'a RopeTable,
    /// Tokens of a text.
    pub(super) length: usize,
}

/// Bytes of the keys and values of a text of `length` tokens.
fn cache(spec: &ModelSpec, length: usize) -> usize {
    spec.layers * length * 2 * spec.kv_heads * spec.head_dim * size_of::<f32>()
}

/// How many texts of `length` tokens grow at a time. It fixes the shapes of products, so it depends on the model and the
/// length alone.
pub(super) fn together(spec: &ModelSpec, length: usize) -> usize {
    (CACHE / cache(spec, length).max(1)).clamp(1, TOGETHER)
}

/// Bytes that the texts in progress take: keys, values and last hidden states.
pub(super) fn memory(spec: &ModelSpec, length: usize) -> usize {
    together(spec, length) * (cache(spec, length) + length * spec.hidden * size_of::<f32>())
}

impl Author<'_> {
    /// A text for each of `windows`, from some of its tokens. `random(w, i)` is number `i` drawn for text `w`.
    pub(super) fn write(
        self,
        windows: &[&[u32]],
        random: &(dyn Fn(usize, u64) -> u64 + Sync),
    ) -> Result<Vec<Written>, Error> {
        let prompt = PROMPT.min(self.length);
        let begin = |(w, window): (usize, &&[u32])| {
            let from = 1 + random(w, 0) as usize % (window.len() - prompt + 1);
            [&window[..1], &window[from..][..prompt - 1]].concat()
        };
        let mut texts: Vec<Vec<u32>> = windows.iter().enumerate().map(begin).collect();
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
    use crate::tiny;
    use bitmill_calibrate::splitmix;

    #[test]
    fn texts_go_on_from_their_windows_with_the_states_of_the_forward_pass() {
        let (spec, weights) = tiny::llama(16, 2, 0.3);
        let embedding = Embedding::load(&spec, &weights).unwrap();
        let blocks: Vec<Block> = (0..spec.layers).map(|i| Block::load(&spec, i, &weights).unwrap()).collect();
        let (head, rope) = (Head::load(&spec, &weights).unwrap(), RopeTable::new(&spec.ropes, 48).unwrap());
        let author = Author { embedding: &embedding, blocks: &blocks, head: &head, rope: &rope, length: 48 };
        assert_eq!(together(&spec, 48), TOGETHER);
        // Two blocks, two heads of eight channels, keys and values in f32: 256 bytes a token, and 64 of hidden states.
        assert_eq!(memory(&spec, 48), TOGETHER * 48 * (256 + 64));
        assert_eq!(together(&spec, 1 << 30), 1);
        let windows: Vec<Vec<u32>> = (0..3u32).map(|w| (0..48).map(|t| (w + 3 * t) % 40).collect()).collect();
        let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        let drawn = |seed: u64| move |w: usize, i: u64| splitmix(seed ^ splitmix(i ^ ((w as u64) << 32)));
        let written = author.write(&windows, &drawn(1)).unwrap();
        assert_eq!(written.len(), 3);
        for (text, window) in written.iter().zip(&windows) {
            assert_eq!((text.tokens.len(), text.tokens[0]), (48, window[0]));
            assert!(window.windows(PROMPT - 1).any(|part| part == &text.tokens[1..PROMPT]), "a prompt of the window");
            let mut h = embedding.embed(&text.tokens).unwrap();
            for block in &blocks {
                h = block.forward(&h, &rope).unwrap();
            }
            let (h, states) = (h.to_vec2::<f32>().unwrap().concat(), text.states.to_vec2::<f32>().unwrap().concat());
            assert!(h.iter().zip(&states).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs().max(1.0)));
        }
        let tokens = |seed: u64| -> Vec<Vec<u32>> {
            author.write(&windows, &drawn(seed)).unwrap().into_iter().map(|w| w.tokens).collect()
        };
        assert_eq!(tokens(1), written.iter().map(|w| w.tokens.clone()).collect::<Vec<_>>());
        assert_ne!(tokens(1), tokens(2), "another pass, other texts");
    }
}

//! The calibration pass: text through the full-precision model once, statistics of every site out.

use crate::{Error, SiteStats, Stream, StreamKind, Tokens, Windows, in_order};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Block, Embedding, ModelSpec, RopeTable, SITES};
use candle_core::{Device, Tensor};
use std::path::Path;

/// Tokens whose activations are in memory at a time. It fixes the order of sums, so it is a constant.
const BATCH_TOKENS: usize = 16_384;

/// A model and how its activations are kept.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The full-precision model.
    pub model: &'a Checkpoint,
    /// Its architecture.
    pub spec: &'a ModelSpec,
    /// Bytes of activations kept in memory; beyond it, streams live in `spill_dir`.
    pub stream_memory: u64,
    /// Folder of spill files.
    pub spill_dir: &'a Path,
}

impl Pass<'_> {
    /// The residual stream that enters the first block.
    pub(crate) fn embed(&self, windows: &Windows, kind: StreamKind, budget: u64) -> Result<Stream, Error> {
        let spill = self.spill_dir.join(format!(".bitmill-pass-{}", std::process::id()));
        let stream = Stream::of_lengths(kind, &windows.lengths(), self.spec.hidden, budget, &spill)?;
        let embedding = Embedding::load(self.spec, self.model)?;
        in_order(windows.count(), 16, |w| stream.write(w, &rows(&embedding.embed(windows.get(w)?)?)?), |_, _| Ok(()))?;
        Ok(stream)
    }
}

/// Receives the index of a block and the statistics of its sites.
pub type BlockSink<'a, E> = &'a mut dyn FnMut(usize, &[SiteStats; 4]) -> Result<(), E>;

/// Runs `windows` through the model block by block and hands the statistics of every block's sites, in the order of
/// `SITES`, to `block`. Memory holds one block, the statistics of its sites and one activation stream.
///
/// # Errors
/// [`Error::NonFinite`] where activations overflow; whatever reading and running the model reports; errors of `block`.
pub fn collect<E: From<Error>>(pass: Pass<'_>, windows: &Windows, each: BlockSink<'_, E>) -> Result<(), E> {
    let rope = RopeTable::new(&pass.spec.ropes, windows.length).map_err(Error::from)?;
    let hidden = pass.embed(windows, StreamKind::Bf16, pass.stream_memory)?;
    for index in 0..pass.spec.layers {
        let block = Block::load(pass.spec, index, pass.model).map_err(Error::from)?;
        let stats = pass.observe(index, &block, &rope, &hidden, &hidden, windows.length)?;
        each(index, &stats)?;
    }
    Ok(())
}

impl Pass<'_> {
    /// Moves every window, of at most `length` tokens, past `block`, which is block `index`, and returns what was seen at
    /// its sites.
    pub(crate) fn observe(
        &self,
        index: usize,
        block: &Block,
        rope: &RopeTable,
        from: &Stream,
        to: &Stream,
        length: usize,
    ) -> Result<[SiteStats; 4], Error> {
        let spec = self.spec;
        let mut stats = SITES.each_ref().map(|at| SiteStats::new(spec.linear_shape(at.linears[0])[1]));
        let compute = |w| -> Result<[Tokens; 4], Error> {
            let values = from.read(w)?;
            let tokens = values.len() / spec.hidden;
            let h = Tensor::from_vec(values, (tokens, spec.hidden), &Device::Cpu)?;
            let attn_in = block.attn_in(&h)?;
            let attn_out = block.attn_out(&attn_in, rope)?;
            let (h, mlp_in) = block.mlp_in(&h, &attn_out)?;
            let mlp_out = block.mlp_out(&mlp_in)?;
            let tokens = |x: &Tensor| Ok::<_, Error>(Tokens::new(rows(x)?, x.dim(1)?));
            let seen = [tokens(&attn_in)?, tokens(&attn_out)?, tokens(&mlp_in)?, tokens(&mlp_out)?];
            to.write(w, &rows(&block.finish(&h, &mlp_out)?)?)?;
            Ok(seen)
        };
        let batch = (BATCH_TOKENS / length).clamp(1, 64);
        in_order(from.windows(), batch, compute, |_, activations: Vec<[Tokens; 4]>| {
            for (i, stats) in stats.iter_mut().enumerate() {
                stats.add_parts(&activations.iter().map(|seen| &seen[i]).collect::<Vec<_>>());
            }
            Ok(())
        })?;
        match SITES.iter().zip(&stats).find(|(_, s)| !s.is_finite()) {
            Some((at, _)) => Err(Error::NonFinite { block: index, site: at.name.into() }),
            None => Ok(stats),
        }
    }
}

pub(crate) fn rows(t: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(t.flatten_all()?.to_vec1()?)
}

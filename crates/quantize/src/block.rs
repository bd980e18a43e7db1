//! One calibrated block: activations in, quantized linears out, activations on.
//!
//! The block runs in the five pieces its sites cut it into. At each site the statistics of all windows are collected,
//! the linears it feeds are rounded, and the run goes on with the rounded ones (true-sequential order), so nothing is
//! computed twice.

mod solve;

pub(crate) use solve::{Input, solve_targets};

use crate::experts::Routed;
use crate::journal::{SiteRecord, TensorRecord};
use crate::learn::{Start, ToStored};
use crate::reconstruction::{Rebuild, RebuiltBlock};
use crate::seen::{Glimpse, Seen};
use crate::token_weights::{Look, token_weights};
use crate::{Action, Error, PlannedTensor, Solved};
use crate::{Method, Observation, SolverOptions, TargetShift, TokenWeights};
use bitmill_calibrate::{Spare, Stream, StreamKind, Tokens, in_order, overlapped};
use bitmill_models::{Block, ModelSpec, Role, RopeTable, Site, WindowPast, values};
use bitmill_scheme::{Activations, ScaleType, Scheme};
use candle_core::{Device, Tensor};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Tokens whose activations are in memory at a time. It fixes the order of sums, so it is a constant.
pub(crate) const BATCH_TOKENS: usize = 16_384;
/// Numbers of them of one stream, which limit the tokens of wide sites: 256 MB.
const BATCH_NUMBERS: usize = 1 << 26;
/// Width up to which tokens come in smaller batches, each of which goes into sums while the next is computed: H is small enough
/// to be gone through more often, and what is seen stays in a cache until then.
const NARROW: usize = 2048;
const NARROW_TOKENS: usize = 4096;

/// Sites of a block, each of which begins a piece; one more begins with the last.
const SITES: usize = 4;

/// Weights of a linear that stay in the second cache of a core in bfloat16 beside another's and the activations of as many tokens.
const FEW_WEIGHTS: usize = 1 << 18;
const FEW_TOKENS: usize = 128;

/// Bytes of the activations of one stream that are in memory at a time, where they are of width `n`.
pub(crate) fn batch_bytes(n: u64) -> u64 {
    4 * (BATCH_TOKENS as u64 * n).min(BATCH_NUMBERS as u64)
}

/// The calibration text on its way through the model.
pub(crate) struct Flow<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) rope: &'a RopeTable,
    /// Tokens of each window.
    pub(crate) lengths: &'a [usize],
    /// How often each token of each window occurs in the text; empty unless tokens count by that.
    pub(crate) occurrences: &'a [Vec<f32>],
    /// Bytes one stream may take in memory.
    pub(crate) budget: u64,
    /// Folder of spilled streams.
    pub(crate) spill: &'a Path,
    /// Memory of the streams between the pieces of blocks.
    pub(crate) spare: &'a Arc<Spare>,
    /// Residual stream that enters the block; what leaves it, afterwards.
    pub(crate) hidden: &'a Stream,
    /// The same of the full-precision model, where it runs beside the rounded one.
    pub(crate) full: Option<&'a Stream>,
    /// Whether no block follows, so that nobody asks what leaves this one.
    pub(crate) last: bool,
    pub(crate) observation: Observation,
    /// The type of the scales of keys and values, where these are to be kept as 8-bit floats.
    pub(crate) cache: Option<ScaleType>,
    /// How a block is refined once its linears are rounded, if it is.
    pub(crate) rebuild: Option<Rebuild<'a>>,
}

/// A linear of the block that is to be quantized.
pub(crate) struct Target<'a> {
    pub(crate) module: &'a str,
    pub(crate) role: Role,
    pub(crate) scheme: Scheme,
    pub(crate) shape: [usize; 2],
    pub(crate) bytes: u64,
    /// Rounding of its bias to the stored type, where it has one that can be changed.
    pub(crate) bias: Option<ToStored>,
}

impl<'a> Target<'a> {
    pub(crate) fn of(tensor: &'a PlannedTensor) -> Option<Self> {
        match &tensor.action {
            Action::Quantize { module, role: Some(role), scheme, shape } => {
                Some(Target { module, role: *role, scheme: *scheme, shape: *shape, bytes: tensor.bytes, bias: None })
            }
            _ => None,
        }
    }
}

/// What happens while a block is rounded.
pub(crate) enum Moment<'a> {
    /// A site is about to be worked.
    Site(&'a Site),
    /// What calibration saw there.
    Seen(SiteRecord),
    /// A linear is finished.
    Finished(Box<Done>),
    /// The scales of keys and values are known.
    Cache([f32; 2]),
    /// The block is being reconstructed: steps done, and their number.
    Rebuilding(usize, usize),
    /// It is, and some of what was finished is replaced.
    Rebuilt(Box<RebuiltBlock>),
}

/// A finished linear.
pub(crate) struct Done {
    pub(crate) module: String,
    pub(crate) solved: Solved,
    pub(crate) record: TensorRecord,
    /// Its bias, where that has changed, in values of the stored type.
    pub(crate) bias: Option<Vec<f32>>,
}

/// The two streams of a flow at a site: the rounded model's, and the full-precision model's where it runs beside it.
pub(crate) struct Lanes {
    pub(crate) rounded: Stream,
    pub(crate) full: Option<Stream>,
}

/// One stream through one piece of a block.
struct Lane<'a> {
    block: &'a Block,
    hidden: &'a Stream,
    x: Option<&'a Stream>,
    /// Where its output goes, if anybody asks for it.
    next: Option<&'a Stream>,
}

impl Flow<'_> {
    /// Rounds the `targets` of `block`, which is block `index`, and moves the flow past it; `on` is told what happens.
    pub(crate) fn quantize_block(
        &self,
        index: usize,
        mut block: Block,
        targets: &[Target<'_>],
        (method, options): (&dyn Method, &SolverOptions),
        on: &mut dyn FnMut(Moment<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let spec = self.spec;
        let mut full = self.full.map(|hidden| (block.clone(), hidden));
        // The stream is overwritten on its way through the block, which reconstruction enters again.
        let entered = self.rebuild.map(|_| self.entered()).transpose()?;
        let mut start = entered.as_ref().map(|_| Vec::new());
        let mut x: Option<Lanes> = None;
        let mut weights = None;
        let room = spec.sites(index).iter().map(|at| spec.linear_shape(at.linears[0])[1]).max().unwrap_or(0);
        for (i, at) in spec.sites(index).iter().enumerate() {
            on(Moment::Site(at))?;
            let width = spec.linear_shape(at.linears[0])[1];
            let wanted: Vec<&Target<'_>> = targets.iter().filter(|t| at.linears.contains(&t.role)).collect();
            // What O and Down put out is added to the residual stream.
            let hidden = if i % 2 == 1 { spec.hidden } else { 0 };
            let mut seen =
                (!wanted.is_empty()).then(|| Seen::new(self.observation, width, hidden, self.hidden.windows()));
            // What enters the last linears of all is seen, and read by nobody.
            let unread = i == 3 && self.last && self.rebuild.is_none();
            let lanes = || -> Result<Lanes, Error> {
                let stream = |name: &str| self.stream(width, room, name);
                let full = full.as_ref().map(|_| stream(&format!("full-{}", at.name))).transpose()?;
                Ok(Lanes { rounded: stream(at.name)?, full })
            };
            let next = (!unread).then(lanes).transpose()?;
            if i == 0 && !targets.is_empty() {
                weights = self.token_weights(&block)?;
            }
            if let (1, Some(scale), Some(x)) = (i, self.cache, &x) {
                let scales = self.cache_scales(&block, &x.rounded, scale)?;
                block.set_cache(Some(scales));
                on(Moment::Cache(scales))?;
            }
            if let Some(before) = i.checked_sub(1) {
                let roles = spec.sites(index)[before].linears;
                block.prepare(roles)?;
                full.iter().try_for_each(|(full, _)| full.prepare(roles))?;
            }
            let glimpse = |w: usize| self.glimpse((i, width), &block, full.as_ref(), x.as_ref(), next.as_ref(), w);
            self.windows(width, glimpse, &mut |first, glimpses| {
                if let Some(seen) = &mut seen {
                    let weights = weights.as_ref().map(|all| &all[first..first + glimpses.len()]);
                    seen.add(first, &glimpses, weights);
                }
                glimpses.into_iter().for_each(|glimpse| self.spare.keep_of(glimpse.seen));
            })?;
            if let (Some(before), None) = (i.checked_sub(1), &entered) {
                // Nothing runs through them again.
                for role in spec.sites(index)[before].linears {
                    block.forget(*role);
                    full.iter_mut().for_each(|(full, _)| full.forget(*role));
                }
            }
            x = next;
            if let (2, Some(_), Some(x)) = (i, spec.routed(index), &x) {
                let from = Routed { x, weights: weights.as_deref(), full: full.as_ref().map(|(block, _)| block) };
                self.quantize_experts((index, &mut block), &from, targets, (method, options), &mut start, on)?;
                // They leave no activation between them: what follows starts from this one.
                break;
            }
            let Some(seen) = seen else { continue };
            if !seen.is_finite() {
                return Err(bitmill_calibrate::Error::NonFinite { block: index, site: at.name.into() }.into());
            }
            let (site, tokens) = (at.name.into(), seen.tokens());
            on(Moment::Seen(SiteRecord { block: index, site, tokens, prior: None, spread: seen.spread() }))?;
            self.round_site(&mut block, &wanted, seen, (method, options), &mut start, on)?;
        }
        let (Some(x), false) = (x, self.last && entered.is_none()) else { return Ok(()) };
        let last = spec.sites(index).last().map_or(&[][..], |site| site.linears);
        block.prepare(last)?;
        full.iter().try_for_each(|(full, _)| full.prepare(last))?;
        let finish = |w: usize| {
            if entered.is_none() {
                self.finish(&block, self.hidden, &x.rounded, w)?;
            }
            if let (Some((block, hidden)), Some(x)) = (&full, &x.full) {
                self.finish(block, hidden, x, w)?;
            }
            Ok(())
        };
        self.each_window(finish)?;
        match (entered, full, start) {
            (Some(entered), Some((full, _)), Some(start)) => self.rebuild(index, [block, full], start, &entered, on),
            _ => Ok(()),
        }
    }

    /// Rounds `targets`, which read what was `seen`, and puts them into the block; what they are rounded to is added to
    /// `start`, where that is wanted.
    pub(crate) fn round_site(
        &self,
        block: &mut Block,
        targets: &[&Target<'_>],
        seen: Seen,
        (method, options): (&dyn Method, &SolverOptions),
        start: &mut Option<Vec<Start>>,
        on: &mut dyn FnMut(Moment<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for (role, done) in self.solve_site(block, targets, seen, method, options)? {
            let [rows, cols] = done.solved.quantized.shape;
            let weight = done.solved.quantized.dequantize();
            block.set_linear(role, Tensor::from_vec(weight, (rows, cols), &Device::Cpu)?);
            block.set_inputs(role, done.solved.quantized.inputs());
            if let Some(bias) = &done.bias {
                block.set_bias(role, Some(Tensor::from_vec(bias.clone(), rows, &Device::Cpu)?));
            }
            if let Some(start) = start {
                start.push((role, done.solved.quantized.clone()));
            }
            on(Moment::Finished(Box::new(done)))?;
        }
        Ok(())
    }

    /// Scales of type `scale` that cover the keys and values of all windows.
    fn cache_scales(&self, block: &Block, x: &Stream, scale: ScaleType) -> Result<[f32; 2], Error> {
        let mut most = [0.0f32; 2];
        let one = |w: usize| Ok(block.cache_range(&self.tensor(x, w)?, self.rope)?);
        self.windows(0, one, &mut |_, ranges| {
            ranges.iter().for_each(|range| most.iter_mut().zip(range).for_each(|(m, r)| *m = m.max(*r)));
        })?;
        Ok(most.map(|amax| Activations::StaticFp8.calibrated(amax, scale).unwrap_or(1.0)))
    }

    fn finish(&self, block: &Block, hidden: &Stream, x: &Stream, w: usize) -> Result<(), Error> {
        for part in self.parts(x.width(), w) {
            let input = self.input(block, SITES, x, w, &part)?;
            let out = block.finish(&self.some(hidden, w, &part)?, &input)?;
            hidden.write_tokens(w, part.start, &values(&out)?)?;
        }
        Ok(())
    }

    /// Tokens of window `w` that go through a piece together whose linears are between the residual stream and `width`. Where the
    /// weights stay in a cache beside their activations, few do, for these to stay there as well.
    fn parts(&self, width: usize, w: usize) -> impl Iterator<Item = Range<usize>> {
        let length = self.lengths[w];
        let few = if self.few(width) { FEW_TOKENS } else { length.max(1) };
        (0..length).step_by(few).map(move |from| from..length.min(from + few))
    }

    /// Whether weights between the residual stream and `width` stay in a cache.
    fn few(&self, width: usize) -> bool {
        self.spec.hidden * width <= FEW_WEIGHTS
    }

    /// Moves window `w` through piece `i` of the block and returns what is seen at its site, which is so wide.
    fn glimpse(
        &self,
        (i, width): (usize, usize),
        block: &Block,
        full: Option<&(Block, &Stream)>,
        x: Option<&Lanes>,
        next: Option<&Lanes>,
        w: usize,
    ) -> Result<Glimpse, Error> {
        let (hidden, tokens) = (self.hidden, self.lengths[w]);
        let lane = Lane { block, hidden, x: x.map(|x| &x.rounded), next: next.map(|next| &next.rounded) };
        let panels = self.observation.rounds().filter(|_| Tokens::can_be_rounded(tokens, width));
        let panels = panels.map(|short| self.spare.panels(short));
        let mut glimpse = Glimpse { seen: Tokens::to_come(tokens, width, panels), ..Glimpse::default() };
        let by_columns = i == 3
            && self.few(width)
            && full.is_none()
            && glimpse.seen.are_rounded()
            && block.has_strips()
            && lane.next.is_none_or(Stream::takes_columns);
        if by_columns {
            for part in self.parts(width, w) {
                self.strips(&lane, w, &part, &mut glimpse.seen)?;
            }
            return Ok(self.seen(glimpse, x, w));
        }
        // Attention looks at all of a window, or at least at what came before.
        let mut past = (i == 1).then(|| block.begin_window()).flatten();
        let mut full_past = full.filter(|_| i == 1).and_then(|(full, _)| full.begin_window());
        let whole = i == 1 && past.is_none();
        for part in whole.then_some(0..tokens).into_iter().chain(self.parts(width, w).filter(|_| !whole)) {
            let seen = self.piece(i, &lane, w, (&part, past.as_mut()))?;
            let seen = values(&seen)?;
            if let Some((block, full)) = full {
                let next = next.and_then(|next| next.full.as_ref());
                let lane = Lane { block, hidden: full, x: x.and_then(|x| x.full.as_ref()), next };
                let drift = self.piece(i, &lane, w, (&part, full_past.as_mut()))?;
                glimpse.drift.extend(values(&drift)?.iter().zip(&seen[..]).map(|(d, x)| d - x));
                if i % 2 == 1 && self.observation.shift == TargetShift::Outputs {
                    let [full, rounded] = [*full, hidden].map(|stream| stream.read_tokens(w, part.clone()));
                    glimpse.residual.extend(full?.iter().zip(rounded?).map(|(d, h)| d - h));
                }
            }
            glimpse.seen.push(&seen);
        }
        Ok(self.seen(glimpse, x, w))
    }

    /// What was seen of window `w`, which is of no more use in `x`.
    fn seen(&self, mut glimpse: Glimpse, x: Option<&Lanes>, w: usize) -> Glimpse {
        if glimpse.seen.are_rounded() && Tokens::can_be_multiplied(self.lengths[w], glimpse.seen.width()) {
            self.spare.keep(glimpse.seen.multiply(self.spare.square()));
        }
        // The next window of what follows may take its place.
        for x in x.into_iter().flat_map(|x| [Some(&x.rounded), x.full.as_ref()]).flatten() {
            x.release(w);
        }
        glimpse
    }

    /// Piece 3 of the block for some tokens of window `w`, by columns: what they put out goes to where it is seen, and to where it
    /// goes on from, while the first cache holds it.
    fn strips(&self, lane: &Lane<'_>, w: usize, part: &Range<usize>, seen: &mut Tokens) -> Result<(), Error> {
        let Lane { block, x, next, .. } = *lane;
        let Some(x) = x else { unreachable!("a piece before this one") };
        let input = self.input(block, 3, x, w, part)?;
        seen.await_columns(part.len());
        match next {
            Some(next) => next.write_columns(w, part.clone(), |write| {
                Ok(block.mlp_strips(&input, &mut |columns, strip| {
                    seen.push_columns(columns, strip);
                    write(strip);
                })?)
            }),
            None => Ok(block.mlp_strips(&input, &mut |columns, strip| seen.push_columns(columns, strip))?),
        }
    }

    /// Piece `i` of the block for some tokens of window `w`, of which those before left `past` if they are not all: returns the
    /// activation at its site, and writes it to where it goes on from.
    fn piece(
        &self,
        i: usize,
        lane: &Lane<'_>,
        w: usize,
        (part, past): (&Range<usize>, Option<&mut WindowPast>),
    ) -> Result<Tensor, Error> {
        let Lane { block, hidden: stream, x, next } = *lane;
        let hidden = || self.some(stream, w, part);
        let input = || match x {
            Some(x) => self.input(block, i, x, w, part),
            None => hidden(),
        };
        let out = match i {
            0 => block.attn_in(&hidden()?)?,
            1 => match past {
                Some(past) => block.attn_part(past, &input()?, self.rope, self.lengths[w])?,
                None => block.attn_out(&input()?, self.rope)?,
            },
            2 => {
                let (h, out) = block.mlp_in(&hidden()?, &input()?)?;
                stream.write_tokens(w, part.start, &values(&h)?)?;
                out
            }
            _ => block.mlp_out(&input()?)?,
        };
        if let Some(next) = next {
            next.write_tokens(w, part.start, &values(&out)?)?;
        }
        Ok(out)
    }

    /// Weights of the tokens of every window; `None` where all count alike.
    fn token_weights(&self, block: &Block) -> Result<Option<Vec<Vec<f32>>>, Error> {
        let how = self.observation.tokens;
        if how == TokenWeights::Equal {
            return Ok(None);
        }
        let compute = |w: usize| -> Result<Vec<f32>, Error> {
            let enters = || self.tensor(self.hidden, w);
            let width = self.spec.hidden;
            Ok(match how {
                TokenWeights::Equal | TokenWeights::First | TokenWeights::FirstLast => {
                    token_weights(how, Look::Places(self.lengths[w]))
                }
                TokenWeights::Attention | TokenWeights::NoSinks => {
                    let shares = block.concentration(&block.attn_in(&enters()?)?, self.rope)?;
                    token_weights(how, Look::Attention(&shares))
                }
                TokenWeights::Norm | TokenWeights::Distinct => {
                    token_weights(how, Look::Entering(&rows(&enters()?)?, width))
                }
                TokenWeights::Change => {
                    let x = enters()?;
                    let y = block.forward(&x, self.rope)?;
                    token_weights(how, Look::Passing([&rows(&x)?, &rows(&y)?], width))
                }
                TokenWeights::Rare => token_weights(how, Look::Occurrences(&self.occurrences[w])),
            })
        };
        let mut weights = Vec::new();
        self.windows(0, compute, &mut |_, part| weights.extend(part))?;
        Ok(Some(weights))
    }

    /// Runs `compute` for all windows and hands what it returns, which is of `width` numbers for each token and stream, to
    /// `consume`, in window order, with the first window of each batch.
    pub(crate) fn windows<T: Send>(
        &self,
        width: usize,
        compute: impl Fn(usize) -> Result<T, Error> + Sync,
        consume: &mut (dyn FnMut(usize, Vec<T>) + Send),
    ) -> Result<(), Error> {
        let (windows, longest) = (self.hidden.windows(), self.lengths.iter().copied().max().unwrap_or(1));
        let consume = |first: usize, results: Vec<T>| {
            consume(first, results);
            Ok(())
        };
        if width > NARROW {
            let batch = BATCH_TOKENS.min(BATCH_NUMBERS / width) / longest;
            return in_order(windows, batch.clamp(1, 64), compute, consume);
        }
        let mean = self.lengths.iter().sum::<usize>().div_ceil(windows.max(1)).max(1);
        let batch = (NARROW_TOKENS / mean).min(BATCH_TOKENS / 2 / longest).max(1);
        overlapped(windows, (batch, BATCH_TOKENS / (batch * longest)), compute, consume)
    }

    /// Runs `pass` for all windows.
    pub(crate) fn each_window(&self, pass: impl Fn(usize) -> Result<(), Error> + Sync) -> Result<(), Error> {
        let windows = self.hidden.windows();
        in_order(windows, windows.max(1), pass, |_, _| Ok(()))
    }

    /// A stream of a site; those of a block, of which the widest has tokens of width `room`, take turns in memory.
    fn stream(&self, width: usize, room: usize, site: &str) -> Result<Stream, Error> {
        let spill = self.spill.join(format!("site-{site}"));
        let fits = Stream::bytes(StreamKind::Bf16, 1, self.lengths.iter().sum(), room) <= self.budget;
        let stream = Stream::of_lengths(StreamKind::Bf16, self.lengths, width, self.budget, &spill)?;
        Ok(stream.within(self.spare, if fits { room } else { width }))
    }

    pub(crate) fn tensor(&self, stream: &Stream, w: usize) -> Result<Tensor, Error> {
        self.some(stream, w, &(0..self.lengths[w]))
    }

    /// Some tokens of window `w` of `x`, which piece `i` of the block begins with: in bfloat16, as they are kept, where that is what
    /// they would be rounded to.
    fn input(&self, block: &Block, i: usize, x: &Stream, w: usize, tokens: &Range<usize>) -> Result<Tensor, Error> {
        let read_by = self.spec.sites(block.index())[i - 1].linears;
        if !block.reads_rounded(read_by) {
            return self.some(x, w, tokens);
        }
        let values = x.read_rounded(w, tokens.clone())?;
        Ok(Tensor::from_vec(values, (tokens.len(), x.width()), &Device::Cpu)?)
    }

    fn some(&self, stream: &Stream, w: usize, tokens: &Range<usize>) -> Result<Tensor, Error> {
        let values = stream.read_tokens(w, tokens.clone())?;
        Ok(Tensor::from_vec(values, (tokens.len(), stream.width()), &Device::Cpu)?)
    }
}

pub(crate) fn rows(t: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(t.flatten_all()?.to_vec1()?)
}

impl TensorRecord {
    /// A record of what is known before the weights are rounded.
    pub(crate) fn of(module: &str, shape: [usize; 2], scheme: Scheme, method: &dyn Method, bytes: u64) -> Self {
        TensorRecord {
            tensor: module.into(),
            shape,
            scheme: scheme.to_string(),
            method: method.name().into(),
            relative_error: 0.0,
            error_of: "weights".into(),
            bits_per_weight: bytes as f64 * 8.0 / (shape[0] * shape[1]) as f64,
            damping: None,
            tokens: 0,
            seconds: 0.0,
            stages: Vec::new(),
        }
    }
}

//! The experts of a block, rounded from the tokens that each of them gets.
//!
//! H of an expert is the mean over the tokens that are routed to it. Few may be, or none: so it is shrunk towards what the
//! expert would see of all tokens, by as many of these as it has inputs (an H of n tokens and n inputs is half noise). For
//! gate and up that is the H of the site; for down, whose inputs are the expert's own, evenly spaced tokens are run through
//! it. An expert without any token of its own is rounded against that alone.
//!
//! Where the full-precision model runs beside, a token of the rounded one is paired with itself in the other, whatever
//! experts it goes to there: the drift of an expert is that of the tokens it is going to be asked about. What the residual
//! stream has drifted by is made up for once: by the expert that every token goes to, or, where there is none, by the
//! chosen, whose shares of it are their weights.
//!
//! Experts are worked in groups, so that statistics of a bounded size exist at a time; each group reads the activations of
//! the site `mlp_in` again.

use crate::block::{Flow, Lanes, Moment, Target, rows};
use crate::journal::SiteRecord;
use crate::learn::Start;
use crate::seen::{Glimpse, Seen};
use crate::{Error, Method, Observation, SolverOptions, TargetShift};
use bitmill_calibrate::Tokens;
use bitmill_models::{Block, Expert, ModelSpec, Role, Routing, SITES, Site};
use candle_core::{Device, Tensor};

/// What a site's linears read of a block's activation.
type Reading<'a> = dyn Fn(&Block, &Tensor) -> Result<Vec<f32>, Error> + 'a;

/// Bytes of the statistics that exist at a time, unless those of one expert are more.
const MEMORY: usize = 1 << 30;
/// Tokens that stand for all in what an expert's statistics are shrunk towards.
const SAMPLE: usize = 4096;

/// Bytes that rounding experts takes beside a block, at most.
pub(crate) fn memory(spec: &ModelSpec, routing: &Routing, observation: Observation) -> u64 {
    let width = spec.hidden.max(routing.intermediate).max(routing.shared);
    let lanes = if observation.two_streams() { 3 } else { 1 };
    let activations = (crate::block::BATCH_TOKENS * routing.chosen + SAMPLE) * width * 4 * lanes;
    (MEMORY.max(bytes_of(spec, routing, observation)) + activations) as u64
}

/// Bytes of the statistics of one expert.
fn bytes_of(spec: &ModelSpec, routing: &Routing, observation: Observation) -> usize {
    let inner = routing.intermediate.max(routing.shared);
    let width = spec.hidden.max(inner);
    let cross = if observation.two_streams() { width * width + spec.hidden * inner } else { 0 };
    // Of what is learnt from, of what is held out, and of both.
    3 * 4 * (width * width + cross)
}

/// What the experts of a block read.
pub(crate) struct Routed<'a> {
    /// The site `mlp_in`.
    pub(crate) x: &'a Lanes,
    /// How much every token counts, by window.
    pub(crate) weights: Option<&'a [Vec<f32>]>,
    /// The block in full precision, where it runs beside the rounded one.
    pub(crate) full: Option<&'a Block>,
}

/// Tokens of every window, and the experts they go to.
struct Dealt {
    /// By window and expert, the tokens in order.
    tokens: Vec<Vec<Vec<usize>>>,
    /// By window, those of the evenly spaced tokens that lie in it.
    sample: Vec<Vec<usize>>,
}

impl Dealt {
    fn of(&self, w: usize, expert: Expert, length: usize) -> Vec<usize> {
        match expert {
            Expert::Shared => (0..length).collect(),
            Expert::Routed(e) => self.tokens[w][usize::from(e)].clone(),
        }
    }
}

/// One window at the site `mlp_in`.
struct Window {
    rounded: Tensor,
    full: Option<Tensor>,
    /// h − ĥ `[tokens, hidden]`; empty where nothing is made up for.
    residual: Vec<f32>,
}

/// What the two linears that read the site share, or the one behind them.
type Piece = (&'static Site, fn(Role) -> bool);

const PIECES: [Piece; 2] =
    [(&SITES[2], |role| matches!(role.kind(), Role::Gate | Role::Up)), (&SITES[3], |role| role.kind() == Role::Down)];

impl Flow<'_> {
    /// Rounds those of `targets` that are experts of `block`, which is block `index`, from what they read.
    pub(crate) fn quantize_experts(
        &self,
        (index, block): (usize, &mut Block),
        from: &Routed<'_>,
        targets: &[Target<'_>],
        how: (&dyn Method, &SolverOptions),
        start: &mut Option<Vec<Start>>,
        on: &mut dyn FnMut(Moment<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(routing) = self.spec.routed(index) else { return Ok(()) };
        let wanted = |e: &Expert| targets.iter().any(|t| t.role.expert() == Some(*e));
        let experts: Vec<Expert> = routing.all().filter(wanted).collect();
        if experts.is_empty() {
            return Ok(());
        }
        let dealt = self.dealt(block, from)?;
        let together = (MEMORY / bytes_of(self.spec, routing, self.observation)).clamp(1, experts.len());
        for group in experts.chunks(together) {
            for (site, reads) in PIECES {
                on(Moment::Site(site))?;
                for (&expert, seen) in group.iter().zip(self.see(block, site, group, (from, &dealt))?) {
                    let (name, tokens) = (name(site, expert), seen.tokens());
                    if !seen.is_finite() {
                        return Err(bitmill_calibrate::Error::NonFinite { block: index, site: name }.into());
                    }
                    let n = self.input_width(site, expert) as f64;
                    let prior = (expert != Expert::Shared).then_some(n / (n + tokens as f64));
                    on(Moment::Seen(SiteRecord { block: index, site: name, tokens, prior, spread: seen.spread() }))?;
                    let own = |t: &&Target<'_>| t.role.expert() == Some(expert) && reads(t.role);
                    let own: Vec<&Target<'_>> = targets.iter().filter(own).collect();
                    if !own.is_empty() {
                        self.round_site(block, &own, seen, how, start, on)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Deals out all tokens, by the weights that the router has now.
    fn dealt(&self, block: &Block, from: &Routed<'_>) -> Result<Dealt, Error> {
        let mut tokens = Vec::new();
        let one = |w: usize| -> Result<Vec<Vec<usize>>, Error> {
            let routes = block.routes(&self.tensor(&from.x.rounded, w)?)?;
            let routes = routes.map(|routes| routes.tokens).unwrap_or_default();
            Ok(routes.into_iter().map(|t| t.into_iter().map(|(token, _)| token).collect()).collect())
        };
        self.windows(0, one, &mut |_, results| tokens.extend(results))?;
        Ok(Dealt { tokens, sample: spaced(self.lengths, SAMPLE) })
    }

    /// What the experts of `group` read at `site`.
    fn see(
        &self,
        block: &Block,
        site: &Site,
        group: &[Expert],
        (from, dealt): (&Routed<'_>, &Dealt),
    ) -> Result<Vec<Seen>, Error> {
        let inner = site.name == SITES[3].name;
        let made_up = |expert: Expert| {
            inner && (expert == Expert::Shared || self.spec.routing.as_ref().is_some_and(|r| r.shared == 0))
        };
        let empty = |&expert: &Expert| {
            let hidden = if made_up(expert) { self.spec.hidden } else { 0 };
            Seen::new(self.observation, self.input_width(site, expert), hidden, self.lengths.len())
        };
        let mut seen: Vec<Seen> = group.iter().map(empty).collect();
        let one = |w: usize| -> Result<Vec<[Glimpse; 2]>, Error> {
            let window = self.window(from, w)?;
            let of = |&expert: &Expert| -> Result<[Glimpse; 2], Error> {
                let look = |tokens: &[usize]| -> Result<Glimpse, Error> {
                    let read = |block: &Block, x: &Tensor| -> Result<Vec<f32>, Error> {
                        let own = block.expert_input(expert, picked(x, tokens)?)?;
                        rows(&if inner { block.expert_inner(expert, &own)? } else { own })
                    };
                    window.glimpse(tokens, [Some(block), from.full], made_up(expert), &read)
                };
                let prior = if expert == Expert::Shared { &[][..] } else { &dealt.sample[w] };
                Ok([look(&dealt.of(w, expert, self.lengths[w]))?, look(prior)?])
            };
            group.iter().map(of).collect()
        };
        let sampled: usize = dealt.sample.iter().map(Vec::len).sum();
        self.windows(0, one, &mut |first, mut batch| {
            let windows = first..first + batch.len();
            let weight = |w: usize, t: usize| from.weights.map_or(1.0, |weights| weights[w][t]);
            for (i, (&expert, seen)) in group.iter().zip(&mut seen).enumerate() {
                let mut part = |p: usize| -> Vec<Glimpse> {
                    batch.iter_mut().map(|glimpses| std::mem::take(&mut glimpses[i][p])).collect()
                };
                let own = |w: usize| dealt.of(w, expert, self.lengths[w]).into_iter().map(|t| weight(w, t)).collect();
                let weights: Option<Vec<Vec<f32>>> = from.weights.map(|_| windows.clone().map(own).collect());
                seen.add(first, &part(0), weights.as_deref());
                let each = self.input_width(site, expert) as f32 / sampled as f32;
                let prior = |w: usize| dealt.sample[w].iter().map(|&t| each * weight(w, t)).collect();
                seen.add_prior(first, &part(1), &windows.clone().map(prior).collect::<Vec<_>>());
            }
        })?;
        Ok(seen)
    }

    fn window(&self, from: &Routed<'_>, w: usize) -> Result<Window, Error> {
        let mut residual = Vec::new();
        if let (Some(full), TargetShift::Outputs) = (self.full, self.observation.shift) {
            residual = full.read(w)?;
            residual.iter_mut().zip(self.hidden.read(w)?).for_each(|(d, h)| *d -= h);
        }
        let full = from.x.full.as_ref().map(|x| self.tensor(x, w)).transpose()?;
        Ok(Window { rounded: self.tensor(&from.x.rounded, w)?, full, residual })
    }

    /// Width of what an expert reads at `site`.
    fn input_width(&self, site: &Site, expert: Expert) -> usize {
        let [gate, _, down] = Role::of_expert(expert);
        self.spec.linear_shape(if site.name == SITES[3].name { down } else { gate })[1]
    }
}

impl Window {
    /// What `read` sees of `tokens`, in the rounded block and in the full-precision one.
    fn glimpse(
        &self,
        tokens: &[usize],
        [block, full]: [Option<&Block>; 2],
        made_up: bool,
        read: &Reading<'_>,
    ) -> Result<Glimpse, Error> {
        let (Some(block), false) = (block, tokens.is_empty()) else { return Ok(Glimpse::default()) };
        let seen = read(block, &self.rounded)?;
        let width = seen.len() / tokens.len();
        let mut glimpse = Glimpse { seen: Tokens::new(seen, width), ..Glimpse::default() };
        if let (Some(full), Some(x)) = (full, &self.full) {
            glimpse.drift = read(full, x)?;
            glimpse.drift.iter_mut().zip(&glimpse.seen[..]).for_each(|(d, x)| *d -= x);
        }
        if made_up && !self.residual.is_empty() {
            let hidden = self.residual.len() / self.rounded.dim(0)?;
            glimpse.residual =
                tokens.iter().flat_map(|t| self.residual[t * hidden..][..hidden].iter().copied()).collect();
        }
        Ok(glimpse)
    }
}

/// The rows of `x [tokens, width]` that are of `tokens`.
fn picked(x: &Tensor, tokens: &[usize]) -> Result<Tensor, Error> {
    let index: Vec<u32> = tokens.iter().map(|&t| t as u32).collect();
    Ok(x.index_select(&Tensor::from_vec(index, tokens.len(), &Device::Cpu)?, 0)?)
}

/// At most `count` evenly spaced tokens of windows of `lengths`, by window.
fn spaced(lengths: &[usize], count: usize) -> Vec<Vec<usize>> {
    let all: usize = lengths.iter().sum();
    let count = count.min(all);
    let within = |(from, length): (usize, usize)| {
        // Token i of the sample is token ⌊i · all / count⌋ of all.
        let places = (from * count).div_ceil(all.max(1))..((from + length) * count).div_ceil(all.max(1));
        places.map(|i| i * all / count - from).collect()
    };
    let starts = lengths.iter().scan(0, |at, l| Some(std::mem::replace(at, *at + l)));
    starts.zip(lengths.iter().copied()).map(within).collect()
}

/// The name of a site of an expert in reports: `mlp_in.3`, `mlp_out.shared`.
fn name(site: &Site, expert: Expert) -> String {
    match expert {
        Expert::Routed(index) => format!("{}.{index}", site.name),
        Expert::Shared => format!("{}.shared", site.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaced_tokens_lie_in_their_windows_and_are_as_many_as_asked_for() {
        for (lengths, count) in [(vec![5, 3, 7], 4), (vec![5, 3, 7], 15), (vec![5, 3, 7], 99), (vec![1; 9], 2)] {
            let spaced = spaced(&lengths, count);
            let total: usize = spaced.iter().map(Vec::len).sum();
            assert_eq!(total, count.min(lengths.iter().sum()), "{lengths:?} {count}");
            for (tokens, length) in spaced.iter().zip(&lengths) {
                assert!(tokens.is_sorted_by(|a, b| a < b) && tokens.iter().all(|t| t < length), "{spaced:?}");
            }
        }
    }
}

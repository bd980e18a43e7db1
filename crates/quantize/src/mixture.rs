//! A mixture of schemes that fits a size: sensitivities through the allocator into settings.

use crate::{Choice, Error, Plan, Sensitivity, Settings, allocate_crossed, rank_correlation};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::Role;
use bitmill_scheme::Scheme;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What a mixture must stay within.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Bits per weight of the blocks' linears, everything written for them included.
    Bits(f64),
    /// Bytes of all weight files.
    Size(u64),
    /// Bytes that are read for each token that is generated: everything but an embedding that is no output matrix. Over
    /// the bandwidth of a memory they are the time a token takes, as long as reading is what it waits for.
    Read(u64),
}

/// What a mixture is chosen from and by.
#[derive(Debug, Clone, Copy)]
pub struct Mixing<'a> {
    /// Every tensor with the costs of its options.
    pub table: &'a [Sensitivity],
    /// Correlations of sites, `[sites, sites]`; without them losses are taken to add up.
    pub cross: Option<&'a [f64]>,
    /// The options.
    pub options: &'a [Scheme],
    /// Least bits of a role.
    pub least: &'a BTreeMap<Role, u32>,
}

/// A chosen mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mixture {
    /// The scheme of every module of a block.
    #[serde(skip)]
    pub layers: BTreeMap<String, Scheme>,
    /// Predicted KL divergence of the whole, in nats per position.
    pub predicted: f64,
    /// What no mixture of this size could be predicted to go below if losses added up.
    pub bound: f64,
    /// Bytes written for these modules.
    pub bytes: u64,
    /// Bytes that were allowed for them.
    pub allowed: u64,
    /// What each tensor got and was predicted to lose.
    pub tensors: Vec<Chosen>,
    /// What it was chosen among.
    #[serde(default)]
    pub survey: Option<Survey>,
}

/// What else there is to choose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Survey {
    /// Predicted KL divergence of the best mixture at some sizes, smallest first: (bits per weight, nats per position).
    pub frontier: Vec<(f64, f64)>,
    /// The same of every tensor under one option: (option, bits per weight, nats per position).
    pub uniform: Vec<(String, f64, f64)>,
    /// Rank correlation of output errors by the closed form and as measured, over all tensors and options.
    pub rank_correlation: f64,
}

/// One tensor of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// Module name.
    pub tensor: String,
    /// Its scheme.
    pub scheme: String,
    /// Output error by the closed form.
    pub closed_form: f64,
    /// Output error that the method left on a sample of rows.
    pub measured: f64,
    /// KL divergence predicted of this tensor alone.
    pub kl: f64,
}

/// Sizes at which the frontier is computed.
const FRONTIER: usize = 24;

/// The mixture of least predicted loss within `budget`. Linears of one site take the same option, since loaders fuse Q, K, V
/// and gate, up into one matrix each.
///
/// # Errors
/// [`Error::Allocation`] when even the smallest options exceed the budget, or a tensor has none.
pub fn mix(input: &Checkpoint, plan: &Plan, from: &Mixing<'_>, budget: Budget) -> Result<Mixture, Error> {
    let weights: u64 = from.table.iter().map(|t| t.weights).sum();
    let (size, unread) = match budget {
        // Rounded down: never over. A millionth of a byte makes up for the rounding of a mean that was computed from bytes.
        Budget::Bits(bits) => return from.mixture((weights as f64 * bits / 8.0 + 1e-6) as u64),
        Budget::Size(size) => (size, 0),
        Budget::Read(bytes) => (bytes, plan.unread_bytes()),
    };
    let size = size.saturating_add(unread);
    // What is not payload of the table's tensors: everything else and headers. Headers spell sizes out in digits, so they
    // move by a few bytes with the mixture; each round gives back what the last one was over.
    let named: BTreeSet<&str> = from.table.iter().map(|t| t.module.as_str()).collect();
    let mut allowed = size.saturating_sub(plan.output.total_bytes() - plan.bytes_of(|m| named.contains(m)));
    loop {
        let mixture = from.mixture(allowed)?;
        let total = Plan::new(input, &mixture.settings(&plan.settings))?.output.total_bytes();
        if total <= size {
            return Ok(mixture);
        }
        allowed = mixture.bytes.min(allowed).saturating_sub(total - size);
    }
}

impl Mixture {
    /// `settings` with this mixture in them.
    #[must_use]
    pub fn settings(&self, settings: &Settings) -> Settings {
        Settings { layers: self.layers.clone(), ..settings.clone() }
    }
}

impl Mixing<'_> {
    /// Bytes and additive loss of every tensor's options.
    fn choices(&self) -> Vec<Vec<Option<Choice>>> {
        let of = |t: &Sensitivity| -> Vec<Option<Choice>> {
            let enough = |s: &Scheme| self.least.get(&t.role.kind()).is_none_or(|&b| s.bits().get() >= b);
            let choice = |(k, s)| Some(Choice { bytes: t.bytes[k]?, loss: t.predicted(k) }).filter(|_| enough(s));
            self.options.iter().enumerate().map(choice).collect()
        };
        self.table.iter().map(of).collect()
    }

    /// Correlations of the sites that the table has, in its order.
    fn crossed(&self) -> Option<Vec<f64>> {
        let cross = self.cross?;
        let sites = cross.len().isqrt();
        let mut order: Vec<usize> = Vec::new();
        self.table.iter().map(Sensitivity::site).for_each(|s| {
            if !order.contains(&s) {
                order.push(s);
            }
        });
        let pair = |a: usize| order.iter().map(move |&b| cross[a * sites + b]);
        order.iter().all(|&s| s < sites).then(|| order.iter().flat_map(|&a| pair(a)).collect())
    }

    /// The sites of the table's tensors, which share an option.
    fn ties(&self) -> Vec<usize> {
        self.table.iter().map(Sensitivity::site).collect()
    }

    /// The best mixture within `allowed` bytes.
    fn mixture(&self, allowed: u64) -> Result<Mixture, Error> {
        let allocation = allocate_crossed(&self.choices(), &self.ties(), allowed, self.crossed().as_deref())?;
        let chosen = |(t, &k): (&Sensitivity, &usize)| Chosen {
            tensor: t.module.clone(),
            scheme: self.options[k].to_string(),
            closed_form: t.closed_form[k],
            measured: t.output_error[k],
            kl: t.predicted(k),
        };
        let picked = || self.table.iter().zip(&allocation.options);
        Ok(Mixture {
            layers: picked().map(|(t, &k)| (t.module.clone(), self.options[k])).collect(),
            predicted: allocation.loss,
            bound: allocation.bound,
            bytes: allocation.bytes,
            allowed,
            tensors: picked().map(chosen).collect(),
            survey: None,
        })
    }

    /// The best mixtures at other sizes, and what one option for all would lose.
    #[must_use]
    pub fn survey(&self) -> Survey {
        let (choices, ties, cross) = (self.choices(), self.ties(), self.crossed());
        let weights = self.table.iter().map(|t| t.weights).sum::<u64>() as f64;
        let bits = |bytes: u64| bytes as f64 * 8.0 / weights;
        let ends = |pick: fn(u64, u64) -> u64| -> u64 {
            choices.iter().filter_map(|c| c.iter().flatten().map(|c| c.bytes).reduce(pick)).sum()
        };
        let (least, most) = (ends(u64::min), ends(u64::max));
        let point = |i: usize| {
            let budget = least + (most - least) * i as u64 / FRONTIER as u64;
            let best = allocate_crossed(&choices, &ties, budget, cross.as_deref()).ok()?;
            Some((bits(best.bytes), best.loss))
        };
        let mut frontier: Vec<(f64, f64)> = (0..=FRONTIER).filter_map(point).collect();
        frontier.dedup();
        let uniform = |(k, scheme): (usize, &Scheme)| {
            // One option for all is an allocation with a single column.
            let column: Option<Vec<Vec<Option<Choice>>>> = choices.iter().map(|c| Some(vec![Some(c[k]?)])).collect();
            let all = allocate_crossed(&column?, &ties, u64::MAX >> 1, cross.as_deref()).ok()?;
            Some((scheme.to_string(), bits(all.bytes), all.loss))
        };
        let (closed, measured): (Vec<f64>, Vec<f64>) = (self.table.iter())
            .flat_map(|t| t.closed_form.iter().copied().zip(t.output_error.iter().copied()))
            .filter(|(a, b)| a.is_finite() && b.is_finite())
            .unzip();
        Survey {
            frontier,
            uniform: self.options.iter().enumerate().filter_map(uniform).collect(),
            rank_correlation: rank_correlation(&closed, &measured),
        }
    }
}

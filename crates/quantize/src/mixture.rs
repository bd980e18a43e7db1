//! A mixture of schemes that fits a size: sensitivities through the allocator into settings.

use crate::{Choice, Error, Plan, Sensitivity, Settings, allocate};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Role, SITES};
use bitmill_scheme::Scheme;
use serde::Serialize;
use std::collections::BTreeMap;

/// What a mixture may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Bits per quantized weight, everything written for it included.
    Bits(f64),
    /// Bytes of all weight files.
    Size(u64),
}

/// A chosen mixture.
#[derive(Debug, Clone, Serialize)]
pub struct Mixture {
    /// The scheme of every quantized module.
    pub layers: BTreeMap<String, Scheme>,
    /// Predicted KL divergence of the whole, in nats per position.
    pub predicted: f64,
    /// What no mixture of this size could be predicted to go below.
    pub bound: f64,
    /// Bytes written for quantized tensors.
    pub bytes: u64,
    /// Bytes that were allowed for them.
    pub allowed: u64,
}

/// The mixture of `options` with the least predicted loss within `budget`. Linears of one site take the same option, since
/// loaders fuse Q, K, V and gate, up into one matrix each; `least` bounds the bits of a role from below.
///
/// # Errors
/// [`Error::Allocation`] when even the smallest options exceed the budget, or a tensor has none.
pub fn mix(
    input: &Checkpoint,
    plan: &Plan,
    table: &[Sensitivity],
    options: &[Scheme],
    budget: Budget,
    least: &BTreeMap<Role, u32>,
) -> Result<Mixture, Error> {
    let weights = plan.quantized_size().0;
    let solve = |allowed: u64| choose(table, options, allowed, least);
    let size = match budget {
        // Rounded down: never over.
        Budget::Bits(bits) => return solve((weights as f64 * bits / 8.0) as u64),
        Budget::Size(size) => size,
    };
    // What is not payload of quantized tensors: copied tensors and headers. Headers spell sizes out in digits, so they
    // move by a few bytes with the mixture; each round gives back what the last one was over.
    let mut allowed = size.saturating_sub(plan.output.total_bytes() - plan.quantized_size().1);
    loop {
        let mixture = solve(allowed)?;
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

fn choose(
    table: &[Sensitivity],
    options: &[Scheme],
    allowed: u64,
    least: &BTreeMap<Role, u32>,
) -> Result<Mixture, Error> {
    let choices = |t: &Sensitivity| -> Vec<Option<Choice>> {
        let enough = |s: &Scheme| least.get(&t.role).is_none_or(|&b| s.bits().get() >= b);
        let choice = |(k, s)| Some(Choice { bytes: t.bytes[k]?, loss: t.predicted(k) }).filter(|_| enough(s));
        options.iter().enumerate().map(choice).collect()
    };
    let site = |role: Role| SITES.iter().position(|s| s.linears.contains(&role)).unwrap_or(SITES.len());
    let ties: Vec<usize> = table.iter().map(|t| t.block * (SITES.len() + 1) + site(t.role)).collect();
    let allocation = allocate(&table.iter().map(choices).collect::<Vec<_>>(), &ties, allowed)?;
    let layers = table.iter().zip(&allocation.options).map(|(t, &k)| (t.module.clone(), options[k])).collect();
    let (predicted, bound, bytes) = (allocation.loss, allocation.bound, allocation.bytes);
    Ok(Mixture { layers, predicted, bound, bytes, allowed })
}

//! Bits where they matter: one option for every tensor, so that the predicted loss is least and a number of bytes is
//! not exceeded.
//!
//! This is the multiple-choice knapsack, and it is solved exactly. Relaxing the budget with a price per byte (the slope
//! at which the lower convex hulls of all tables, taken steepest first, use the budget up) gives a bound below and, with
//! a greedy rest, a solution above; the two differ by less than one step of one tensor. Then a dynamic program over the
//! bytes used keeps the non-dominated sums of the tensors so far, and of those only the ones whose excess over the bound
//! is within that difference. The bound removes nearly every state, so the byte counts need no rounding and no common
//! divisor: any mixture of shapes and scales is exact. What the losses mean is the caller's business, as long as they
//! add up; the same table may hold widths, sparsities, ranks or rates.

mod crossed;
mod pareto;

use pareto::{Entry, Search};

/// What an option costs and what it loses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Bytes it takes.
    pub bytes: u64,
    /// Predicted loss, finite; losses of different tensors add up.
    pub loss: f64,
}

/// One option for every tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// The option of every tensor.
    pub options: Vec<usize>,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Their predicted loss, the least there is within the budget.
    pub loss: f64,
    /// What no allocation could go below even if options could be mixed inside a tensor: the Lagrangian bound.
    pub bound: f64,
    /// Partial sums the dynamic program looked at.
    pub states: usize,
}

/// Why there is no allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Impossible {
    /// Even the smallest options exceed the budget.
    #[error("the smallest options take {least} bytes, {budget} are allowed")]
    Budget {
        /// Bytes of the smallest options.
        least: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// A tensor, or one tied to it, excludes each option.
    #[error("no option is allowed for tensor {tensor} and those tied to it")]
    NoOption {
        /// Index of the tensor.
        tensor: usize,
    },
}

/// The allocation of least loss in at most `budget` bytes.
///
/// `tables[t][k]` is what option `k` means for tensor `t`, `None` where it may not take it (a loader's rule, a least
/// width); every tensor has the same list of options. Tensors with the same number in `ties` take the same option, as
/// the parts of a matrix that loaders fuse must. Among equal losses the smaller size wins, then the order of the
/// options; nothing depends on threads.
///
/// # Errors
/// [`Impossible`].
///
/// ```
/// use bitmill_quantize::{Choice, allocate};
/// let option = |bytes, loss| Some(Choice { bytes, loss });
/// // The second tensor is four times as sensitive, so it gets the larger option.
/// let tables = [vec![option(2, 4.0), option(4, 1.0)], vec![option(2, 16.0), option(4, 4.0)]];
/// assert_eq!(allocate(&tables, &[0, 1], 6)?.options, [0, 1]);
/// # Ok::<(), bitmill_quantize::Impossible>(())
/// ```
pub fn allocate(tables: &[Vec<Option<Choice>>], ties: &[usize], budget: u64) -> Result<Allocation, Impossible> {
    allocate_crossed(tables, ties, budget, None)
}

/// As [`allocate`] where losses do not add up: `cross` holds the correlations of groups of tied tensors, row-major
/// `[groups, groups]` in the order in which `ties` first names them, and the loss is Σ_a d_a + Σ_{a≠b} c_ab·√(d_a·d_b). The
/// exact optimum without cross terms is improved by local search; the bound is that of the additive loss.
///
/// # Errors
/// [`Impossible`].
pub fn allocate_crossed(
    tables: &[Vec<Option<Choice>>],
    ties: &[usize],
    budget: u64,
    cross: Option<&[f64]>,
) -> Result<Allocation, Impossible> {
    let groups = Group::collect(tables, ties)?;
    let entries: Vec<Vec<Entry>> = groups.iter().map(|g| pareto::frontier(&g.table)).collect();
    let least = entries.iter().map(|e| e[0].bytes).sum();
    if least > budget {
        return Err(Impossible::Budget { least, budget });
    }
    let search = Search::new(&entries, budget);
    let (mut chosen, states) = search.solve();
    let mut loss = chosen.iter().map(|e| e.loss).sum();
    if let Some(cross) = cross {
        let place = |(all, own): (&Vec<Entry>, &Entry)| all.iter().position(|e| e == own).unwrap_or(0);
        let mut at: Vec<usize> = entries.iter().zip(&chosen).map(place).collect();
        crossed::improve(&entries, cross, budget, &mut at);
        loss = crossed::total(&entries, cross, &at);
        chosen = entries.iter().zip(&at).map(|(all, &i)| all[i]).collect();
    }
    let mut options = vec![0; tables.len()];
    for (group, entry) in groups.iter().zip(&chosen) {
        group.members.iter().for_each(|&t| options[t] = entry.option);
    }
    let bytes = chosen.iter().map(|e| e.bytes).sum();
    Ok(Allocation { options, bytes, loss, bound: search.bound(), states })
}

/// Tensors that take the same option, as one.
struct Group {
    members: Vec<usize>,
    table: Vec<Option<Choice>>,
}

impl Group {
    /// Sums the tables of tied tensors; an option that one member may not take falls away.
    fn collect(tables: &[Vec<Option<Choice>>], ties: &[usize]) -> Result<Vec<Group>, Impossible> {
        let mut groups: Vec<(usize, Group)> = Vec::new();
        for (tensor, (table, &tie)) in tables.iter().zip(ties).enumerate() {
            match groups.iter_mut().find(|(t, _)| *t == tie) {
                None => groups.push((tie, Group { members: vec![tensor], table: table.clone() })),
                Some((_, group)) => {
                    group.members.push(tensor);
                    for (sum, own) in group.table.iter_mut().zip(table) {
                        *sum = sum.zip(*own).map(|(a, b)| Choice { bytes: a.bytes + b.bytes, loss: a.loss + b.loss });
                    }
                }
            }
        }
        let empty = groups.iter().find(|(_, g)| !g.table.iter().flatten().any(|c| c.loss.is_finite()));
        match empty {
            Some((_, group)) => Err(Impossible::NoOption { tensor: group.members[0] }),
            None => Ok(groups.into_iter().map(|(_, g)| g).collect()),
        }
    }
}

#[cfg(test)]
mod tests;

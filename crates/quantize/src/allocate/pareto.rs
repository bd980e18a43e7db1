//! The solver below [`super::allocate`]: frontiers, the Lagrangian bound, and the dynamic program it prunes.

use super::Choice;

/// An option of one group that no other option of it dominates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Entry {
    pub(super) option: usize,
    pub(super) bytes: u64,
    pub(super) loss: f64,
}

/// The non-dominated options of a table, bytes rising and losses falling.
pub(super) fn frontier(table: &[Option<Choice>]) -> Vec<Entry> {
    let each = table.iter().enumerate().filter_map(|(option, choice)| {
        let Choice { bytes, loss } = (*choice)?;
        loss.is_finite().then_some(Entry { option, bytes, loss })
    });
    let mut entries: Vec<Entry> = each.collect();
    entries.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)).then(a.option.cmp(&b.option)));
    let mut kept: Vec<Entry> = Vec::new();
    for entry in entries {
        if kept.last().is_none_or(|last| entry.loss < last.loss) {
            kept.push(entry);
        }
    }
    kept
}

/// One edge of a group's lower convex hull.
struct Step {
    group: usize,
    to: usize,
    bytes: u64,
    /// Loss saved per byte.
    slope: f64,
}

/// The edges of all hulls, steepest first; inside a group slopes fall, so its edges come in order.
fn steps(groups: &[Vec<Entry>]) -> Vec<Step> {
    let mut all = Vec::new();
    for (group, entries) in groups.iter().enumerate() {
        let slope =
            |a: usize, b: usize| (entries[a].loss - entries[b].loss) / (entries[b].bytes - entries[a].bytes) as f64;
        let mut at = 0;
        while at + 1 < entries.len() {
            // The steepest way on; the farthest of equals, so that hull vertices are proper corners.
            let mut to = at + 1;
            for candidate in at + 2..entries.len() {
                if slope(at, candidate) >= slope(at, to) {
                    to = candidate;
                }
            }
            all.push(Step { group, to, bytes: entries[to].bytes - entries[at].bytes, slope: slope(at, to) });
            at = to;
        }
    }
    all.sort_by(|a, b| b.slope.total_cmp(&a.slope).then(a.group.cmp(&b.group)).then(a.to.cmp(&b.to)));
    all
}

/// The relaxation at its best price, and the search it guides.
pub(super) struct Search<'a> {
    groups: &'a [Vec<Entry>],
    budget: u64,
    /// Loss a byte is worth at the optimum of the relaxation; 0 when the budget does not bind.
    price: f64,
    /// A feasible choice per group: hull vertices, found greedily.
    greedy: Vec<usize>,
    bound: f64,
}

/// A non-dominated sum over the first groups.
struct State {
    bytes: u64,
    loss: f64,
    parent: u32,
    entry: u32,
}

impl<'a> Search<'a> {
    /// Takes hull edges, steepest first. The first that does not fit sets the price; flatter ones that still fit are
    /// taken as well, which only improves the feasible choice.
    pub(super) fn new(groups: &'a [Vec<Entry>], budget: u64) -> Self {
        let mut left = budget - groups.iter().map(|e| e[0].bytes).sum::<u64>();
        let (mut greedy, mut stuck) = (vec![0; groups.len()], vec![false; groups.len()]);
        let mut price = None;
        for step in steps(groups) {
            if stuck[step.group] {
                continue;
            }
            if step.bytes > left {
                price = price.or(Some(step.slope));
                stuck[step.group] = true;
                continue;
            }
            left -= step.bytes;
            greedy[step.group] = step.to;
        }
        let price = price.unwrap_or(0.0);
        let relaxed: f64 = groups.iter().map(|entries| floor(entries, price)).sum();
        Search { groups, budget, price, greedy, bound: relaxed - price * budget as f64 }
    }

    /// No allocation loses less.
    pub(super) fn bound(&self) -> f64 {
        self.bound
    }

    /// The best entry per group, and the number of sums looked at.
    pub(super) fn solve(&self) -> (Vec<Entry>, usize) {
        let (groups, price) = (self.groups, self.price);
        let upper: f64 = groups.iter().zip(&self.greedy).map(|(e, &i)| e[i].loss).sum();
        // An allocation better than the greedy one exceeds the bound by less than this; the sums are rounded, so a
        // little more than the difference is kept.
        let scale: f64 = groups.iter().map(|e| e[0].loss.abs()).sum::<f64>() + price * self.budget as f64;
        let gap = (upper - self.bound).max(0.0) + 1e-12 * scale;
        // Excess of an entry over the cheapest of its group at the price: what taking it adds to the bound.
        let open: Vec<Vec<(u32, f64)>> = groups
            .iter()
            .map(|entries| {
                let least = floor(entries, price);
                let excess = |e: &Entry| e.loss + price * e.bytes as f64 - least;
                (0u32..).zip(entries).map(|(i, e)| (i, excess(e))).filter(|(_, x)| *x <= gap).collect()
            })
            .collect();
        // Bytes the groups from here on take at least and at most.
        let (mut rest_least, mut rest_most) = (vec![0u64; groups.len() + 1], vec![0u64; groups.len() + 1]);
        for (g, open) in open.iter().enumerate().rev() {
            let bytes = |i: &(u32, f64)| groups[g][i.0 as usize].bytes;
            rest_least[g] = rest_least[g + 1] + open.iter().map(bytes).min().unwrap_or(0);
            rest_most[g] = rest_most[g + 1] + open.iter().map(bytes).max().unwrap_or(0);
        }
        let mut stages: Vec<Vec<State>> = vec![vec![State { bytes: 0, loss: 0.0, parent: 0, entry: 0 }]];
        let (mut floors, mut looked) = (0.0, 0);
        for (g, open) in open.iter().enumerate() {
            floors += floor(&groups[g], price);
            let last = &stages[g];
            let mut sums = Vec::with_capacity(last.len() * open.len());
            for (parent, state) in (0u32..).zip(last) {
                for &(entry, _) in open {
                    let Entry { bytes, loss, .. } = groups[g][entry as usize];
                    let (bytes, loss) = (state.bytes + bytes, state.loss + loss);
                    if bytes + rest_least[g + 1] > self.budget {
                        continue;
                    }
                    // Bytes that can no longer be used cost their price, too.
                    let unused = self.budget.saturating_sub(bytes + rest_most[g + 1]);
                    if loss + price * (bytes + unused) as f64 - floors <= gap {
                        sums.push(State { bytes, loss, parent, entry });
                    }
                }
            }
            looked += last.len() * open.len();
            stages.push(non_dominated(sums));
        }
        let best = stages.last().and_then(|s| s.last().map(|_| s.len() - 1));
        (self.trace(&stages, best), looked)
    }

    /// The entries that lead to the state `at` of the last stage: the one of least loss. Rounding could at worst have
    /// pruned everything, and then the greedy choice is within it of the optimum.
    fn trace(&self, stages: &[Vec<State>], at: Option<usize>) -> Vec<Entry> {
        let Some(mut at) = at else {
            return self.groups.iter().zip(&self.greedy).map(|(e, &i)| e[i]).collect();
        };
        let mut chosen: Vec<Entry> = Vec::with_capacity(self.groups.len());
        for (entries, stage) in self.groups.iter().zip(&stages[1..]).rev() {
            chosen.push(entries[stage[at].entry as usize]);
            at = stage[at].parent as usize;
        }
        chosen.reverse();
        chosen
    }
}

/// The least of loss + price · bytes.
fn floor(entries: &[Entry], price: f64) -> f64 {
    entries.iter().map(|e| e.loss + price * e.bytes as f64).fold(f64::INFINITY, f64::min)
}

/// Keeps the sums that no other dominates, bytes rising and losses falling. Of equals the first parent's stays.
fn non_dominated(mut sums: Vec<State>) -> Vec<State> {
    sums.sort_unstable_by(|a, b| {
        let order = a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss));
        order.then(a.parent.cmp(&b.parent)).then(a.entry.cmp(&b.entry))
    });
    let mut least = f64::INFINITY;
    sums.retain(|s| {
        let better = s.loss < least;
        least = least.min(s.loss);
        better
    });
    sums
}

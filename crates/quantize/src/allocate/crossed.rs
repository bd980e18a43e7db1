//! Losses that do not add up: local search with cross terms, from the exact optimum without them.
//!
//! With d_a the loss of group a alone and c_ab the correlation of what two groups do, the loss of all is
//! Σ_a d_a + Σ_{a≠b} c_ab·√(d_a·d_b). Each step takes the best change of one group, or of two at once (one gives bytes that
//! the other uses), until none helps. It never ends above its start.

use super::pareto::Entry;

/// Options up or down that one of two groups may move at once: longer ways are walked in steps.
const REACH: usize = 2;

/// The loss of choosing entry `at[g]` for every group.
pub(super) fn total(entries: &[Vec<Entry>], cross: &[f64], at: &[usize]) -> f64 {
    let n = entries.len();
    let root = |g: usize| entries[g][at[g]].loss.max(0.0).sqrt();
    let fields = fields(entries, cross, at);
    (0..n).map(|g| entries[g][at[g]].loss + root(g) * fields[g]).sum()
}

/// Σ_{b≠a} c_ab·√d_b for every group a.
fn fields(entries: &[Vec<Entry>], cross: &[f64], at: &[usize]) -> Vec<f64> {
    let n = entries.len();
    let roots: Vec<f64> = (0..n).map(|g| entries[g][at[g]].loss.max(0.0).sqrt()).collect();
    let field = |a: usize| (0..n).filter(|&b| b != a).map(|b| cross[a * n + b] * roots[b]).sum();
    (0..n).map(field).collect()
}

/// A group on its way to another entry.
#[derive(Clone, Copy)]
struct Move {
    group: usize,
    to: usize,
    bytes: i64,
    /// Change of √d.
    root: f64,
    /// Change of the loss if nothing else moves.
    loss: f64,
}

/// Improves the choice `at` of one entry per group, within `budget` bytes. `cross` is row-major `[groups, groups]`.
pub(super) fn improve(entries: &[Vec<Entry>], cross: &[f64], budget: u64, at: &mut [usize]) {
    let n = entries.len();
    let bytes = |at: &[usize]| entries.iter().zip(at).map(|(e, &i)| e[i].bytes).sum::<u64>();
    let least = 1e-12 * total(entries, cross, at).abs();
    // Each step lowers the loss, so this ends; the bound only keeps rounding from walking in circles.
    for _ in 0..100 * n {
        let (left, fields) = ((budget - bytes(at)) as i64, fields(entries, cross, at));
        let moves: Vec<Vec<Move>> = (0..n).map(|g| moves(&entries[g], g, at[g], fields[g])).collect();
        let mut best: Option<(f64, Move, Option<Move>)> = None;
        let mut offer = |loss: f64, one: Move, other: Option<Move>| {
            let beaten = best.as_ref().is_none_or(|b| loss < b.0);
            if loss < -least && beaten {
                best = Some((loss, one, other));
            }
        };
        for (a, own) in moves.iter().enumerate() {
            for one in own {
                if one.bytes <= left {
                    offer(one.loss, *one, None);
                }
                let near = |m: &&Move| m.to.abs_diff(at[m.group]) <= REACH;
                if !near(&one) {
                    continue;
                }
                for (b, others) in moves.iter().enumerate().skip(a + 1) {
                    for other in others.iter().filter(near) {
                        if one.bytes + other.bytes <= left {
                            let both = one.loss + other.loss + 2.0 * cross[a * n + b] * one.root * other.root;
                            offer(both, *one, Some(*other));
                        }
                    }
                }
            }
        }
        let Some((_, one, other)) = best else { return };
        at[one.group] = one.to;
        if let Some(other) = other {
            at[other.group] = other.to;
        }
    }
}

fn moves(entries: &[Entry], group: usize, at: usize, field: f64) -> Vec<Move> {
    let from = entries[at];
    let of = |(to, e): (usize, &Entry)| {
        let root = e.loss.max(0.0).sqrt() - from.loss.max(0.0).sqrt();
        let bytes = e.bytes as i64 - from.bytes as i64;
        Move { group, to, bytes, root, loss: e.loss - from.loss + 2.0 * root * field }
    };
    entries.iter().enumerate().filter(|(to, _)| *to != at).map(of).collect()
}

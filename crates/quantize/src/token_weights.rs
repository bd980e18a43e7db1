//! How much each token of the calibration text counts in H: by how much it is attended to (RSQ, Sui et al. 2025), or by one of the
//! heuristics that paper compares it with. A window's weights are 1 on average.

use crate::TokenWeights;
use std::collections::BTreeMap;

/// The least weight, where the largest is 1 before both are divided by the mean.
const LEAST: f32 = 0.005;
/// Sinks stand out from all other tokens by an order of magnitude; later tokens are seen by fewer queries, which is less.
const SINK: f32 = 10.0;

/// What is looked at in a window, `[tokens, hidden]` where it is a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Look<'a> {
    /// How much attention each token receives in the block.
    Attention(&'a [f32]),
    /// What enters the block, and its width.
    Entering(&'a [f32], usize),
    /// What enters and what leaves the block, and their width.
    Passing([&'a [f32]; 2], usize),
    /// How often each token occurs in the whole text.
    Occurrences(&'a [f32]),
    /// How many tokens there are.
    Places(usize),
}

/// Weights of the tokens of one window.
pub(crate) fn token_weights(how: TokenWeights, look: Look<'_>) -> Vec<f32> {
    match (how, look) {
        (TokenWeights::Attention, Look::Attention(shares)) => spread(shares.to_vec(), true),
        (TokenWeights::NoSinks, Look::Attention(shares)) => {
            let limit = limit(shares);
            by_mean(shares.iter().map(|&share| f32::from(u8::from(share <= limit))).collect())
        }
        (TokenWeights::Norm, Look::Entering(x, width)) => {
            spread(x.chunks_exact(width).map(|row| squares(row).sqrt() as f32).collect(), true)
        }
        (TokenWeights::Distinct, Look::Entering(x, width)) => spread(distances(x, width), true),
        (TokenWeights::Change, Look::Passing([x, y], width)) => {
            let moved = |(x, y): (&[f32], &[f32])| -> f32 {
                let moved = x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
                -moved.sqrt() as f32
            };
            spread(x.chunks_exact(width).zip(y.chunks_exact(width)).map(moved).collect(), false)
        }
        (TokenWeights::Rare, Look::Occurrences(counts)) => spread(counts.iter().map(|count| -count).collect(), false),
        (TokenWeights::First, Look::Places(tokens)) => in_parts(tokens, &[0], 8),
        (TokenWeights::FirstLast, Look::Places(tokens)) => in_parts(tokens, &[0, 31], 32),
        (TokenWeights::Equal, Look::Places(tokens)) => vec![1.0; tokens],
        (how, look) => unreachable!("{how:?} does not look at {look:?}"),
    }
}

/// How often each token of every window occurs in all of them.
pub(crate) fn occurrences<'a>(windows: impl Iterator<Item = &'a [u32]> + Clone) -> Vec<Vec<f32>> {
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    windows.clone().flatten().for_each(|&token| *counts.entry(token).or_default() += 1);
    windows.map(|tokens| tokens.iter().map(|token| counts[token] as f32).collect()).collect()
}

/// Weights between [`LEAST`] and 1 in proportion to `scores`, over their mean; scores of sinks count no more than the largest of the
/// others, if `capped`.
fn spread(mut scores: Vec<f32>, capped: bool) -> Vec<f32> {
    if capped {
        let limit = limit(&scores);
        let most = scores.iter().copied().filter(|&s| s <= limit).fold(0.0, f32::max);
        scores.iter_mut().for_each(|s| *s = s.min(most));
    }
    let (least, most) = scores.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &s| (a.min(s), b.max(s)));
    let weight = |s: f32| if most > least { LEAST + (1.0 - LEAST) * (s - least) / (most - least) } else { 1.0 };
    by_mean(scores.into_iter().map(weight).collect())
}

/// The score beyond which a token is a sink.
fn limit(scores: &[f32]) -> f32 {
    let mut sorted = scores.to_vec();
    sorted.sort_by(f32::total_cmp);
    SINK * sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn by_mean(mut weights: Vec<f32>) -> Vec<f32> {
    let mean = weights.iter().sum::<f32>() / weights.len().max(1) as f32;
    if mean > 0.0 {
        weights.iter_mut().for_each(|w| *w /= mean);
    }
    weights
}

fn squares(row: &[f32]) -> f64 {
    row.iter().map(|&v| f64::from(v).powi(2)).sum()
}

/// The mean squared distance of every row to all: |x|² + E|x|² − 2·x·E[x].
fn distances(x: &[f32], width: usize) -> Vec<f32> {
    let count = (x.len() / width).max(1) as f64;
    let mut mean = vec![0.0f64; width];
    x.chunks_exact(width).for_each(|row| mean.iter_mut().zip(row).for_each(|(m, &v)| *m += f64::from(v) / count));
    let all = squares(x) / count;
    let to_all = |row: &[f32]| {
        let dot = row.iter().zip(&mean).map(|(&v, m)| f64::from(v) * m).sum::<f64>();
        (squares(row) + all - 2.0 * dot) as f32
    };
    x.chunks_exact(width).map(to_all).collect()
}

/// Only the tokens of some of so many equal parts count.
fn in_parts(tokens: usize, parts: &[usize], of: usize) -> Vec<f32> {
    let part = |token: usize| token * of / tokens.max(1);
    by_mean((0..tokens).map(|token| f32::from(u8::from(parts.contains(&part(token))))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks_are_capped_or_left_out() {
        let attended = [400.0, 3.0, 1.0, 2.0, 5.0];
        let weights = token_weights(TokenWeights::Attention, Look::Attention(&attended));
        assert!((weights.iter().sum::<f32>() / 5.0 - 1.0).abs() < 1e-6);
        assert_eq!(weights[0], weights[4]);
        assert!(weights[4] > weights[1] && weights[1] > weights[3] && weights[3] > weights[2] && weights[2] > 0.0);
        let weights = token_weights(TokenWeights::NoSinks, Look::Attention(&attended));
        assert_eq!(weights, [0.0, 1.25, 1.25, 1.25, 1.25]);
        assert_eq!(token_weights(TokenWeights::Attention, Look::Attention(&[2.0; 3])), [1.0; 3]);
    }

    #[test]
    fn heuristics_rank_tokens_by_what_they_say() {
        // Four tokens of two numbers: short, long, long, and alone on its side; the second does not change.
        let (x, y) = ([1.0, 0.0, 3.0, 0.0, 3.0, 1.0, -2.0, 0.0], [2.0, 0.0, 3.0, 0.0, 0.0, 1.0, -1.0, 1.0]);
        let order = |how, look| {
            let weights = token_weights(how, look);
            assert!((weights.iter().sum::<f32>() / 4.0 - 1.0).abs() < 1e-6 && weights.iter().all(|&w| w > 0.0));
            let mut order: Vec<usize> = (0..4).collect();
            order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
            order
        };
        assert_eq!(order(TokenWeights::Norm, Look::Entering(&x, 2)), [2, 1, 3, 0]);
        assert_eq!(order(TokenWeights::Distinct, Look::Entering(&x, 2))[0], 3);
        assert_eq!(order(TokenWeights::Change, Look::Passing([&x, &y], 2)), [1, 0, 3, 2]);
        let windows = [[7, 8, 7, 9], [7, 8, 7, 7]];
        let counts = occurrences(windows.iter().map(|w| &w[..]));
        assert_eq!(counts, [[5.0, 2.0, 5.0, 1.0], [5.0, 2.0, 5.0, 5.0]]);
        assert_eq!(order(TokenWeights::Rare, Look::Occurrences(&counts[0])), [3, 1, 0, 2]);
    }

    #[test]
    fn distances_are_means_over_pairs() {
        let x: Vec<f32> = (0..30).map(|i| (i as f32 * 0.7).sin()).collect();
        for (i, d) in distances(&x, 3).into_iter().enumerate() {
            let apart = |j: usize| (0..3).map(|k| (x[3 * i + k] - x[3 * j + k]).powi(2)).sum::<f32>();
            assert!((d - (0..10).map(apart).sum::<f32>() / 10.0).abs() < 1e-5);
        }
    }

    #[test]
    fn parts_are_where_they_say() {
        let first = token_weights(TokenWeights::First, Look::Places(16));
        assert_eq!((first[..2].to_vec(), first[2..].iter().sum::<f32>()), (vec![8.0; 2], 0.0));
        let both = token_weights(TokenWeights::FirstLast, Look::Places(64));
        assert_eq!([both[1], both[2], both[61], both[62]], [16.0, 0.0, 0.0, 16.0]);
    }
}

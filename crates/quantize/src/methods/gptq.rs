//! GPTQ (Frantar et al. 2023), with what has been learned since: group-aware activation order, scales searched under
//! what an error of each input still costs, coordinate descent over the codes, and scales refitted under the full Hessian.

use super::billm::ONLY;
use super::rtn::{fit, importance};
use super::{GroupGrid, Linear, Method, Needs, Solved, assemble, blocks};
use crate::factor::damped;
use crate::refine::refine;
use crate::soft::soften;
use crate::sweep::SweepGrid;
use crate::{Error, Factor, Order, ScaleSearch, SolverOptions, StageChange, Sweep, descend, loss, refit_scales, sweep};
use bitmill_scheme::{Granularity, Grid, GridKind, GroupParams, Quantized, Scheme};
use std::borrow::Cow;

pub(super) struct Gptq;

impl Method for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn summary(&self) -> &'static str {
        "error feedback through the Hessian of the layer's input, then coordinate descent and refitted scales"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<&'static str> {
        (scheme.grid == GridKind::Binary).then_some(ONLY)
    }

    fn needs(&self, _: &SolverOptions) -> Needs {
        Needs::Hessian
    }

    fn solve(&self, linears: &[Linear<'_>], h: Option<&[f32]>, options: &SolverOptions) -> Result<Vec<Solved>, Error> {
        let (Some(first), Some(h)) = (linears.first(), h) else { return Ok(Vec::new()) };
        let n = first.shape[1];
        let shrunk = shrunk(h, options.shrinkage);
        let h = &*shrunk;
        let importance = importance(Some(h), n);
        // Linears of a site share H; they share its factor too wherever their groups, and so their orders, are the same.
        let mut factored: Vec<(Order, Factor)> = Vec::new();
        let mut solved = Vec::with_capacity(linears.len());
        for linear in linears {
            let order = order(&linear.scheme, &importance, options);
            let at = match factored.iter().position(|(o, _)| *o == order) {
                Some(at) => at,
                None => {
                    let factor = Factor::new(h, &order.columns, options.damping)
                        .map_err(|damping| Error::NotPositive { tensor: linear.name.into(), damping })?;
                    factored.push((order, factor));
                    factored.len() - 1
                }
            };
            let (order, factor) = &factored[at];
            solved.push(solve_linear(linear, h, &importance, order, factor, options));
        }
        Ok(solved)
    }
}

/// The order in which the columns of a linear under `scheme` are rounded.
pub(crate) fn order(scheme: &Scheme, importance: &[f32], options: &SolverOptions) -> Order {
    let n = importance.len();
    match (options.act_order, scheme.form()) {
        (true, Some(form)) => Order::nested(importance, &[form.len, form.sub, form.unit()]),
        // A ragged last group keeps its place.
        (true, None) if scheme.granularity != Granularity::Tensor && !n.is_multiple_of(scheme.group_len(n)) => {
            Order::natural(n)
        }
        (true, None) => Order::by_importance(importance, scheme.group_len(n)),
        (false, _) => Order::natural(n),
    }
}

fn solve_linear(
    linear: &Linear<'_>,
    h: &[f32],
    importance: &[f32],
    order: &Order,
    factor: &Factor,
    options: &SolverOptions,
) -> Solved {
    let n = linear.shape[1];
    let search = options.scale_search.unwrap_or(ScaleSearch::Hessian);
    let mut quantized = match linear.scheme.form() {
        Some(form) => blocks::swept(linear, form, order, factor, search),
        None => match GroupGrid::of(linear) {
            GroupGrid::Int(grid) => swept(linear, importance, order, factor, search, grid),
            GroupGrid::Float(grid) => swept(linear, importance, order, factor, search, grid),
        },
    };
    let damping = Some(factor.damping());
    if options.descent_sweeps == 0 && options.scale_refits == 0 && options.soft.is_none() {
        return Solved { quantized, damping, stages: Vec::new() };
    }
    // The refinements see the same damped H as the sweep: damping is what keeps them from fitting noise.
    let h = damped(h, n, factor.damping());
    refine(linear.weight, &mut quantized, &h, options.descent_sweeps, options.scale_refits);
    let mut stages = Vec::new();
    if let Some(soft) = options.soft {
        let total = |q: &Quantized| loss(linear.weight, &q.dequantize(), &h).iter().sum::<f64>();
        let before = total(&quantized);
        if soften(linear.weight, &mut quantized, &h, soft) > 0 {
            descend(linear.weight, &mut quantized, &h, options.descent_sweeps);
            refit_scales(linear.weight, &mut quantized, &h);
        }
        let (of, change) = ("proxy loss".into(), if before > 0.0 { total(&quantized) / before - 1.0 } else { 0.0 });
        stages.push(StageChange { stage: "soft rounding".into(), of, change, shares: Vec::new() });
    }
    Solved { quantized, damping, stages }
}

/// H with `share` of what lies beside its diagonal taken away.
pub(super) fn shrunk(h: &[f32], share: f32) -> Cow<'_, [f32]> {
    if share == 0.0 {
        return Cow::Borrowed(h);
    }
    let n = h.len().isqrt();
    let entry = |(i, &v): (usize, &f32)| if i % (n + 1) == 0 { v } else { v * (1.0 - share) };
    Cow::Owned(h.iter().enumerate().map(entry).collect())
}

/// The sweep onto a grid of integers or floats. Scales that several rows share are fitted to the weights themselves.
fn swept<G: Grid + SweepGrid<Params = GroupParams>>(
    linear: &Linear<'_>,
    importance: &[f32],
    order: &Order,
    factor: &Factor,
    search: ScaleSearch,
    grid: G,
) -> Quantized {
    let shared = matches!(linear.scheme.granularity, Granularity::Tensor | Granularity::Tile(_));
    let fixed = shared.then(|| fit(linear, search, importance, grid));
    let group_len = linear.scheme.group_len(linear.shape[1]);
    let what = Sweep { factor, order, grid, group_len, search, fixed: fixed.as_deref() };
    let (codes, params) = sweep(linear.weight, &what);
    assemble(linear, codes, params)
}

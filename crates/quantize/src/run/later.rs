//! Tensors that are read, checked and fingerprinted while they are rounded, rather than before: a run that needs no data reads
//! each of them once, and a run that is taken up looks again at those it had finished.

use super::{plain_method, slabs};
use crate::journal::Line;
use crate::{Action, Error, Linear, Plan};
use bitmill_checkpoint::{Checkpoint, Order};
use std::collections::BTreeSet;

/// The tensors of `input` that a run of `plan` reads in one pass, from the first row to the last.
pub(super) fn read_later(input: &Checkpoint, plan: &Plan) -> Result<BTreeSet<String>, Error> {
    let mut later = BTreeSet::new();
    if plan.calibrated || !plan.transforms.is_empty() {
        return Ok(later);
    }
    let (method, solver) = plain_method(plan)?;
    for tensor in plan.units.iter().flat_map(|unit| &unit.tensors) {
        let Action::Quantize { module, scheme, shape, .. } = &tensor.action else { continue };
        let linear = Linear::new(module, &[], *shape, *scheme);
        let name = format!("{module}.weight");
        let as_it_lies = plan.gguf.as_ref().is_none_or(|gguf| gguf.keeps_rows(&name))
            && input.scheme_of(module).is_none()
            && input.tensor(&name).is_ok_and(|view| view.order == Order::Rows);
        if as_it_lies && slabs::way(plan, &linear, (method, &solver)).is_some() {
            later.insert(name);
        }
    }
    Ok(later)
}

/// A tensor that is not what it was when one of the finished `lines` was made of it: its name, and its fingerprints then and now.
pub(super) fn changed(input: &Checkpoint, lines: &[Line]) -> Result<Option<[String; 3]>, Error> {
    for (name, then) in lines.iter().flat_map(|line| &line.sources) {
        let now = input.tensor(name)?.fingerprint().to_string();
        if now != *then {
            return Ok(Some([name.clone(), then.clone(), now]));
        }
        input.release();
    }
    Ok(None)
}

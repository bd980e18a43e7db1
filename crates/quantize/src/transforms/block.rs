//! A block as transforms see it: the numbers of its tensors, and the second moments of what its linears read.

use crate::Error;
use crate::weight::{is_transposed, transpose, weight};
use bitmill_calibrate::Statistics;
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{ModelSpec, NormRole, Role, SITES};
use std::collections::BTreeMap;

/// The tensors of one block that transforms rewrite, f32.
#[derive(Debug, Clone)]
pub struct BlockWeights<'a> {
    /// The architecture.
    pub spec: &'a ModelSpec,
    /// Index of the block.
    pub index: usize,
    /// Weights `[out, in]`. Parts that one linear stores together (Q, K and V; Gate and Up) are apart here.
    pub linears: BTreeMap<Role, Vec<f32>>,
    /// Biases `[out]` of the linears that have one.
    pub biases: BTreeMap<Role, Vec<f32>>,
    /// Weights `[hidden]` of the norms: the factors, whatever is stored of them.
    pub norms: BTreeMap<NormRole, Vec<f32>>,
    /// Biases `[hidden]` of the norms that have one.
    pub norm_biases: BTreeMap<NormRole, Vec<f32>>,
    /// What the linears read, in the order of `SITES`; empty without statistics.
    pub sites: Vec<SiteMoments>,
}

/// Moments of the activation at a site.
#[derive(Debug, Clone)]
pub struct SiteMoments {
    /// E[x·xᵀ], `[n, n]`.
    pub h: Vec<f32>,
    /// max |x|, `[n]`. Transforms that mix channels leave a bound: √n times what they mix.
    pub abs_max: Vec<f32>,
}

impl<'a> BlockWeights<'a> {
    /// Block `index` of `input`.
    ///
    /// # Errors
    /// Unreadable weights or statistics.
    pub fn load(
        spec: &'a ModelSpec,
        input: &Checkpoint,
        index: usize,
        statistics: Option<&Statistics>,
    ) -> Result<Self, Error> {
        let mut block = BlockWeights {
            spec,
            index,
            linears: BTreeMap::new(),
            biases: BTreeMap::new(),
            norms: BTreeMap::new(),
            norm_biases: BTreeMap::new(),
            sites: Vec::new(),
        };
        for (role, module) in spec.block_linears(index) {
            let values = weight(input, Some(spec), &module)?;
            let inner = spec.linear_shape(role)[1];
            let bias = match spec.has_bias(role) {
                true => Some(input.tensor(&format!("{module}.bias"))?.to_f32()?),
                false => None,
            };
            for &part in role.parts() {
                let rows = spec.rows(part).1;
                let own = rows.iter().flat_map(|rows| &values[rows.start * inner..rows.end * inner]);
                block.linears.insert(part, own.copied().collect());
                if let Some(bias) = &bias {
                    let own = rows.iter().flat_map(|rows| &bias[rows.clone()]);
                    block.biases.insert(part, own.copied().collect());
                }
            }
        }
        for norm in spec.block_norms(index) {
            let stored = input.tensor(&spec.norm(index, norm))?.to_f32()?;
            block.norms.insert(norm, stored.into_iter().map(|w| w + spec.norm_offset).collect());
            if let Some(bias) = spec.norm_bias(index, norm) {
                block.norm_biases.insert(norm, input.tensor(&bias)?.to_f32()?);
            }
        }
        if let Some(statistics) = statistics {
            let site = |site| -> Result<SiteMoments, Error> {
                Ok(SiteMoments { h: statistics.hessian(index, site)?, abs_max: statistics.abs_max(index, site)? })
            };
            block.sites = SITES.iter().map(site).collect::<Result<_, _>>()?;
        }
        Ok(block)
    }

    /// The rewritten values of the tensor `name` as it is stored, if this block owns it.
    pub(super) fn values(&self, name: &str) -> Option<Vec<f32>> {
        let spec = self.spec;
        for (role, module) in spec.block_linears(self.index) {
            let shape = spec.linear_shape(role);
            if name == format!("{module}.weight") {
                let values = self.joined(role, &self.linears, shape[1])?;
                return Some(if is_transposed(Some(spec)) { transpose(&values, shape) } else { values });
            }
            if name == format!("{module}.bias") {
                return self.joined(role, &self.biases, 1);
            }
        }
        let own = |norm: &&NormRole| spec.norm(self.index, **norm) == name;
        if let Some(norm) = self.norms.keys().find(own) {
            return Some(self.norms[norm].iter().map(|w| w - spec.norm_offset).collect());
        }
        let own = |norm: &&NormRole| spec.norm_bias(self.index, **norm).as_deref() == Some(name);
        self.norm_biases.keys().find(own).map(|norm| self.norm_biases[norm].clone())
    }

    /// The rows, each of `width` numbers, of the parts that `role` stores, where it stores them.
    fn joined(&self, role: Role, parts: &BTreeMap<Role, Vec<f32>>, width: usize) -> Option<Vec<f32>> {
        let mut whole = vec![0.0; self.spec.linear_shape(role)[0] * width];
        for part in role.parts() {
            let mut left = parts.get(part)?.as_slice();
            for rows in self.spec.rows(*part).1 {
                let (now, rest) = left.split_at(rows.len() * width);
                whole[rows.start * width..rows.end * width].copy_from_slice(now);
                left = rest;
            }
        }
        Some(whole)
    }
}

impl SiteMoments {
    /// Moments of t∘x.
    pub fn scale(&mut self, t: &[f32]) {
        let n = t.len();
        for (row, &a) in self.h.chunks_exact_mut(n).zip(t) {
            row.iter_mut().zip(t).for_each(|(h, &b)| *h *= a * b);
        }
        self.abs_max.iter_mut().zip(t).for_each(|(m, &t)| *m *= t.abs());
    }
}

//! A block as transforms see it: the numbers of its tensors, and the second moments of what its linears read.

use crate::Error;
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
    /// Weights `[out, in]`.
    pub linears: BTreeMap<Role, Vec<f32>>,
    /// Biases `[out]` of the linears that have one.
    pub biases: BTreeMap<Role, Vec<f32>>,
    /// Weights `[hidden]` of the norms.
    pub norms: BTreeMap<NormRole, Vec<f32>>,
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
            sites: Vec::new(),
        };
        for (role, module) in spec.block_linears(index) {
            block.linears.insert(role, input.weight(&module)?.to_f32()?);
            if spec.has_bias(role) {
                block.biases.insert(role, input.tensor(&format!("{module}.bias"))?.to_f32()?);
            }
        }
        for norm in NormRole::ALL.into_iter().filter(|&n| spec.has_norm(n)) {
            block.norms.insert(norm, input.tensor(&spec.norm(index, norm))?.to_f32()?);
        }
        if let Some(statistics) = statistics {
            let site = |site| -> Result<SiteMoments, Error> {
                Ok(SiteMoments { h: statistics.hessian(index, site)?, abs_max: statistics.abs_max(index, site)? })
            };
            block.sites = SITES.iter().map(site).collect::<Result<_, _>>()?;
        }
        Ok(block)
    }

    /// The rewritten values of the tensor `name`, if this block owns it.
    pub(super) fn values(&self, name: &str) -> Option<&[f32]> {
        let weight = |(role, module): (Role, String)| {
            if name == format!("{module}.weight") {
                return self.linears.get(&role);
            }
            if name == format!("{module}.bias") { self.biases.get(&role) } else { None }
        };
        let linears = self.spec.block_linears(self.index).into_iter();
        let norms = self.norms.iter().filter(|(norm, _)| self.spec.norm(self.index, **norm) == name);
        linears.filter_map(weight).chain(norms.map(|(_, w)| w)).next().map(Vec::as_slice)
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

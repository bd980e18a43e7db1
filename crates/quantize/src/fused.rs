//! Linears that loaders hold as one matrix: Q, K and V, gate and up. Under NVFP4 they must share what scales are divided by,
//! since a loader keeps one number for the matrix they become.

use crate::Error;
use crate::weight::weight;
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{ModelSpec, Role};

/// The roles that are loaded as one matrix.
pub(crate) const FUSED: [&[Role]; 2] = [&[Role::Q, Role::K, Role::V], &[Role::Gate, Role::Up]];
/// The same by the last part of names, where the architecture is not known.
const NAMES: [&[&str]; 3] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"], &["w1", "w3"]];

/// Whether linears of two roles are loaded as one matrix.
pub(crate) fn together(a: Role, b: Role) -> bool {
    let same = |set: &&[Role]| set.contains(&a.kind()) && set.contains(&b.kind());
    a == b || (a.expert() == b.expert() && FUSED.iter().any(same))
}

/// The largest magnitudes of matrices, several being one for a loader; each is read once.
pub(crate) struct Magnitudes<'a> {
    input: &'a Checkpoint,
    spec: Option<&'a ModelSpec>,
    known: Vec<(Vec<String>, f32)>,
}

impl<'a> Magnitudes<'a> {
    /// Those of `input`.
    pub(crate) fn new(input: &'a Checkpoint, spec: Option<&'a ModelSpec>) -> Self {
        Magnitudes { input, spec, known: Vec::new() }
    }

    /// The largest magnitude over all weights that are loaded as one matrix with those of `module`.
    pub(crate) fn largest(&mut self, module: &str) -> Result<f32, Error> {
        if let Some((_, amax)) = self.known.iter().find(|(names, _)| names.iter().any(|name| name == module)) {
            return Ok(*amax);
        }
        let names = partners(self.input, self.spec, module);
        let mut amax = 0.0f32;
        for name in &names {
            amax = weight(self.input, self.spec, name)?.iter().fold(amax, |a, w| a.max(w.abs()));
        }
        self.known.push((names, amax));
        Ok(amax)
    }
}

/// Names of the linears that are one matrix with `module`, itself included.
fn partners(input: &Checkpoint, spec: Option<&ModelSpec>, module: &str) -> Vec<String> {
    let found = match spec {
        Some(spec) => (0..spec.layers).find_map(|block| {
            let linears: Vec<(Role, String)> = spec.block_linears(block);
            let own = linears.iter().find(|(_, name)| name == module)?.0;
            Some(linears.into_iter().filter(|(role, _)| together(*role, own)).map(|(_, name)| name).collect())
        }),
        None => module.rsplit_once('.').and_then(|(path, last)| {
            let set = NAMES.iter().find(|set| set.contains(&last))?;
            let names = set.iter().map(|name| format!("{path}.{name}"));
            Some(names.filter(|name| input.contains(&format!("{name}.weight"))).collect())
        }),
    };
    found.unwrap_or_else(|| vec![module.to_owned()])
}

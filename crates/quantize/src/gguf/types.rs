//! Which type each matrix of a GGUF file gets: asked for by name, by a pattern, by a mixture, or the scheme's own.

use super::GgufSettings;
use super::mixes::{Circumstances, MIXES, Mix, Place, fallback};
use crate::{Error, Settings};
use bitmill_checkpoint::Dtype;
use bitmill_checkpoint::gguf::{self, GgmlType, Storage};
use bitmill_models::{ModelSpec, Role};
use bitmill_scheme::BLOCKS;
use fancy_regex::Regex;
use std::path::Path;

/// Types that dense matrices may have.
const DENSE: [&str; 3] = ["f32", "f16", "bf16"];

/// Names of the types that a tensor can be given.
#[must_use]
pub fn gguf_types() -> Vec<&'static str> {
    DENSE.into_iter().chain(BLOCKS.iter().map(|b| b.name)).collect()
}

/// The mixture called `name`; llama-quantize's short names mean the medium ones.
#[must_use]
pub fn gguf_mix(name: &str) -> Option<&'static Mix> {
    let name = match name {
        "q3_k" | "q4_k" | "q5_k" => &format!("{name}_m"),
        other => other,
    };
    MIXES.iter().find(|m| m.name == name)
}

/// The settings, resolved for one model.
pub(crate) struct TensorTypes<'a> {
    dir: &'a Path,
    mix: Option<&'static Mix>,
    base: &'static GgmlType,
    pure: bool,
    architecture: &'static str,
    /// The module of the token embedding, which is the output matrix too where there is no other.
    tokens: String,
    tied: bool,
    head: Option<String>,
    embedding: Option<&'static GgmlType>,
    output: Option<&'static GgmlType>,
    overrides: Vec<(Regex, &'static GgmlType)>,
    circumstances: Circumstances,
}

/// What a matrix becomes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chosen {
    pub(crate) kind: &'static GgmlType,
    /// The type that was meant, where its blocks do not fill a row.
    pub(crate) instead_of: Option<&'static str>,
}

impl<'a> TensorTypes<'a> {
    /// Resolves names and patterns. `data` says whether calibration data weigh the errors.
    ///
    /// # Errors
    /// [`Error::Gguf`] for a name that does not exist or is not written here, [`Error::Pattern`].
    pub(crate) fn new(dir: &'a Path, settings: &Settings, spec: &ModelSpec, data: bool) -> Result<Self, Error> {
        let own = settings.gguf.clone().unwrap_or_default();
        let GgufSettings { token_embedding, output, mix, pure, overrides, .. } = own;
        let named = |name: &String| type_named(dir, name);
        let mix = match mix {
            Some(name) => Some(gguf_mix(&name).ok_or_else(|| {
                let known: Vec<_> = MIXES.iter().map(|m| m.name).collect();
                Error::Gguf {
                    dir: dir.into(),
                    reason: format!("there is no mixture `{name}`; they are {}", known.join(", ")),
                }
            })?),
            None => None,
        };
        let base = match (mix, settings.scheme.form()) {
            (Some(mix), _) => type_named(dir, mix.base)?,
            (None, Some(form)) => type_named(dir, form.name)?,
            (None, None) => {
                let reason = format!("{} is no type of GGUF; choose one with --scheme", settings.scheme);
                return Err(Error::Gguf { dir: dir.into(), reason });
            }
        };
        let compile = |(pattern, name): &(String, String)| {
            let regex =
                Regex::new(pattern).map_err(|e| Error::Pattern { pattern: pattern.clone(), reason: e.to_string() })?;
            Ok::<_, Error>((regex, type_named(dir, name)?))
        };
        Ok(TensorTypes {
            dir,
            mix,
            base,
            pure,
            architecture: gguf::architecture(&spec.model_type).unwrap_or_default(),
            tokens: spec.embedding().strip_suffix(".weight").unwrap_or_default().to_owned(),
            tied: spec.tied || spec.head().is_none(),
            head: spec.head(),
            embedding: token_embedding.as_ref().map(named).transpose()?,
            output: output.as_ref().map(named).transpose()?,
            overrides: overrides.iter().map(compile).collect::<Result<_, _>>()?,
            circumstances: Circumstances::of(spec, data),
        })
    }

    /// The place of `module`, whose role and block are known if it is a linear of one.
    pub(crate) fn place(&self, module: &str, linear: Option<(Role, usize)>) -> Option<Place> {
        match linear {
            Some((role, block)) => Some(Place::Linear(role, block)),
            None if self.head.as_deref() == Some(module) || (module == self.tokens && self.tied) => Some(Place::Output),
            None if module == self.tokens => Some(Place::Embedding),
            None => None,
        }
    }

    /// What the matrix `name` (as a folder calls it) with rows of `row` weights becomes. What is asked for by name wins,
    /// then the first pattern that finds GGUF's name for it, then the mixture; without one, matrices outside of blocks
    /// are f16 unless everything is to be of one type.
    ///
    /// # Errors
    /// [`Error::Gguf`] where the mixture needs a type that is not written here.
    pub(crate) fn of(&self, name: &str, place: Place, row: usize) -> Result<Chosen, Error> {
        let plain = |kind| Ok(Chosen { kind, instead_of: None });
        let embedding = name.strip_suffix(".weight") == Some(&self.tokens);
        match (place, self.embedding, self.output) {
            (Place::Embedding | Place::Output, Some(kind), _) if embedding => return plain(kind),
            (Place::Output, _, Some(kind)) => return plain(kind),
            _ => {}
        }
        let gguf = gguf::gguf_name(self.architecture, name).unwrap_or_else(|| name.to_owned());
        let found = self.overrides.iter().find(|(regex, _)| regex.is_match(&gguf).unwrap_or(false));
        let wanted = match (found, self.mix, place) {
            (Some((_, kind)), _, _) => kind,
            (None, Some(mix), _) if !self.pure => {
                type_named(self.dir, mix.type_of(place, &self.circumstances, row, self.base.block))?
            }
            (None, None, Place::Embedding | Place::Output) if !self.pure => type_named(self.dir, "f16")?,
            _ => self.base,
        };
        // A type that was asked for as such is refused later where it does not fit; a mixture gives way.
        if row.is_multiple_of(wanted.block) || (self.mix.is_none() && !self.pure) {
            return plain(wanted);
        }
        let mut kind = type_named(self.dir, fallback(wanted.name))?;
        if !row.is_multiple_of(kind.block) {
            kind = type_named(self.dir, "f16")?;
        }
        Ok(Chosen { kind, instead_of: Some(wanted.name) })
    }
}

impl Chosen {
    /// The type of its numbers, where it stays dense.
    pub(crate) fn dense(&self) -> Option<Dtype> {
        match self.kind.storage {
            Storage::Dense(dtype) => Some(dtype),
            _ => None,
        }
    }
}

/// The tensor type called `name` in either case.
fn type_named(dir: &Path, name: &str) -> Result<&'static GgmlType, Error> {
    let written = |t: &&GgmlType| gguf_types().iter().any(|known| t.name.eq_ignore_ascii_case(known));
    let found = gguf::TYPES.iter().find(|t| t.name.eq_ignore_ascii_case(name)).filter(written);
    found.ok_or_else(|| {
        let reason =
            format!("the tensor type `{name}` is none that is written; the types are {}", gguf_types().join(", "));
        Error::Gguf { dir: dir.into(), reason }
    })
}

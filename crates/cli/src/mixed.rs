//! Options of mixed widths, shared by `quantize` and `plan`: a size to meet, the schemes to choose from, statistics.

use crate::progress::Progress;
use crate::units;
use anyhow::{Context, bail};
use bitmill_calibrate::{About, Pass, Statistics, Windows, model_fingerprint};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::Role;
use bitmill_quantize::{Budget, Mixture, Plan, calibrate, mix, sensitivities};
use bitmill_scheme::{Bits, Granularity, Scheme};
use clap::ArgAction;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What `--bits` says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Width {
    /// Every tensor has this many bits.
    Uniform(u32),
    /// Tensors have different widths, and everything written for them takes this many bits per weight.
    Mean(f64),
}

#[derive(Debug, clap::Args)]
pub(crate) struct MixtureArgs {
    /// Largest size of all weight files together, for example 5.2GB: tensors get the widths that fit it best
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes, conflicts_with_all = ["bits", "scheme"])]
    pub(crate) size: Option<u64>,
    /// Widths a mixture may take, with a group size where it is not that of --group-size: 2,3,4 or 2g64,3,4g32
    /// [default: 2,3,4,5,6,7,8]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_option)]
    options: Vec<(Bits, Option<Granularity>)>,
    /// Least bits of a kind of linear in a mixture, for example down_proj=4
    #[arg(long, value_name = "ROLE=BITS", action = ArgAction::Append, value_parser = parse_least)]
    least: Vec<(Role, u32)>,
    /// Statistics from `bitmill calibrate` instead of text: no forward pass. Several files are mixed by weight, a:0.7
    #[arg(long, value_name = "FILE[:WEIGHT]", action = ArgAction::Append, value_parser = parse_stats)]
    pub(crate) stats: Vec<(PathBuf, f64)>,
}

/// `4` is a width for every tensor, `4.0` and `3.5` are sizes that a mixture meets.
pub(crate) fn parse_width(text: &str) -> Result<Width, String> {
    let wrong = || format!("`{text}` is not a number of bits from 2 to 8");
    if text.contains('.') {
        let mean: f64 = text.parse().map_err(|_| wrong())?;
        return if (1.0..=9.0).contains(&mean) { Ok(Width::Mean(mean)) } else { Err(wrong()) };
    }
    match text.parse() {
        Ok(bits @ 2..=8) => Ok(Width::Uniform(bits)),
        _ => Err(wrong()),
    }
}

/// `3` or `3g64`.
fn parse_option(text: &str) -> Result<(Bits, Option<Granularity>), String> {
    let wrong =
        || format!("`{text}` is not an option; write a width from 2 to 8, and a group size if need be: 3 or 3g64");
    let (bits, group) = text.split_once('g').map_or((text, None), |(b, g)| (b, Some(g)));
    let bits = bits.parse().ok().filter(|b| (2..=8).contains(b)).and_then(|b| Bits::new(b).ok()).ok_or_else(wrong)?;
    let group = match group.map(|g| g.parse::<usize>()) {
        None => None,
        Some(Ok(g)) if g > 0 => Some(Granularity::Group(g)),
        Some(_) => return Err(wrong()),
    };
    Ok((bits, group))
}

fn parse_least(text: &str) -> Result<(Role, u32), String> {
    let (role, bits) = text.split_once('=').ok_or_else(|| format!("`{text}`: write ROLE=BITS, as in down_proj=4"))?;
    let names = || Role::ALL.map(Role::name).join(", ");
    let found =
        Role::ALL.into_iter().find(|r| r.name() == role).ok_or_else(|| format!("`{role}` is none of {}", names()))?;
    let bits = bits.parse().ok().filter(|b| (2..=8).contains(b)).ok_or_else(|| format!("`{bits}` is not 2 to 8"))?;
    Ok((found, bits))
}

/// A path, with a weight after the last colon if that is a number.
pub(crate) fn parse_weighted(text: &str) -> Result<(PathBuf, Option<f64>), String> {
    match text.rsplit_once(':').map(|(path, w)| (path, w.parse::<f64>())) {
        Some((path, Ok(weight))) if weight.is_finite() && weight > 0.0 => Ok((path.into(), Some(weight))),
        Some((_, Ok(weight))) => Err(format!("`{weight}` is not a weight above zero")),
        _ => Ok((text.into(), None)),
    }
}

fn parse_stats(text: &str) -> Result<(PathBuf, f64), String> {
    parse_weighted(text).map(|(path, weight)| (path, weight.unwrap_or(1.0)))
}

impl MixtureArgs {
    /// The schemes a mixture may take, narrowest first, like `scheme` in all but width (and group size where given).
    fn options(&self, scheme: &Scheme) -> Vec<Scheme> {
        let of = |bits, granularity: Option<Granularity>| {
            let scheme_of = Scheme::int(bits, scheme.symmetric(), granularity.unwrap_or(scheme.granularity));
            Scheme { activations: scheme.activations, ..scheme_of }.with_scale(scheme.scale)
        };
        if self.options.is_empty() {
            return Bits::ALL[1..].iter().map(|&b| of(b, None)).collect();
        }
        self.options.iter().map(|&(bits, granularity)| of(bits, granularity)).collect()
    }

    /// What a mixture must meet, if one is asked for.
    pub(crate) fn budget(&self, width: Option<Width>) -> anyhow::Result<Option<Budget>> {
        let budget = match (self.size, width) {
            (Some(size), _) => Some(Budget::Size(size)),
            (None, Some(Width::Mean(bits))) => Some(Budget::Bits(bits)),
            _ => None,
        };
        if budget.is_none() && !(self.options.is_empty() && self.least.is_empty()) {
            bail!(
                "--options and --least are for mixtures; ask for one with --size, or with a point in --bits (3.5, 4.0)"
            );
        }
        Ok(budget)
    }

    /// Opens the files of `--stats`, if there are any, for the model of `plan`.
    pub(crate) fn statistics(&self, input: &Checkpoint, plan: &Plan) -> anyhow::Result<Option<Statistics>> {
        if self.stats.is_empty() {
            return Ok(None);
        }
        let spec = plan.spec.as_ref().context("statistics need an architecture with a forward pass")?;
        Ok(Some(Statistics::open(&self.stats, spec, &model_fingerprint(input)?)?))
    }

    /// The mixture that meets `budget`, by what `statistics` say.
    pub(crate) fn mixture(
        &self,
        input: &Checkpoint,
        plan: &Plan,
        statistics: &Statistics,
        budget: Budget,
    ) -> anyhow::Result<Mixture> {
        let options = self.options(&plan.settings.scheme);
        let bar = Progress::new(plan.units.len() as u64);
        bar.message("weighing the options of every tensor".into());
        let table = sensitivities(input, plan, statistics, &options, &mut |done, _| bar.set(done as u64));
        bar.finish();
        let least: BTreeMap<Role, u32> = self.least.iter().copied().collect();
        let mixture = mix(input, plan, &table?, &options, budget, &least)?;
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        mixture.layers.values().for_each(|s| *counts.entry(s.to_string()).or_default() += 1);
        let counts: Vec<String> = counts.iter().map(|(s, n)| format!("{n} at {s}")).collect();
        eprintln!("mixture: {}; predicted KL divergence {:.5}", counts.join(", "), mixture.predicted);
        Ok(mixture)
    }
}

/// Statistics of `windows`, collected beside the output unless an earlier run of the same model and text left them.
pub(crate) fn collect_beside(out: &Path, pass: Pass<'_>, windows: &Windows) -> anyhow::Result<Statistics> {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".stats.safetensors");
    let path = out.with_file_name(name);
    let model = model_fingerprint(pass.model)?;
    let files = [(path.clone(), 1.0)];
    if path.exists()
        && let Ok(found) = Statistics::open(&files, pass.spec, &model)
        && found.is_of(&About::new(model.clone(), windows))
    {
        eprintln!("using the statistics in {}", path.display());
        return Ok(found);
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    collect_to(&path, pass, windows, true)?;
    eprintln!("statistics are kept in {}: --stats makes other sizes from them", path.display());
    Ok(Statistics::open(&files, pass.spec, &model)?)
}

/// Runs the calibration pass with a progress bar.
pub(crate) fn collect_to(path: &Path, pass: Pass<'_>, windows: &Windows, sensitivity: bool) -> anyhow::Result<()> {
    let mut bar = None;
    let mut tick = |done: usize, total: usize| {
        bar.get_or_insert_with(|| Progress::new(total as u64)).set(done as u64);
    };
    calibrate(pass, windows, path, sensitivity, &mut tick)?;
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_makes_a_mixture() {
        assert_eq!(parse_width("4"), Ok(Width::Uniform(4)));
        assert_eq!(parse_width("4.0"), Ok(Width::Mean(4.0)));
        assert_eq!(parse_width("3.25"), Ok(Width::Mean(3.25)));
        for wrong in ["1", "9", "0.5", "x", "4.x", "-3.0", "NaN", "inf"] {
            assert!(parse_width(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lists_are_read() {
        assert_eq!(parse_option("3"), Ok((Bits::ALL[2], None)));
        assert_eq!(parse_option("2g64"), Ok((Bits::ALL[1], Some(Granularity::Group(64)))));
        assert!(["1", "9", "3g", "3g0", "g3", ""].iter().all(|t| parse_option(t).is_err()));
        assert_eq!(parse_least("down_proj=4"), Ok((Role::Down, 4)));
        assert!(["down=4", "down_proj=1", "down_proj"].iter().all(|t| parse_least(t).is_err()));
        assert_eq!(parse_stats("a/b:0.7"), Ok(("a/b".into(), 0.7)));
        assert_eq!(parse_stats("c:/b"), Ok(("c:/b".into(), 1.0)));
        assert!(parse_stats("a:0").is_err() && parse_stats("a:-1").is_err() && parse_stats("a:inf").is_err());
    }
}

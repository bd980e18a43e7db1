//! Options of mixed widths, shared by `quantize` and `plan`: a size to meet, the schemes to choose from, statistics.

use crate::progress::Progress;
use crate::search::Bound;
use crate::units;
use anyhow::{Context, bail};
use bitmill_calibrate::{About, Pass, Statistics, Windows, model_fingerprint};
use bitmill_checkpoint::{Checkpoint, GGUF};
use bitmill_models::Role;
use bitmill_quantize::{
    Budget, Mixing, Mixture, Plan, Sensitivity, Survey, calibrate, loader_names, loaders, mix, refusal, sensitivities,
};
use bitmill_scheme::{Activations, BLOCKS, Bits, Granularity, GridKind, Preset, SCHEMES, Scheme};
use clap::ArgAction;
use clap::builder::PossibleValuesParser;
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

/// What a mixture must meet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// A size.
    Within(Budget),
    /// A loss, at the smallest size.
    Losing(Bound),
}

/// One entry of `--options`: a scheme, as far as it says.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pick {
    /// Integers; what is left out is that of the flags.
    Int { bits: Bits, granularity: Option<Granularity>, symmetric: Option<bool> },
    /// A scheme of weights by its name: a type of GGUF, or floats.
    Named(Scheme),
}

#[derive(Debug, clap::Args)]
pub(crate) struct MixtureArgs {
    /// Largest size of all weight files together, for example 5.2GB: tensors get the schemes that fit it best
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes, conflicts_with_all = ["bits", "scheme"])]
    pub(crate) size: Option<u64>,
    /// Longest time that reading the weights may take for one generated token, with --bandwidth: tensors get the schemes
    /// that fit it best
    #[arg(long, value_name = "MS", value_parser = parse_above_zero, requires = "bandwidth", conflicts_with_all = ["bits", "scheme", "size"])]
    decode_time: Option<f64>,
    /// Largest KL divergence from the full-precision model on held-out windows of the text, in nats per token: the smallest
    /// mixture that stays below is searched, by runs without tuning
    #[arg(long, value_name = "NATS", value_parser = parse_above_zero, conflicts_with_all = ["bits", "scheme", "size", "decode_time", "stats"])]
    max_kl: Option<f64>,
    /// Largest perplexity on held-out windows of the text, as a multiple of the full-precision model's: 1.01
    #[arg(long, value_name = "R", value_parser = parse_ratio, conflicts_with_all = ["bits", "scheme", "size", "decode_time", "stats"])]
    max_perplexity_ratio: Option<f64>,
    /// Bytes per second that the target machine reads from memory, for --decode-time: 60GB
    #[arg(long, value_name = "BYTES", value_parser = units::parse_bytes, requires = "decode_time")]
    bandwidth: Option<u64>,
    /// Schemes a mixture may take: widths, with a group size, `channel` and `asym` where they are not those of the flags
    /// (2,3g64,4g32asym,8channel), and floats (fp8a16, nvfp4a16, mxfp4a16, mxfp8a16), or types of GGUF (q3_k,q4_k,q6_k) [default: 2 to 8 bits in groups of 32, 64, 128 and
    /// --group-size; every type for a GGUF file]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_option)]
    options: Vec<Pick>,
    /// Least bits of a kind of linear in a mixture, for example down_proj=4
    #[arg(long, value_name = "ROLE=BITS", action = ArgAction::Append, value_parser = parse_least)]
    least: Vec<(Role, u32)>,
    /// A program that must load the output: a mixture leaves out what it refuses, anything else is an error
    #[arg(long, value_name = "NAME", action = ArgAction::Append, ignore_case = true,
          value_parser = PossibleValuesParser::new(loader_names()))]
    pub(crate) loader: Vec<String>,
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

/// Float schemes that leave activations alone: what rounding those costs no sensitivity knows.
fn floats() -> impl Iterator<Item = &'static Preset> {
    SCHEMES.iter().filter(|p| matches!(p.scheme.grid, GridKind::Float(_)) && p.scheme.activations == Activations::Full)
}

/// `3`, `3g64`, `4g32asym`, `8channel`, `nvfp4a16`, `q4_k`.
fn parse_option(text: &str) -> Result<Pick, String> {
    if let Some(form) = BLOCKS.iter().find(|b| b.name.eq_ignore_ascii_case(text)) {
        return Ok(Pick::Named(Scheme::block(form.kind)));
    }
    if let Some(float) = floats().find(|preset| preset.name.eq_ignore_ascii_case(text)) {
        return Ok(Pick::Named(float.scheme));
    }
    let wrong = || {
        format!(
            "`{text}` is not an option; write a width from 2 to 8, then a group size or `channel` and `asym` or `sym` if \
             need be (3, 3g64, 4g32asym, 8channel), floats ({}) or a type of GGUF (q4_k)",
            floats().map(|preset| preset.name).collect::<Vec<_>>().join(", ")
        )
    };
    let (rest, symmetric) = match (text.strip_suffix("asym"), text.strip_suffix("sym")) {
        (Some(rest), _) => (rest, Some(false)),
        (None, Some(rest)) => (rest, Some(true)),
        (None, None) => (text, None),
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (bits, group) = rest.split_at(digits);
    let bits = bits.parse().ok().filter(|b| (2..=8).contains(b)).and_then(|b| Bits::new(b).ok()).ok_or_else(wrong)?;
    let granularity = match group {
        "" => None,
        "channel" => Some(Granularity::Channel),
        _ => {
            let size = group.strip_prefix('g').and_then(|g| g.parse().ok()).filter(|&g: &usize| g > 0);
            Some(Granularity::Group(size.ok_or_else(wrong)?))
        }
    };
    Ok(Pick::Int { bits, granularity, symmetric })
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|v: &f64| v.is_finite() && *v > 1.0);
    found.ok_or_else(|| format!("`{text}` is not a number above 1"))
}

fn parse_above_zero(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|v: &f64| v.is_finite() && *v > 0.0);
    found.ok_or_else(|| format!("`{text}` is not a number above zero"))
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
    /// The schemes a mixture may take, like `scheme` in what is not said.
    fn options(&self, plan: &Plan) -> anyhow::Result<Vec<Scheme>> {
        let (scheme, format, scale) = (&plan.settings.scheme, plan.format.name(), plan.settings.scheme.scale);
        let int = |bits, granularity: Option<Granularity>, symmetric: Option<bool>| {
            let symmetric = symmetric.unwrap_or(scheme.symmetric());
            let of = Scheme::int(bits, symmetric, granularity.unwrap_or(scheme.granularity));
            Scheme { activations: scheme.activations, ..of }.with_scale(scheme.scale)
        };
        let mut options: Vec<Scheme> = Vec::new();
        if !self.options.is_empty() {
            options.extend(self.options.iter().map(|pick| match pick {
                Pick::Int { bits, granularity, symmetric } => int(*bits, *granularity, *symmetric),
                Pick::Named(scheme) => scheme.with_scale(scale),
            }));
        } else if format == GGUF.name() {
            options.extend(BLOCKS.iter().map(|b| Scheme::block(b.kind)));
        } else {
            let groups = [128, 64, 32].map(|g| Some(Granularity::Group(g)));
            let both = |b: &Bits| std::iter::once(None).chain(groups).map(|g| int(*b, g, None)).collect::<Vec<_>>();
            options.extend(Bits::ALL[1..].iter().flat_map(both));
        }
        let mut seen: Vec<Scheme> = Vec::new();
        options.retain(|s| {
            !seen.contains(s) && {
                seen.push(*s);
                true
            }
        });
        let of_format = |s: &&Scheme| s.form().is_some() != (format == GGUF.name());
        if let Some(other) = options.iter().find(of_format) {
            bail!("{other} cannot be stored as {format}; types of GGUF and other schemes do not mix in one output");
        }
        if let Some((other, reason)) = options.iter().find_map(|s| plan.method.refuses(s).map(|reason| (s, reason))) {
            bail!("method {} cannot make {other}: {reason}", plan.method.name());
        }
        for loader in &self.loader {
            options.retain(|s| refusal(loader, format, s).is_none());
            if options.is_empty() {
                bail!(
                    "{loader} takes none of the schemes asked for as {format}; give others with --options, or another --format"
                );
            }
        }
        Ok(options)
    }

    /// The format that options of floats ask for.
    pub(crate) fn format(&self) -> Option<&'static str> {
        let float = |pick: &Pick| matches!(pick, Pick::Named(Scheme { grid: GridKind::Float(_), .. }));
        self.options.iter().any(float).then_some("mixed-precision")
    }

    /// Refuses a plan that a named loader does not take.
    pub(crate) fn check_loaders(&self, plan: &Plan) -> anyhow::Result<()> {
        for (name, reasons) in
            loaders(plan).into_iter().filter(|(name, _)| self.loader.iter().any(|l| l.eq_ignore_ascii_case(name)))
        {
            if let Some(reason) = reasons.first() {
                bail!("{name} would not load this output: {reason}");
            }
        }
        Ok(())
    }

    /// What a mixture must meet, if one is asked for.
    pub(crate) fn goal(&self, width: Option<Width>) -> anyhow::Result<Option<Goal>> {
        let bound = Bound { kl: self.max_kl, ratio: self.max_perplexity_ratio };
        let goal = match (self.size, self.decode_time.zip(self.bandwidth), width) {
            (Some(size), ..) => Some(Goal::Within(Budget::Size(size))),
            (None, Some((ms, bandwidth)), _) => Some(Goal::Within(Budget::Read((ms * 1e-3 * bandwidth as f64) as u64))),
            (None, None, Some(Width::Mean(bits))) => Some(Goal::Within(Budget::Bits(bits))),
            _ if bound.kl.is_some() || bound.ratio.is_some() => Some(Goal::Losing(bound)),
            _ => None,
        };
        if goal.is_none() && !(self.options.is_empty() && self.least.is_empty()) {
            bail!(
                "--options and --least are for mixtures; ask for one with --size or --max-kl, or with a point in --bits \
                 (3.5, 4.0)"
            );
        }
        Ok(goal)
    }

    /// Opens the files of `--stats`, if there are any, for the model of `plan`.
    pub(crate) fn statistics(&self, input: &Checkpoint, plan: &Plan) -> anyhow::Result<Option<Statistics>> {
        if self.stats.is_empty() {
            return Ok(None);
        }
        let spec = plan.spec.as_ref().context("statistics need an architecture with a forward pass")?;
        Ok(Some(Statistics::open(&self.stats, spec, &model_fingerprint(input)?)?))
    }

    /// What mixtures of `plan` are chosen from, by what `statistics` say.
    pub(crate) fn weighed(&self, input: &Checkpoint, plan: &Plan, statistics: &Statistics) -> anyhow::Result<Weighed> {
        let options = self.options(plan)?;
        let bar = Progress::new(plan.units.len() as u64);
        bar.message("weighing the options of every tensor".into());
        let table = sensitivities(input, plan, statistics, &options, &mut |done, _| bar.set(done as u64));
        bar.finish();
        let least = self.least.iter().copied().collect();
        Ok(Weighed { table: table?, cross: statistics.cross()?, options, least })
    }
}

/// The costs of all options.
pub(crate) struct Weighed {
    table: Vec<Sensitivity>,
    cross: Option<Vec<f64>>,
    options: Vec<Scheme>,
    least: BTreeMap<Role, u32>,
}

impl Weighed {
    /// What mixtures are chosen from.
    fn mixing(&self) -> Mixing<'_> {
        let Weighed { table, cross, options, least } = self;
        Mixing { table, cross: cross.as_deref(), options, least }
    }

    /// The best mixtures at all sizes.
    pub(crate) fn survey(&self) -> Survey {
        self.mixing().survey()
    }

    /// The plan of the best mixture within `budget`.
    pub(crate) fn plan(&self, input: &Checkpoint, plan: &Plan, budget: Budget) -> anyhow::Result<Plan> {
        let mixture = mix(input, plan, &self.mixing(), budget)?;
        let mut mixed = Plan::new(input, &mixture.settings(&plan.settings))?;
        mixed.mixture = Some(mixture);
        Ok(mixed)
    }
}

/// Says what a mixture is made of.
pub(crate) fn describe(mixture: &Mixture) {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    mixture.layers.values().for_each(|s| *counts.entry(s.to_string()).or_default() += 1);
    let counts: Vec<String> = counts.iter().map(|(s, n)| format!("{n} at {s}")).collect();
    eprintln!("mixture: {}", counts.join(", "));
    let rank = mixture.survey.as_ref().map(|s| s.rank_correlation);
    let rank = rank.map_or(String::new(), |r| format!("; rank correlation of predicted and measured errors {r:.3}"));
    eprintln!("predicted KL divergence {:.5}{rank}", mixture.predicted);
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
    use bitmill_scheme::BlockType;

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
        let int =
            |bits: usize, granularity, symmetric| Ok(Pick::Int { bits: Bits::ALL[bits - 1], granularity, symmetric });
        assert_eq!(parse_option("3"), int(3, None, None));
        assert_eq!(parse_option("2g64"), int(2, Some(Granularity::Group(64)), None));
        assert_eq!(parse_option("4g32asym"), int(4, Some(Granularity::Group(32)), Some(false)));
        assert_eq!(parse_option("8channelsym"), int(8, Some(Granularity::Channel), Some(true)));
        assert_eq!(parse_option("Q4_K"), Ok(Pick::Named(Scheme::block(BlockType::Q4K))));
        assert_eq!(parse_option("NVFP4A16"), Ok(Pick::Named(bitmill_scheme::scheme("nvfp4a16").unwrap())));
        assert!(parse_option("fp8_dynamic").unwrap_err().contains("fp8a16, nvfp4a16, mxfp4a16, mxfp8a16"));
        assert!(["1", "9", "3g", "3g0", "g3", "", "q4", "4asymm"].iter().all(|t| parse_option(t).is_err()));
        assert_eq!(parse_least("down_proj=4"), Ok((Role::Down, 4)));
        assert!(["down=4", "down_proj=1", "down_proj"].iter().all(|t| parse_least(t).is_err()));
        assert_eq!(parse_stats("a/b:0.7"), Ok(("a/b".into(), 0.7)));
        assert_eq!(parse_stats("c:/b"), Ok(("c:/b".into(), 1.0)));
        assert!(parse_stats("a:0").is_err() && parse_stats("a:-1").is_err() && parse_stats("a:inf").is_err());
    }
}

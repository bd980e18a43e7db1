//! Reads a [`Rope`] in both spellings: `rope_theta` beside `rope_scaling`, and transformers v5's `rope_parameters`.

use super::{Rope, RopeKind};
use crate::Error;
use crate::config::Reader;

const KINDS: &str = "default, linear, dynamic, llama3, yarn, longrope";

/// How an architecture writes its rotary embedding, and what it assumes where its config is silent.
#[derive(Clone, Copy)]
pub(crate) struct RopeKeys {
    /// The key of the base beside the section.
    pub(crate) base: &'static str,
    /// The base.
    pub(crate) theta: f64,
    /// The key, beside the section, of the share of each head that is rotated, and the share; where an architecture
    /// has none, it must be all.
    pub(crate) share: Option<(&'static str, f64)>,
    /// Further names of longrope scaling.
    pub(crate) longrope: &'static [&'static str],
    /// Context length before scaling, where the architecture has one whatever its section says.
    pub(crate) original: Option<usize>,
}

impl RopeKeys {
    pub(crate) const USUAL: RopeKeys =
        RopeKeys { base: "rope_theta", theta: 1e4, share: None, longrope: &[], original: None };
}

impl Rope {
    /// The rotary embedding a config asks for, of heads of `head_dim`. Where both spellings stand, `rope_scaling` wins, as
    /// in the reference.
    pub(crate) fn read(
        config: &Reader<'_>,
        keys: &RopeKeys,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Rope, Error> {
        let scaling = config.section("rope_scaling")?.filter(|s| s.keys().next().is_some());
        let section = match scaling {
            Some(section) => Some(section),
            None => config.section("rope_parameters")?,
        };
        let top = config.positive(keys.base)?;
        if let Some((section, key)) =
            section.as_ref().and_then(|s| s.keys().find(|k| k.ends_with("_attention")).map(|k| (s, k)))
        {
            return Err(section.error(key, "gives layers rotary embeddings of their own, which is unsupported"));
        }
        let dim = rotated(config, section.as_ref(), keys, head_dim)?;
        let Some(section) = section else {
            return Ok(Rope {
                theta: base(config, keys.base, top.unwrap_or(keys.theta))?,
                dim,
                kind: RopeKind::Default,
            });
        };
        let theta = section.positive("rope_theta")?.or(top).unwrap_or(keys.theta);
        let context = Context { config, keys, dim, max_positions };
        Ok(Rope { theta: base(&section, "rope_theta", theta)?, dim, kind: context.kind(&section)? })
    }

    /// The rotary embeddings of models whose windowed blocks have one of their own: that of blocks that see everything,
    /// and that of windowed ones. Beside a section for both, there is the spelling `rope_scaling`, which is of those that are
    /// `scaled`.
    pub(crate) fn read_pair(
        config: &Reader<'_>,
        [full, windowed]: [(&'static str, f64); 2],
        scaled: [bool; 2],
        head_dim: usize,
        max_positions: usize,
    ) -> Result<[Rope; 2], Error> {
        let parameters = config.section("rope_parameters")?;
        let kinds = ["full_attention", "sliding_attention"];
        let unknown = |both: &Reader<'_>| both.keys().find(|key| !kinds.contains(key)).map(str::to_owned);
        if let Some((both, key)) = parameters.as_ref().and_then(|both| Some((both, unknown(both)?))) {
            return Err(both.error(&key, format!("is neither of {}", kinds.join(", "))));
        }
        let scaling = || Ok::<_, Error>(config.section("rope_scaling")?.filter(|s| s.keys().next().is_some()));
        if scaling()?.is_some() && parameters.is_some() {
            return Err(config.error("rope_scaling", "stands beside rope_parameters; which of them holds is unclear"));
        }
        let nested = |kind: &str| parameters.as_ref().map(|both| both.section(kind)).transpose().map(Option::flatten);
        let mut ropes = Vec::new();
        for (((key, default), kind), scaled) in [full, windowed].into_iter().zip(kinds).zip(scaled) {
            let section = nested(kind)?.or(scaling()?.filter(|_| scaled));
            let keys = RopeKeys { base: key, theta: default, ..RopeKeys::USUAL };
            let top = config.positive(key)?;
            let context = Context {
                config,
                keys: &keys,
                dim: rotated(config, section.as_ref(), &keys, head_dim)?,
                max_positions,
            };
            let (theta, kind) = match &section {
                Some(section) => (section.positive("rope_theta")?.or(top), context.kind(section)?),
                None => (top, RopeKind::Default),
            };
            ropes.push(Rope { theta: base(config, key, theta.unwrap_or(default))?, dim: context.dim, kind });
        }
        match <[Rope; 2]>::try_from(ropes) {
            Ok(pair) => Ok(pair),
            Err(_) => unreachable!("two were read"),
        }
    }
}

/// The channels of each head that are rotated.
fn rotated(
    config: &Reader<'_>,
    section: Option<&Reader<'_>>,
    keys: &RopeKeys,
    head_dim: usize,
) -> Result<usize, Error> {
    let usual = "partial_rotary_factor";
    let Some((key, default)) = keys.share else {
        for reader in section.into_iter().chain([config]) {
            if reader.positive(usual)?.is_some_and(|f| f != 1.0) {
                return Err(reader.error(usual, "other than 1 is unsupported for this architecture"));
            }
        }
        return Ok(head_dim);
    };
    let (reader, key, share) = match section.map(|s| s.positive(usual)).transpose()?.flatten() {
        Some(share) => (section.unwrap_or(config), usual, share),
        None => (config, key, config.positive(key)?.unwrap_or(default)),
    };
    let dim = (head_dim as f64 * share) as usize;
    if share > 1.0 || dim < 2 || !dim.is_multiple_of(2) {
        return Err(
            reader.error(key, format!("is {share}: of heads of {head_dim} channels that rotates {dim}, no pairs"))
        );
    }
    Ok(dim)
}

struct Context<'a> {
    config: &'a Reader<'a>,
    keys: &'a RopeKeys,
    dim: usize,
    max_positions: usize,
}

impl Context<'_> {
    fn kind(&self, section: &Reader<'_>) -> Result<RopeKind, Error> {
        let key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
        match section.text(key)?.unwrap_or("default") {
            "default" => Ok(RopeKind::Default),
            "linear" => Ok(RopeKind::Linear { factor: section.required_positive("factor")? }),
            "dynamic" if self.dim <= 2 => Err(section.error(key, "is dynamic, which heads of two channels cannot be")),
            "dynamic" => Ok(RopeKind::Dynamic { factor: self.dynamic_factor(section)?, original: self.max_positions }),
            "llama3" => self.llama3(section),
            kind if kind == "longrope" || self.keys.longrope.contains(&kind) => self.longrope(section),
            "yarn" => self.yarn(section),
            other => {
                let other: String = other.chars().take(40).collect();
                Err(section.error(key, format!("is \"{other}\"; understood are {KINDS}")))
            }
        }
    }

    /// Below 1 the base would shrink, and turn negative for long windows.
    fn dynamic_factor(&self, section: &Reader<'_>) -> Result<f64, Error> {
        match section.required_positive("factor")? {
            factor if factor >= 1.0 => Ok(factor),
            factor => Err(section.error("factor", format!("is {factor}; dynamic scaling needs 1 or more"))),
        }
    }

    fn llama3(&self, section: &Reader<'_>) -> Result<RopeKind, Error> {
        let (low, high) =
            (section.required_positive("low_freq_factor")?, section.required_positive("high_freq_factor")?);
        if high <= low {
            return Err(section.error("high_freq_factor", format!("is {high}, not above low_freq_factor, {low}")));
        }
        let factor = section.required_positive("factor")?;
        Ok(RopeKind::Llama3 { factor, low, high, original: self.original(section)? })
    }

    fn yarn(&self, section: &Reader<'_>) -> Result<RopeKind, Error> {
        let original = self.original(section)?;
        let factor = section.positive("factor")?.unwrap_or(self.max_positions as f64 / original as f64);
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let attention = match (
            section.positive("attention_factor")?,
            truthy(section, "mscale")?,
            truthy(section, "mscale_all_dim")?,
        ) {
            (Some(attention), ..) => attention,
            (None, Some(m), Some(all)) => scale(m) / scale(all),
            _ => scale(1.0),
        };
        Ok(RopeKind::Yarn {
            factor,
            beta_fast: truthy(section, "beta_fast")?.unwrap_or(32.0),
            beta_slow: truthy(section, "beta_slow")?.unwrap_or(1.0),
            truncate: section.flag("truncate", true)?,
            attention,
            original,
        })
    }

    fn longrope(&self, section: &Reader<'_>) -> Result<RopeKind, Error> {
        let original = self.original(section)?;
        let factor = section.positive("factor")?.unwrap_or(self.max_positions as f64 / original as f64);
        let attention = match section.positive("attention_factor")? {
            Some(attention) => attention,
            None if factor <= 1.0 => 1.0,
            None if original == 1 => {
                return Err(section.error("original_max_position_embeddings", "is 1, too short to extend"));
            }
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        let pairs = self.dim / 2;
        let (short, long) = (section.positives("short_factor", pairs)?, section.positives("long_factor", pairs)?);
        Ok(RopeKind::LongRope { short, long, attention, original })
    }

    /// The context length before scaling. A value beside the section wins over one inside it, as in the reference.
    fn original(&self, section: &Reader<'_>) -> Result<usize, Error> {
        let key = "original_max_position_embeddings";
        let beside = self.config.positions(key)?.or(self.keys.original);
        Ok(beside.or(section.positions(key)?).unwrap_or(self.max_positions))
    }
}

/// A base of 1 or less has no wavelengths to speak of, and no logarithm to divide by.
fn base(reader: &Reader<'_>, key: &str, theta: f64) -> Result<f64, Error> {
    if theta > 1.0 { Ok(theta) } else { Err(reader.error(key, format!("is {theta}, not above 1"))) }
}

/// A positive number; zero means absent, as it does to the reference's `or`.
fn truthy(section: &Reader<'_>, key: &str) -> Result<Option<f64>, Error> {
    match section.get(key).and_then(serde_json::Value::as_f64) {
        Some(0.0) => Ok(None),
        _ => section.positive(key),
    }
}

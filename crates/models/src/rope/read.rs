//! Reads a [`Rope`] in both spellings: `rope_theta` beside `rope_scaling`, and transformers v5's `rope_parameters`.

use super::{Rope, RopeKind};
use crate::Error;
use crate::config::Reader;

const KINDS: &str = "default, linear, dynamic, llama3, yarn, longrope";

impl Rope {
    /// The rotary embedding a config asks for. Where both spellings stand, `rope_scaling` wins, as in the reference.
    pub(crate) fn read(config: &Reader<'_>, dim: usize, max_positions: usize) -> Result<Rope, Error> {
        let scaling = config.section("rope_scaling")?.filter(|s| s.keys().next().is_some());
        let section = match scaling {
            Some(section) => Some(section),
            None => config.section("rope_parameters")?,
        };
        let top = config.positive("rope_theta")?;
        let Some(section) = section else {
            return Ok(Rope { theta: base(config, top.unwrap_or(1e4))?, dim, kind: RopeKind::Default });
        };
        if let Some(key) = section.keys().find(|k| k.ends_with("_attention")) {
            return Err(section.error(key, "gives layers rotary embeddings of their own, which is unsupported"));
        }
        for reader in [&section, config] {
            if reader.positive("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
                return Err(reader.error("partial_rotary_factor", "other than 1 is unsupported for this architecture"));
            }
        }
        let theta = base(&section, section.positive("rope_theta")?.or(top).unwrap_or(1e4))?;
        let context = Context { config, dim, max_positions };
        Ok(Rope { theta, dim, kind: context.kind(&section)? })
    }
}

struct Context<'a> {
    config: &'a Reader<'a>,
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
            "yarn" => self.yarn(section),
            "longrope" => self.longrope(section),
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
        Ok(self.config.positions(key)?.or(section.positions(key)?).unwrap_or(self.max_positions))
    }
}

/// A base of 1 or less has no wavelengths to speak of, and no logarithm to divide by.
fn base(reader: &Reader<'_>, theta: f64) -> Result<f64, Error> {
    if theta > 1.0 { Ok(theta) } else { Err(reader.error("rope_theta", format!("is {theta}, not above 1"))) }
}

/// A positive number; zero means absent, as it does to the reference's `or`.
fn truthy(section: &Reader<'_>, key: &str) -> Result<Option<f64>, Error> {
    match section.get(key).and_then(serde_json::Value::as_f64) {
        Some(0.0) => Ok(None),
        _ => section.positive(key),
    }
}

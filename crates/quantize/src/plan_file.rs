//! Plans as files that people read, edit and run: settings as TOML, schemes in their short spelling.
//!
//! ```toml
//! method = "gptq"
//! scheme = "w4 g128 sym"
//! # ... the other settings
//! [roles]
//! down_proj = "w6 g128 sym"
//! [layers]
//! "model.layers.0.self_attn.q_proj" = "w8 channel sym"
//! ```
//! `[roles]` names the last part of modules and `[layers]` whole ones; the narrower rule wins. Keys that are left out keep
//! their defaults where they have one, and unknown keys are errors.

use crate::{Error, Plan, Settings};
use bitmill_checkpoint::Checkpoint;
use bitmill_scheme::{Activations, Bits, Granularity, GridKind, SCHEMES, Scheme};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use std::collections::BTreeMap;
use std::path::Path;
use toml::{Table, Value};

/// The spelling that [`Scheme`]'s `Display` writes: `w4 g128 sym`, `w8a8 channel sym`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_scheme(text: &str) -> Result<Scheme, String> {
    // Others have no symmetry to say, and the names they are known by.
    if text == Scheme::binary(128).to_string() {
        return Ok(Scheme::binary(128));
    }
    if let Some(float) = parse_float(text) {
        return Ok(float);
    }
    let wrong =
        || format!("`{text}` is not a scheme; write it like `w4 g128 sym`, `w8 channel asym` or `w8a8 channel sym`");
    let parts: Vec<&str> = text.split_whitespace().collect();
    let &[width, granularity, symmetry] = &parts[..] else { return Err(wrong()) };
    let width = width.strip_prefix('w').ok_or_else(wrong)?;
    let (bits, activations) = match width.split_once('a') {
        Some((bits, "8")) => (bits, Activations::DynamicInt8),
        Some((bits, "fp8")) => (bits, Activations::DynamicFp8),
        Some((bits, "16")) => (bits, Activations::Full),
        Some(_) => return Err(wrong()),
        None => (width, Activations::Full),
    };
    let bits = bits.parse().ok().filter(|b| (2..=8).contains(b)).and_then(|b| Bits::new(b).ok()).ok_or_else(wrong)?;
    let granularity = match granularity {
        "tensor" => Granularity::Tensor,
        "channel" => Granularity::Channel,
        group => {
            let size = group.strip_prefix('g').and_then(|g| g.parse().ok()).filter(|&g: &usize| g > 0);
            Granularity::Group(size.ok_or_else(wrong)?)
        }
    };
    let symmetric = match symmetry {
        "sym" => true,
        "asym" => false,
        _ => return Err(wrong()),
    };
    Ok(Scheme { activations, ..Scheme::int(bits, symmetric, granularity) })
}

/// `nvfp4 g16`, `fp8 channel`, `fp8afp8 channel`.
fn parse_float(text: &str) -> Option<Scheme> {
    let named = SCHEMES.iter().map(|p| p.scheme).filter(|s| matches!(s.grid, GridKind::Float(_)));
    let granularities = [Granularity::Tensor, Granularity::Channel, Granularity::Tile(128)];
    let plain = named.clone().flat_map(|s| {
        let own = move |granularity| Scheme { granularity, activations: Activations::Full, ..s };
        granularities.into_iter().filter(move |_| s.scale.is_wide()).map(own)
    });
    named.chain(plain).find(|s| s.to_string() == text)
}

/// `settings` as a plan file, headed by `remarks` as comments.
///
/// # Errors
/// [`Error::PlanFile`] never, short of a value TOML has no way to write.
pub fn write_plan(settings: &Settings, remarks: &[String]) -> Result<String, Error> {
    let wrong = |e: &dyn std::fmt::Display| Error::PlanFile { file: "plan".into(), reason: e.to_string() };
    let mut table = Table::try_from(settings).map_err(|e| wrong(&e))?;
    table.insert("scheme".into(), Value::String(settings.scheme.to_string()));
    let named = |(module, scheme): (&String, &Scheme)| (module.clone(), Value::String(scheme.to_string()));
    // Tables come last, or the keys after them would be theirs.
    let solver = table.remove("solver");
    table.remove("layers");
    if let Some(solver) = solver {
        table.insert("solver".into(), solver);
    }
    if !settings.layers.is_empty() {
        table.insert("layers".into(), Value::Table(settings.layers.iter().map(named).collect()));
    }
    let body = toml::to_string(&table).map_err(|e| wrong(&e))?;
    let head: String = remarks.iter().flat_map(|r| r.lines()).map(|l| format!("# {l}\n")).collect();
    Ok(format!("{head}{body}"))
}

/// Reads a plan file for the model `input`, whose modules the rules of its `[roles]` are spread over. `defaults` stands
/// in for keys that are left out.
///
/// # Errors
/// [`Error::PlanFile`] with the line or key, and the refusals of [`Plan::new`] for the settings without its rules.
pub fn read_plan(file: &Path, input: &Checkpoint, defaults: &Settings) -> Result<Settings, Error> {
    let text = std::fs::read_to_string(file).map_err(crate::journal::io(file, "reading the plan"))?;
    parse_plan(&text, input, defaults).map_err(|e| match e {
        Reading::Text(reason) => Error::PlanFile { file: file.to_owned(), reason },
        Reading::Plan(e) => *e,
    })
}

enum Reading {
    Text(String),
    Plan(Box<Error>),
}

fn parse_plan(text: &str, input: &Checkpoint, defaults: &Settings) -> Result<Settings, Reading> {
    let written: Table = toml::from_str(text).map_err(|e| Reading::Text(e.to_string()))?;
    let mut table = Table::try_from(defaults).map_err(|e| Reading::Text(e.to_string()))?;
    let (mut roles, mut layers) = (BTreeMap::new(), BTreeMap::new());
    for (key, value) in written {
        match key.as_str() {
            "scheme" => {
                let scheme = scheme_of(&key, &value)?;
                table.insert(key, Value::try_from(scheme).map_err(|e| Reading::Text(e.to_string()))?);
            }
            "roles" => roles = schemes(&key, value)?,
            "layers" => layers = schemes(&key, value)?,
            // The keys that are given replace the defaults one by one.
            "solver" => match (table.get_mut("solver"), value) {
                (Some(Value::Table(solver)), Value::Table(own)) => solver.extend(own),
                (_, value) => drop(table.insert(key, value)),
            },
            _ => drop(table.insert(key, value)),
        }
    }
    let mut settings = Settings::deserialize(table.into_deserializer()).map_err(|e| Reading::Text(e.to_string()))?;
    settings.layers.clear();
    if !roles.is_empty() {
        let plan = Plan::new(input, &settings).map_err(|e| Reading::Plan(Box::new(e)))?;
        let mut used = BTreeMap::new();
        for (module, _, _) in plan.quantized() {
            let role = module.rsplit('.').next().unwrap_or(module);
            if let Some(scheme) = roles.get(role) {
                settings.layers.insert(module.clone(), *scheme);
                used.insert(role.to_owned(), ());
            }
        }
        if let Some(role) = roles.keys().find(|r| !used.contains_key(*r)) {
            return Err(Reading::Text(format!("[roles] {role}: no quantized module ends in this name")));
        }
    }
    settings.layers.extend(layers);
    Ok(settings)
}

fn schemes(key: &str, value: Value) -> Result<BTreeMap<String, Scheme>, Reading> {
    let Value::Table(table) = value else { return Err(Reading::Text(format!("{key}: a table is needed"))) };
    let each = table.iter().map(|(name, v)| Ok((name.clone(), scheme_of(name, v)?)));
    each.collect()
}

fn scheme_of(key: &str, value: &Value) -> Result<Scheme, Reading> {
    let text = value.as_str().ok_or_else(|| Reading::Text(format!("{key}: a scheme in quotes is needed")))?;
    parse_scheme(text).map_err(|reason| Reading::Text(format!("{key}: {reason}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_are_read_as_they_are_written() {
        for preset in SCHEMES {
            assert_eq!(parse_scheme(&preset.scheme.to_string()), Ok(preset.scheme), "{}", preset.name);
        }
        for bits in 2..=8 {
            for granularity in [Granularity::Tensor, Granularity::Channel, Granularity::Group(96)] {
                for symmetric in [true, false] {
                    let scheme = Scheme::int(Bits::new(bits).unwrap(), symmetric, granularity);
                    assert_eq!(parse_scheme(&scheme.to_string()), Ok(scheme));
                }
            }
        }
        for wrong in ["", "w4", "w4 g128", "w1 g128 sym", "w4 g0 sym", "w4 g128 odd", "w4a4 g128 sym", "4 g128 sym"] {
            assert!(parse_scheme(wrong).is_err(), "{wrong}");
        }
    }
}

//! How a folder is quantized: an ordered list of rules from module names to formats and schemes.
//!
//! Every `quantization_config` reduces to such a list. Its order carries the precedence of the dialect (compressed-
//! tensors: ignored, exact name, pattern, class; GPTQ: dynamic rules as written, then everything), so that looking a
//! module up is the same for all.

use crate::Error;
use crate::formats::{FORMATS, Format, auto_round};
use bitmill_scheme::{ScaleType, Scheme};
use fancy_regex::Regex;
use serde_json::Value;

/// The parsed `quantization_config` of a folder.
#[derive(Debug)]
pub struct Dialect {
    format: &'static dyn Format,
    rules: Vec<Rule>,
    /// Whether keys and values are rounded, too.
    cache: bool,
}

/// What holds for the modules that match a target; the first rule that matches decides.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub(crate) target: Target,
    /// `None`: left as it was.
    pub(crate) outcome: Option<(&'static dyn Format, Scheme)>,
}

/// Which modules a rule speaks of.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// The module of this name.
    Name(String),
    /// Modules whose name matches from its start, as Python's `re.match`.
    Pattern(Regex),
    /// Every linear module.
    Linear,
}

impl Dialect {
    /// Reads the `quantization_config` of a `config.json`; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::UnknownFormat`] and [`Error::Config`], naming the key.
    pub fn of(config: &Value) -> Result<Option<Self>, Error> {
        // compression_config is what compressed-tensors wrote before 2024-10.
        let block = ["quantization_config", "compression_config"].iter().find_map(|k| config.get(k));
        let Some(block) = block.filter(|b| !b.is_null()) else {
            return Ok(None);
        };
        let Some(method) = block.get("quant_method").and_then(Value::as_str) else {
            return Err(wrong("quant_method", block.get("quant_method"), "a string should name the method"));
        };
        let translated = auto_round::translated(block)?;
        let block = translated.as_ref().unwrap_or(block);
        for format in FORMATS {
            if let Some(mut dialect) = format.recognise(block)? {
                dialect.set_scale(model_type(config));
                return Ok(Some(dialect));
            }
        }
        let known = "compressed-tensors, gptq, awq, auto-round, modelopt, fp8, mxfp4, bitsandbytes, bitmill".to_owned();
        Err(Error::UnknownFormat { key: "quant_method", got: method.to_owned(), known })
    }

    pub(crate) fn new(format: &'static dyn Format, rules: Vec<Rule>) -> Self {
        Dialect { format, rules, cache: false }
    }

    /// The same where keys and values are rounded to 8-bit floats, or are not.
    pub(crate) fn with_cache(self, cache: bool) -> Self {
        Dialect { cache, ..self }
    }

    /// Whether keys and values are kept as 8-bit floats, under scales that [`crate::Checkpoint::cache_scales`] reads.
    #[must_use]
    pub fn rounds_cache(&self) -> bool {
        self.cache
    }

    /// The dialect in which each module of `rules` has its own scheme under `format`, and others are dense.
    pub(crate) fn by_name(format: &'static dyn Format, rules: Vec<(String, Scheme)>) -> Self {
        let rule = |(name, scheme)| Rule { target: Target::Name(name), outcome: Some((format, scheme)) };
        Dialect::new(format, rules.into_iter().map(rule).collect())
    }

    /// The format of the folder; of its first group where groups differ.
    #[must_use]
    pub fn format(&self) -> &'static dyn Format {
        self.format
    }

    /// The format of the linear `module`; `None` where it is left dense.
    #[must_use]
    pub fn format_of(&self, module: &str) -> Option<&'static dyn Format> {
        self.outcome(module).map(|(format, _)| format)
    }

    /// The scheme of the linear `module`; `None` where it is left dense. The configuration does not record the type of
    /// the scales, so the model's own type stands in: [`crate::Checkpoint::scheme_of`] knows the stored one.
    #[must_use]
    pub fn scheme_of(&self, module: &str) -> Option<Scheme> {
        self.outcome(module).map(|(_, scheme)| scheme)
    }

    fn outcome(&self, module: &str) -> Option<(&'static dyn Format, Scheme)> {
        self.rules.iter().find(|rule| rule.target.matches(module))?.outcome
    }

    fn set_scale(&mut self, scale: ScaleType) {
        for (_, scheme) in self.rules.iter_mut().filter_map(|r| r.outcome.as_mut()) {
            *scheme = scheme.with_scale(scale);
        }
    }
}

impl Target {
    /// A Python pattern, anchored at the start only.
    pub(crate) fn pattern(key: &str, pattern: &str) -> Result<Self, Error> {
        let compiled = Regex::new(&format!("^(?:{pattern})"));
        compiled.map(Target::Pattern).map_err(|e| wrong(key, Some(&pattern.into()), format!("not a pattern: {e}")))
    }

    /// A target or ignore entry of compressed-tensors: `re:` and a pattern, a class name, or a module name.
    pub(crate) fn parse(key: &str, text: &str) -> Result<Self, Error> {
        match text.strip_prefix("re:") {
            Some(pattern) => Target::pattern(key, pattern),
            None if text == "Linear" => Ok(Target::Linear),
            // Names of other classes match no module name, and no module of theirs is read as a linear.
            None => Ok(Target::Name(text.to_owned())),
        }
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Target::Name(name) => name == module,
            // A pattern that exceeds its backtracking limit matches nothing.
            Target::Pattern(regex) => regex.is_match(module).unwrap_or(false),
            Target::Linear => true,
        }
    }
}

/// [`Error::Config`] for `key`.
pub(crate) fn wrong(key: &str, got: Option<&Value>, reason: impl Into<String>) -> Error {
    let got = got.map_or_else(|| "missing".to_owned(), Value::to_string);
    Error::Config { key: key.to_owned(), got, reason: reason.into() }
}

/// The type a 16-bit model's scales are stored in.
fn model_type(config: &Value) -> ScaleType {
    let name = ["dtype", "torch_dtype"].iter().find_map(|k| config.get(k)).and_then(Value::as_str);
    match name.map(|n| n.trim_start_matches("torch.")) {
        Some("float16") => ScaleType::F16,
        Some("float32") => ScaleType::F32,
        _ => ScaleType::Bf16,
    }
}

//! Options of GGUF files, shared by `quantize` and `plan`: what each matrix becomes, and llama.cpp's importance matrices.

use anyhow::bail;
use bitmill_calibrate::Imatrix;
use bitmill_quantize::{GgufSettings, MIXES, gguf_mix, gguf_types};
use bitmill_scheme::{BLOCKS, BlockType, Scheme};
use clap::ArgAction;
use clap::builder::PossibleValuesParser;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct GgufArgs {
    /// A mixture of types for a GGUF file, by llama-quantize's name: each matrix gets the type it gets there. Names that are no
    /// type's (q4_k_m) are taken by --scheme too
    #[arg(long, value_name = "NAME", value_parser = mix_names(), hide_possible_values = true,
          conflicts_with_all = ["scheme", "bits", "group_size", "asymmetric"], long_help = mix_help())]
    mix: Option<String>,
    /// Give every matrix of a GGUF file the one type, embedding and output matrix too; --scheme TYPE alone leaves these f16
    #[arg(long)]
    pure: bool,
    /// Type of the tensors of a GGUF file whose name there (blk.0.ffn_down.weight) the expression finds; the first that does
    /// counts, before any mixture
    #[arg(long, value_name = "REGEX=TYPE", action = ArgAction::Append, value_parser = parse_override)]
    tensor_type: Vec<(String, String)>,
    /// Type of the token embedding in a GGUF file [default: what the mixture says, or f16]
    #[arg(long, value_name = "TYPE", value_parser = tensor_types(), hide_possible_values = true)]
    token_embedding_type: Option<String>,
    /// Type of the output matrix in a GGUF file, and of an embedding that is tied to it [default: what the mixture says, or f16]
    #[arg(long, value_name = "TYPE", value_parser = tensor_types(), hide_possible_values = true)]
    output_tensor_type: Option<String>,
    /// Importance matrix of llama.cpp (GGUF or .dat) to weigh errors by, instead of text; weights are then rounded to nearest
    #[arg(long, value_name = "FILE", conflicts_with_all = ["stats", "calibration"])]
    imatrix: Option<PathBuf>,
    /// Quantize a GGUF file that is quantized already: what was lost stays lost, and more is
    #[arg(long)]
    allow_requantize: bool,
}

/// Names of mixtures that `--scheme` takes: those that are not types as well.
pub(crate) fn scheme_mixes() -> impl Iterator<Item = &'static str> {
    MIXES.iter().map(|m| m.name).filter(|name| bitmill_scheme::scheme(name).is_none())
}

fn mix_names() -> PossibleValuesParser {
    PossibleValuesParser::new(MIXES.iter().map(|m| m.name).chain(["q3_k", "q4_k", "q5_k"]))
}

fn mix_help() -> String {
    let names: Vec<&str> = MIXES.iter().map(|m| m.name).collect();
    format!(
        "A mixture of types for a GGUF file, by llama-quantize's name: each matrix gets the type it gets there ({}; q3_k, q4_k \
         and q5_k mean the medium ones). Names that are no type's (q4_k_m) are taken by --scheme too",
        names.join(", ")
    )
}

fn tensor_types() -> PossibleValuesParser {
    PossibleValuesParser::new(gguf_types())
}

fn parse_override(text: &str) -> Result<(String, String), String> {
    let (pattern, name) =
        text.rsplit_once('=').ok_or_else(|| format!("`{text}`: write REGEX=TYPE, as in ffn_down=q6_k"))?;
    let name = name.to_lowercase();
    if gguf_types().contains(&name.as_str()) {
        return Ok((pattern.into(), name));
    }
    Err(format!("`{name}` is none of {}", gguf_types().join(", ")))
}

impl GgufArgs {
    /// The mixture asked for, by `--mix` or by `--scheme`.
    fn mix(&self, scheme: Option<&String>) -> Option<&'static bitmill_quantize::Mix> {
        gguf_mix(self.mix.as_ref().or(scheme.filter(|name| scheme_mixes().any(|mix| mix == *name)))?)
    }

    /// The base of the mixture as a scheme, if one is asked for: of a dense one, any type stands in.
    pub(crate) fn scheme(&self, scheme: Option<&String>) -> Option<Scheme> {
        let base = self.mix(scheme)?.base;
        let form = BLOCKS.iter().find(|b| b.name.eq_ignore_ascii_case(base));
        Some(Scheme::block(form.map_or(BlockType::Q8_0, |f| f.kind)))
    }

    /// Whether weights are weighed by an importance matrix, or stay dense, so that nothing is fed back.
    pub(crate) fn rounds_to_nearest(&self, scheme: Option<&String>) -> bool {
        let dense = |mix: &bitmill_quantize::Mix| matches!(mix.base, "F32" | "F16" | "BF16");
        self.imatrix.is_some() || self.mix(scheme).is_some_and(dense)
    }

    /// Whether errors are weighed by an importance matrix.
    pub(crate) fn weighs(&self) -> bool {
        self.imatrix.is_some()
    }

    /// What the options say of the file.
    pub(crate) fn settings(&self, scheme: Option<&String>) -> GgufSettings {
        GgufSettings {
            token_embedding: self.token_embedding_type.clone(),
            output: self.output_tensor_type.clone(),
            mix: self.mix(scheme).map(|m| m.name.to_owned()),
            pure: self.pure,
            overrides: self.tensor_type.clone(),
            requantize: self.allow_requantize,
        }
    }

    /// Whether any option is given, and which.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let given = [
            (self.pure, "--pure"),
            (!self.tensor_type.is_empty(), "--tensor-type"),
            (self.token_embedding_type.is_some(), "--token-embedding-type"),
            (self.output_tensor_type.is_some(), "--output-tensor-type"),
        ];
        given.into_iter().find(|(yes, _)| *yes).map(|(_, name)| name)
    }

    /// The importance matrix, if one is given.
    pub(crate) fn imatrix(&self) -> anyhow::Result<Option<Imatrix>> {
        let Some(file) = &self.imatrix else { return Ok(None) };
        let read = Imatrix::read(file)?;
        eprintln!(
            "weighing errors by {}: {} weights, {} chunks of text",
            file.display(),
            read.entries.len(),
            read.chunks
        );
        Ok(Some(read))
    }

    /// Refuses options that the output does not know.
    pub(crate) fn check(&self, as_gguf: bool) -> anyhow::Result<()> {
        match self.given() {
            Some(option) if !as_gguf => bail!("{option} is for GGUF files; name the output .gguf, or leave it out"),
            _ => Ok(()),
        }
    }
}

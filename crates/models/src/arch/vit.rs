//! ViT: an encoder of images. Patches are its tokens, behind one that stands for the whole image; from there it is BERT with
//! norms before attention and MLP, and one at the end.

use super::{Arch, Sizes, act, bare, equal_heads, layers};
use crate::config::Reader;
use crate::layout::VIT;
use crate::{Error, Images, ModelSpec, NormKind};
use serde_json::Value;

/// `model_type: vit`.
pub(super) struct Vit;

impl Arch for Vit {
    fn model_types(&self) -> &'static [&'static str] {
        &["vit"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        let head_dim = match config.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => equal_heads(&config, hidden, heads)?,
        };
        let images = images(&config)?;
        let sizes = Sizes {
            hidden,
            intermediate: config.size("intermediate_size")?,
            layers: layers(&config)?,
            vocab: 0,
            heads,
            kv_heads: heads,
            head_dim,
            max_positions: 1 + images.patches(),
        };
        Ok(ModelSpec {
            images: Some(images),
            norm: NormKind::Layer,
            norm_eps: config.positive("layer_norm_eps")?.unwrap_or(1e-12),
            causal: false,
            qkv_bias: config.flag("qkv_bias", true)?,
            out_bias: true,
            mlp_bias: true,
            act: act(&config, ("hidden_act", "gelu"))?,
            ..bare("vit", &VIT, &sizes)
        })
    }
}

fn images(config: &Reader<'_>) -> Result<Images, Error> {
    let images = Images {
        channels: config.optional_size("num_channels")?.unwrap_or(3),
        size: pair(config, "image_size", 224)?,
        patch: pair(config, "patch_size", 16)?,
    };
    match images.patches() {
        0 => Err(config.error("patch_size", format!("is larger than the images of {:?}", images.size))),
        _ => Ok(images),
    }
}

/// Height and width, as a number for both or a list.
fn pair(config: &Reader<'_>, key: &str, default: usize) -> Result<[usize; 2], Error> {
    match config.get(key) {
        Some(Value::Array(both)) => match both[..] {
            [ref height, ref width] => Ok([config.size_value(key, height)?, config.size_value(key, width)?]),
            _ => Err(config.error(key, format!("has {} entries; height and width are two", both.len()))),
        },
        _ => Ok([config.optional_size(key)?.unwrap_or(default); 2]),
    }
}

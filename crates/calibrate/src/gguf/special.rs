//! The special tokens of a folder as keys of a GGUF file: their ids, whether texts begin and end with them, and the chat
//! template.

use super::{added_tokens, key};
use bitmill_checkpoint::gguf::Value as Meta;
use serde_json::Value;
use std::path::Path;

/// What a folder calls special tokens, and GGUF.
pub(super) const KINDS: [(&str, &str); 7] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("sep", "seperator"),
    ("pad", "padding"),
    ("cls", "cls"),
    ("mask", "mask"),
];

/// Adds them to `keys`.
pub(super) fn special(dir: &Path, config: &Value, whole: Option<&Value>, keys: &mut Vec<(String, Meta)>) {
    let settings: Value = settings(dir);
    let text = |name: &str| {
        let token = &settings[format!("{name}_token")];
        token.as_str().or_else(|| token["content"].as_str())
    };
    // BERT has no first and last token by these names, but two that it puts there.
    let named = |name: &str| match name {
        "bos" => text("bos").or_else(|| text("cls")),
        "eos" => text("eos").or_else(|| text("sep")),
        other => text(other),
    };
    let id_of = |name: &str| {
        let text = named(name)?;
        added_tokens(whole).find(|a| a.content == text).map(|a| a.id as u64)
    };
    let configured = |name: &str| {
        let id = &config[format!("{name}_token_id")];
        id.as_u64().or_else(|| id.as_array()?.first()?.as_u64())
    };
    for (name, gguf) in KINDS {
        let name_there = key(&format!("{gguf}_token_id"));
        if keys.iter().any(|(own, _)| *own == name_there) {
            continue;
        }
        if let Some(id) = id_of(name).or_else(|| configured(name)).and_then(|id| u32::try_from(id).ok()) {
            keys.push((name_there, Meta::U32(id)));
        }
    }
    if let Some((first, last)) = whole.and_then(frame) {
        // What a template says of sentences; whether decoders begin texts with BOS is their settings' matter.
        for (name, flag) in [("add_bos_token", first), ("add_eos_token", last), ("add_sep_token", false)] {
            keys.push((key(name), Meta::Bool(flag)));
        }
    } else {
        for name in ["add_bos_token", "add_eos_token"] {
            let written = settings[name].as_bool();
            // A folder that does not say adds BOS where its post-processor does.
            let bos = || name == "add_bos_token" && whole.is_some_and(begins_with_special);
            keys.push((key(name), Meta::Bool(written.unwrap_or_else(bos))));
        }
    }
    let template = settings["chat_template"].as_str().map(str::to_owned);
    if let Some(template) = template.or_else(|| std::fs::read_to_string(dir.join("chat_template.jinja")).ok()) {
        keys.push(("tokenizer.chat_template".into(), Meta::Text(template)));
    }
}

/// `tokenizer_config.json`.
pub(super) fn settings(dir: &Path) -> Value {
    let bytes = std::fs::read(dir.join("tokenizer_config.json")).ok();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Of a WordPiece model, whether its template begins and ends with a special token.
fn frame(whole: &Value) -> Option<(bool, bool)> {
    let single = whole["post_processor"]["single"].as_array().filter(|_| whole["model"]["type"] == "WordPiece")?;
    let special = |part: Option<&Value>| part.is_some_and(|part| part.get("SpecialToken").is_some());
    Some((special(single.first()), special(single.last())))
}

/// Whether the post-processor puts a special token before a text.
fn begins_with_special(whole: &Value) -> bool {
    let first = |p: &Value| p["single"][0].get("SpecialToken").is_some();
    let processor = &whole["post_processor"];
    first(processor) || processor["processors"].as_array().is_some_and(|all| all.iter().any(first))
}

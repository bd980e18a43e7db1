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
        let between = whole.and_then(|whole| separates(whole, [named("eos"), named("sep")]));
        keys.extend(between.map(|flag| (key("add_sep_token"), Meta::Bool(flag))));
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

/// Of a template that puts tokens between two texts, whether they are of `ends` and close no text that stands alone.
fn separates(whole: &Value, ends: [Option<&str>; 2]) -> Option<bool> {
    let processor = &whole["post_processor"];
    let all = processor["processors"].as_array().map_or(std::slice::from_ref(processor), Vec::as_slice);
    let template = all.iter().find(|p| p["type"] == "TemplateProcessing")?;
    let token = |part: &Value| part["SpecialToken"]["id"].as_str().map(str::to_owned);
    let pair = template["pair"].as_array()?;
    let texts: Vec<usize> = (0..pair.len()).filter(|&i| token(&pair[i]).is_none()).collect();
    let &[first, second] = texts.as_slice() else { return None };
    let between: Vec<String> = pair[first + 1..second].iter().filter_map(token).collect();
    let closes =
        template["single"].as_array().and_then(|single| single.last()).is_some_and(|part| token(part).is_some());
    let ends = |own: &String| ends.contains(&Some(own.as_str()));
    (!between.is_empty()).then(|| !closes && between.iter().any(ends))
}

/// Whether the post-processor puts a special token before a text.
fn begins_with_special(whole: &Value) -> bool {
    let first = |p: &Value| p["single"][0].get("SpecialToken").is_some();
    let processor = &whole["post_processor"];
    first(processor) || processor["processors"].as_array().is_some_and(|all| all.iter().any(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tokens_between_texts_are_told_as_the_converter_does() {
        let token = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let of = |single: Vec<Value>, pair: Vec<Value>| {
            let template = json!({"type": "TemplateProcessing", "single": single, "pair": pair});
            let whole =
                json!({"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}});
            separates(&whole, [Some("</s>"), None])
        };
        let single = vec![token("<s>"), text("A")];
        assert_eq!(of(single.clone(), vec![token("<s>"), text("A"), token("<s>"), text("B")]), Some(false));
        assert_eq!(of(single.clone(), vec![token("<s>"), text("A"), token("</s>"), text("B")]), Some(true));
        assert_eq!(of(single, vec![token("<s>"), text("A"), text("B")]), None);
        let closed = vec![text("A"), token("</s>")];
        assert_eq!(of(closed, vec![text("A"), token("</s>"), text("B"), token("</s>")]), Some(false));
    }
}

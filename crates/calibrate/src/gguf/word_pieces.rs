//! WordPiece vocabularies, as BERT has them: in a folder a piece that continues a word begins with `##`, in GGUF one that
//! begins a word begins with `▁`.

use super::{CONTROL, USER_DEFINED, Vocabulary, added_tokens, key};
use bitmill_checkpoint::gguf::{Gguf, Value as Meta, ValueType};
use serde_json::{Map, Value, json};

/// What continues a word in a folder, and what begins one in GGUF.
const CONTINUES: &str = "##";
const BEGINS: char = '▁';

/// How long a word may be before it counts as unknown; llama.cpp has no such bound.
const LONGEST_WORD: u64 = 100;

/// The tokenizer keys of a WordPiece `tokenizer.json`, for an embedding of `vocab` rows.
pub(super) fn keys(whole: &Value, vocab: usize) -> Result<Vec<(String, Meta)>, String> {
    let model = &whole["model"];
    if model["continuing_subword_prefix"].as_str().is_some_and(|own| own != CONTINUES) {
        return Err(format!(
            "pieces that continue words begin with {}, not with {CONTINUES}",
            model["continuing_subword_prefix"]
        ));
    }
    if whole["pre_tokenizer"]["type"] != "BertPreTokenizer" {
        return Err(format!(
            "it cuts text into words by {}, and llama.cpp as BERT does",
            whole["pre_tokenizer"]["type"]
        ));
    }
    let (lowercase, strips) = normalizer(&whole["normalizer"])?;
    if !frames(whole) {
        return Err("it does not put one special token before and one behind every text, which llama.cpp does".into());
    }
    let ids = model["vocab"].as_object().ok_or("it has no vocabulary")?;
    let mut v = Vocabulary::unused(vocab);
    for (token, id) in ids {
        let id = id.as_u64().ok_or_else(|| format!("the id of token {token:?} is no number"))?;
        v.set(id as usize, token.clone(), 0.0, super::NORMAL)?;
    }
    for added in added_tokens(Some(whole)) {
        v.set(added.id, added.content, 0.0, if added.special { CONTROL } else { USER_DEFINED })?;
    }
    for (token, &kind) in v.tokens.iter_mut().zip(&v.types) {
        if kind != CONTROL {
            *token = token.strip_prefix(CONTINUES).map_or_else(|| format!("{BEGINS}{token}"), str::to_owned);
        }
    }
    v.check()?;
    let mut keys = vec![
        (key("model"), Meta::Text("bert".into())),
        // Read of other models only.
        (key("pre"), Meta::Text("default".into())),
        (key("tokens"), Meta::texts(v.tokens)),
        (key("token_type"), Meta::Array(ValueType::I32, v.types.into_iter().map(Meta::I32).collect())),
        (key("normalizer.lowercase"), Meta::Bool(lowercase)),
    ];
    keys.extend(strips.map(|strips| (key("normalizer.strip_accents"), Meta::Bool(strips))));
    Ok(keys)
}

/// Whether letters lose their case, and their accents if that is said; what else BERT does to text, llama.cpp does always.
fn normalizer(normalizer: &Value) -> Result<(bool, Option<bool>), String> {
    if normalizer["type"] != "BertNormalizer" {
        return Err(format!("it normalizes text by {}, and llama.cpp as BERT does", normalizer["type"]));
    }
    for what in ["clean_text", "handle_chinese_chars"] {
        if normalizer[what] == false {
            return Err(format!("its normalizer has {what} off, and llama.cpp's has it on"));
        }
    }
    Ok((normalizer["lowercase"].as_bool().unwrap_or(true), normalizer["strip_accents"].as_bool()))
}

/// Whether its post-processor puts a special token before a text and one behind it.
fn frames(whole: &Value) -> bool {
    let processor = &whole["post_processor"];
    if processor["type"] == "BertProcessing" {
        return true;
    }
    let special = |part: &Value| part.get("SpecialToken").is_some();
    let single = processor["single"].as_array().map(Vec::as_slice);
    matches!(single, Some([first, _, last]) if special(first) && special(last))
}

/// The `tokenizer.json` of the vocabulary `tokens` of `types` in `gguf`.
pub(super) fn tokenizer_json(gguf: &Gguf, tokens: &[&str], types: &[u64]) -> Result<Value, String> {
    let token = |names: [&str; 2], default: u64| {
        let id =
            names.iter().find_map(|name| gguf.get(&key(&format!("{name}_token_id")))?.unsigned()).unwrap_or(default);
        let text = usize::try_from(id).ok().and_then(|id| tokens.get(id).copied());
        text.map(|text| (text, id))
            .ok_or_else(|| format!("the token {id}, named by {}_token_id, does not exist", names[0]))
    };
    let (cls, cls_id) = token(["bos", "cls"], 101)?;
    let (sep, sep_id) = token(["seperator", "eos"], 102)?;
    let (unknown, _) = token(["unknown", "unknown"], 100)?;
    let plain = |(token, kind): (&&str, &u64)| match token.strip_prefix(BEGINS) {
        _ if *kind as i32 == CONTROL => (*token).to_owned(),
        Some(whole) => whole.to_owned(),
        None => format!("{CONTINUES}{token}"),
    };
    let texts: Vec<String> = tokens.iter().zip(types).map(plain).collect();
    let vocab: Map<String, Value> = texts.iter().enumerate().map(|(id, text)| (text.clone(), id.into())).collect();
    if vocab.len() != tokens.len() {
        return Err("two tokens have the same text".into());
    }
    let added: Vec<Value> = (texts.iter().zip(types).enumerate())
        .filter(|(_, (_, kind))| matches!(**kind as i32, CONTROL | USER_DEFINED))
        .map(|(id, (text, kind))| super::added_token(id, text, *kind as i32 == CONTROL))
        .collect();
    let flag = |name: &str| match gguf.get(&key(name)) {
        Some(Meta::Bool(flag)) => Some(*flag),
        _ => None,
    };
    let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": flag("normalizer.strip_accents"),
                       "lowercase": flag("normalizer.lowercase").unwrap_or(true)},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special(cls), text("A", 0), special(sep)],
            "pair": [special(cls), text("A", 0), special(sep), text("B", 1), {"SpecialToken": {"id": sep, "type_id": 1}}],
            "special_tokens": {
                cls: {"id": cls, "ids": [cls_id], "tokens": [cls]},
                sep: {"id": sep, "ids": [sep_id], "tokens": [sep]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": CONTINUES,
                  "max_input_chars_per_word": LONGEST_WORD, "vocab": vocab},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;
    use std::path::Path;

    fn whole() -> Value {
        let pieces =
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "##s", "cat", "cafe", "é", ",", "##é", "x", "[unused1]"];
        let vocab: Map<String, Value> =
            pieces.iter().enumerate().map(|(id, piece)| ((*piece).into(), id.into())).collect();
        let added: Vec<Value> = (0..4).map(|id| super::super::added_token(id, pieces[id], true)).collect();
        json!({
            "added_tokens": added,
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": vocab},
        })
    }

    fn folder(whole: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), whole.to_string()).unwrap();
        let names = json!({"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"});
        std::fs::write(dir.path().join("tokenizer_config.json"), names.to_string()).unwrap();
        dir
    }

    #[test]
    fn word_pieces_survive_the_way_there_and_back() {
        for (lowercase, strips) in
            [(true, Value::Null), (false, Value::Null), (true, json!(false)), (false, json!(true))]
        {
            let mut whole = whole();
            whole["normalizer"]["lowercase"] = json!(lowercase);
            whole["normalizer"]["strip_accents"] = strips;
            let dir = folder(&whole);
            let keys = crate::gguf_tokenizer(dir.path(), &json!({"model_type": "bert"}), 15).unwrap();
            let there = Gguf { metadata: keys.into_iter().collect(), tensors: Vec::new() };
            let tokens: Vec<&str> =
                there.get(&key("tokens")).unwrap().items().unwrap().iter().filter_map(Meta::text).collect();
            assert_eq!(&tokens[2..6], ["[CLS]", "[SEP]", "▁the", "s"]);
            assert_eq!(&tokens[12..], ["▁[unused1]", "▁[PAD13]", "▁[PAD14]"]);
            for (name, id) in [("bos", 2), ("cls", 2), ("eos", 3), ("seperator", 3), ("padding", 0), ("unknown", 1)] {
                assert_eq!(there.get(&key(&format!("{name}_token_id"))), Some(&Meta::U32(id)), "{name}");
            }
            let back = Tokenizer::of_gguf(&there, Path::new("x.gguf"), None).unwrap();
            let original = Tokenizer::open(dir.path(), None).unwrap();
            for text in ["The cats, café", "cafés x", "Cats the, é \u{4e00}the", ""] {
                let ids = original.sentence(text, 15, 12).unwrap();
                assert_eq!(back.sentence(text, 15, 12).unwrap(), ids, "{text}");
                assert_eq!((ids[0], ids[ids.len() - 1]), (2, 3));
            }
        }
    }

    #[test]
    fn other_ways_with_text_are_refused_by_name() {
        for (path, value, words) in [
            ("/normalizer/handle_chinese_chars", json!(false), "handle_chinese_chars"),
            ("/normalizer/type", json!("NFC"), "NFC"),
            ("/pre_tokenizer/type", json!("Whitespace"), "Whitespace"),
            ("/post_processor/type", json!("ByteLevel"), "before and one behind"),
            ("/model/continuing_subword_prefix", json!("@@"), "@@"),
            ("/model/vocab/##s", json!(4), "twice"),
        ] {
            let mut whole = whole();
            *whole.pointer_mut(path).unwrap() = value;
            if words == "twice" {
                // What continues a word and what begins one are told apart, two that begin one are not.
                whole["model"]["vocab"]["[PAD13]"] = json!(14);
            }
            let dir = folder(&whole);
            let said = crate::gguf_tokenizer(dir.path(), &json!({}), 15).unwrap_err().to_string();
            assert!(said.contains(words) && said.contains("tokenizer.json"), "{words}: {said}");
        }
    }
}

//! Tokenizers as GGUF files carry them, to and from those of model folders.
//!
//! Three families: SentencePiece byte pairs (model `llama`: pieces, scores, types), byte-level byte pairs (model `gpt2`:
//! tokens, types, merges, and the name of the expression that cuts text into words) and WordPiece (model `bert`). That name
//! is found from the expressions in `tokenizer.json` themselves, so a fine-tune that only adds tokens needs no table of
//! fingerprints.

mod special;
mod word_pieces;

use crate::Error;
use crate::sentencepiece::{self, BYTE_PAIRS, Piece, SentencePiece};
use bitmill_checkpoint::gguf::{Gguf, Value as Meta, ValueType};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Token types.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Scores of tokens that text is never merged into.
const ADDED_SCORE: f32 = -1000.0;
const UNUSED_SCORE: f32 = -10_000.0;

/// How byte-level tokenizers cut text into words.
struct Pre {
    /// The value of `tokenizer.ggml.pre`.
    name: &'static str,
    /// The expression; empty for GPT-2's own, which the byte-level step brings itself.
    split: &'static str,
    /// Whether text is brought into composed form first.
    nfc: bool,
}

/// What is recognised; other expressions have names in llama.cpp too, but a wrong name would mean worse text without a
/// word, so they are refused.
static PRES: &[Pre] = &[
    Pre {
        name: "llama-bpe",
        split: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        nfc: false,
    },
    Pre {
        name: "qwen2",
        split: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        nfc: true,
    },
    Pre {
        name: "gpt-4o",
        split: r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        nfc: false,
    },
    Pre { name: "gpt-2", split: "", nfc: false },
];

/// A vocabulary in the making.
struct Vocabulary {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn unused(size: usize) -> Self {
        Vocabulary {
            tokens: (0..size).map(|i| format!("[PAD{i}]")).collect(),
            scores: vec![UNUSED_SCORE; size],
            types: vec![UNUSED; size],
        }
    }

    fn set(&mut self, id: usize, token: String, score: f32, kind: i32) -> Result<(), String> {
        let size = self.tokens.len();
        let out = || format!("token {id} lies beyond the {size} rows of the embedding");
        *self.tokens.get_mut(id).ok_or_else(out)? = token;
        (self.scores[id], self.types[id]) = (score, kind);
        Ok(())
    }

    /// Two tokens of one text would abort a load.
    fn check(&self) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        match self.tokens.iter().find(|t| !seen.insert(*t)) {
            Some(twice) => Err(format!("the token {twice:?} is there twice, which llama.cpp refuses")),
            None => Ok(()),
        }
    }
}

/// The tokenizer keys of a GGUF file for the model folder `dir`, whose embedding has `vocab` rows and whose config is
/// `config`.
///
/// # Errors
/// [`Error::NoTokenizer`]; [`Error::Tokenizer`] with the reason where GGUF has no equal of it.
pub fn gguf_tokenizer(dir: &Path, config: &Value, vocab: usize) -> Result<Vec<(String, Meta)>, Error> {
    let (json, model) = (dir.join("tokenizer.json"), dir.join("tokenizer.model"));
    let fail = |file: &Path| {
        let file = file.to_owned();
        move |reason: String| Error::Tokenizer { file, reason }
    };
    let whole = match std::fs::read(&json) {
        Ok(bytes) => Some(serde_json::from_slice::<Value>(&bytes).map_err(|e| fail(&json)(e.to_string()))?),
        Err(_) => None,
    };
    let mut keys = match (model.is_file(), &whole) {
        (_, Some(whole)) if whole["model"]["type"] == "WordPiece" => {
            word_pieces::keys(whole, vocab).map_err(fail(&json))?
        }
        (true, _) => {
            let bytes = std::fs::read(&model).map_err(|e| fail(&model)(e.to_string()))?;
            let kind = config["model_type"].as_str().unwrap_or_default();
            let added = all_added(dir, whole.as_ref(), kind == "phi3");
            from_sentencepiece(&bytes, (whole.as_ref(), &added), kind.starts_with("gemma"), vocab)
                .map_err(fail(&model))?
        }
        (false, Some(whole)) => from_byte_level(whole, vocab).map_err(fail(&json))?,
        (false, None) => return Err(Error::NoTokenizer { dir: dir.to_owned() }),
    };
    special::special(dir, config, whole.as_ref(), &mut keys);
    Ok(keys)
}

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// What folders say of tokens beside the model, in the order in which later words count: `added_tokens.json`, and
/// `tokenizer_config.json`; of Phi-3, whose model knows less than its `tokenizer.json`, that too, and nothing is read into
/// a token's looks.
fn all_added(dir: &Path, whole: Option<&Value>, phi3: bool) -> Vec<Added> {
    let listed: Value = std::fs::read(dir.join("added_tokens.json"))
        .ok()
        .and_then(|b| serde_json::from_slice(&b).ok())
        .unwrap_or_default();
    let id = |v: &Value| usize::try_from(v.as_u64()?).ok();
    let listed = listed
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(content, own)| Some(Added { id: id(own)?, content: content.clone(), special: false }));
    let settings = special::settings(dir);
    let decoder = settings["added_tokens_decoder"].as_object().into_iter().flatten().filter_map(|(id, token)| {
        let (content, special) = (token["content"].as_str()?.to_owned(), token["special"].as_bool().unwrap_or(false));
        Some(Added { id: id.parse().ok()?, special: special || (!phi3 && looks_special(&content)), content })
    });
    listed.chain(decoder).chain(added_tokens(whole).filter(|_| phi3)).collect()
}

/// Whether a token is one of those that some folders forget to call special.
fn looks_special(token: &str) -> bool {
    let between = |first: &str, last: &str| token.starts_with(first) && token.ends_with(last);
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<\u{ff5c}", "\u{ff5c}>")
        || between("<unused", ">")
}

/// `added` has what the folder says of tokens; `bare` models put no space before a text, whatever theirs says.
fn from_sentencepiece(
    bytes: &[u8],
    (whole, added): (Option<&Value>, &[Added]),
    bare: bool,
    vocab: usize,
) -> Result<Vec<(String, Meta)>, String> {
    let model = sentencepiece::parse(bytes)?;
    if model.kind != BYTE_PAIRS {
        return Err("GGUF files of these architectures take byte-pair models only, and this one is unigram".into());
    }
    let mut v = Vocabulary::unused(vocab);
    for (id, p) in model.pieces.iter().enumerate() {
        v.set(id, p.text.clone(), p.score, p.kind as i32)?;
    }
    let unknown = v.types.iter().position(|&t| t == UNKNOWN);
    let beyond = added_tokens(whole).filter(|a| a.id >= model.pieces.len());
    // What lies beyond the embedding, like the image token of models without the tower, no text can hold.
    for added in beyond.chain(added.iter().cloned()).filter(|a| a.id < vocab) {
        let (text, kind) = match added.special {
            true => (added.content, CONTROL),
            false => (added.content.replace('▁', " "), USER_DEFINED),
        };
        v.set(added.id, text, ADDED_SCORE, kind)?;
    }
    v.check()?;
    let mut keys = vec![
        (key("model"), Meta::Text("llama".into())),
        (key("pre"), Meta::Text("default".into())),
        (key("tokens"), Meta::texts(v.tokens)),
        (key("scores"), Meta::Array(ValueType::F32, v.scores.into_iter().map(Meta::F32).collect())),
        (key("token_type"), Meta::Array(ValueType::I32, v.types.into_iter().map(Meta::I32).collect())),
        (key("add_space_prefix"), Meta::Bool(model.dummy_prefix && !bare)),
    ];
    if let Some(unknown) = unknown {
        keys.push((key("unknown_token_id"), Meta::U32(unknown as u32)));
    }
    Ok(keys)
}

fn from_byte_level(whole: &Value, vocab: usize) -> Result<Vec<(String, Meta)>, String> {
    let pre = classify(whole)?;
    let model = &whole["model"];
    let ids = model["vocab"].as_object().filter(|_| model["type"] == "BPE").ok_or("its model is not byte pairs")?;
    let mut v = Vocabulary::unused(vocab);
    for (token, id) in ids {
        let id = id.as_u64().ok_or_else(|| format!("the id of token {token:?} is no number"))?;
        v.set(id as usize, token.clone(), 0.0, NORMAL)?;
    }
    for added in added_tokens(Some(whole)) {
        v.set(added.id, added.content, 0.0, if added.special { CONTROL } else { USER_DEFINED })?;
    }
    v.check()?;
    let merge = |m: &Value| match m {
        Value::String(s) => Some(s.clone()),
        Value::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    };
    let merges: Option<Vec<String>> = model["merges"].as_array().ok_or("it has no merges")?.iter().map(merge).collect();
    Ok(vec![
        (key("model"), Meta::Text("gpt2".into())),
        (key("pre"), Meta::Text(pre.name.into())),
        (key("tokens"), Meta::texts(v.tokens)),
        (key("token_type"), Meta::Array(ValueType::I32, v.types.into_iter().map(Meta::I32).collect())),
        (key("merges"), Meta::texts(merges.ok_or("a merge is not a pair of tokens")?)),
    ])
}

/// The row of [`PRES`] whose steps are those of `tokenizer.json`.
fn classify(whole: &Value) -> Result<&'static Pre, String> {
    let steps = |v: &Value, list: &str| match v["type"].as_str() {
        Some("Sequence") => v[list].as_array().cloned().unwrap_or_default(),
        Some(_) => vec![v.clone()],
        None => Vec::new(),
    };
    let pre = steps(&whole["pre_tokenizer"], "pretokenizers");
    let byte_level = pre
        .iter()
        .find(|s| s["type"] == "ByteLevel")
        .ok_or("it is neither byte-level nor WordPiece, and tokenizer.model is not there")?;
    let splits: Vec<&str> =
        pre.iter().filter(|s| s["type"] == "Split").filter_map(|s| s["pattern"]["Regex"].as_str()).collect();
    let others = pre.len() - 1 - splits.len();
    let normalizers = steps(&whole["normalizer"], "normalizers");
    let nfc = normalizers.iter().any(|n| n["type"] == "NFC");
    let own = byte_level["use_regex"].as_bool().unwrap_or(true);
    let found = PRES.iter().find(|p| match splits[..] {
        [split] => p.split == split && !own,
        [] => p.split.is_empty() && own,
        _ => false,
    });
    match found {
        Some(p) if others == 0 && p.nfc == nfc && normalizers.len() == usize::from(nfc) => Ok(p),
        _ => Err(format!(
            "its way of cutting text into words ({splits:?}) is none of {}, which is all that is recognised so far",
            PRES.iter().map(|p| p.name).collect::<Vec<_>>().join(", ")
        )),
    }
}

#[derive(Clone)]
struct Added {
    id: usize,
    content: String,
    special: bool,
}

fn added_tokens(whole: Option<&Value>) -> impl Iterator<Item = Added> {
    let list = whole.and_then(|w| w["added_tokens"].as_array()).into_iter().flatten();
    list.filter_map(|t| {
        let id = usize::try_from(t["id"].as_u64()?).ok()?;
        Some(Added { id, content: t["content"].as_str()?.to_owned(), special: t["special"].as_bool().unwrap_or(false) })
    })
}

/// The tokenizer in `gguf`, which is `file`, as the files of a model folder: their names and contents.
///
/// # Errors
/// [`Error::Tokenizer`] where it is missing or not recognised.
pub fn tokenizer_files(gguf: &Gguf, file: &Path) -> Result<Vec<(&'static str, Value)>, Error> {
    let fail = |reason| Error::Tokenizer { file: file.to_owned(), reason };
    let (json, bos) = tokenizer_json(gguf).map_err(fail)?;
    let tokens = gguf.get(&key("tokens")).and_then(Meta::items).unwrap_or_default();
    let token = |name: &str| {
        let id = gguf.get(&key(&format!("{name}_token_id")))?.unsigned()?;
        tokens.get(usize::try_from(id).ok()?)?.text()
    };
    let eos = matches!(gguf.get(&key("add_eos_token")), Some(Meta::Bool(true)));
    let mut settings =
        json!({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos, "add_eos_token": eos});
    for (own, name) in special::KINDS {
        if let Some(text) = token(name) {
            settings[format!("{own}_token")] = json!(text);
        }
    }
    if let Some(template) = gguf.get("tokenizer.chat_template").and_then(Meta::text) {
        settings["chat_template"] = json!(template);
    }
    Ok(vec![("tokenizer.json", json), ("tokenizer_config.json", settings)])
}

/// The `tokenizer.json` equal to the tokenizer in `gguf`, and whether texts begin with BOS.
///
/// # Errors
/// A sentence on what is missing or not recognised.
pub(crate) fn tokenizer_json(gguf: &Gguf) -> Result<(Value, bool), String> {
    let get = |name: &str| gguf.get(&key(name));
    let items = |name: &str| get(name).and_then(Meta::items).ok_or_else(|| format!("the key {} is missing", key(name)));
    let tokens: Option<Vec<&str>> = items("tokens")?.iter().map(Meta::text).collect();
    let tokens = tokens.ok_or("a token is no text")?;
    let types: Vec<u64> = items("token_type")?.iter().map(|t| t.unsigned().unwrap_or(1)).collect();
    if types.len() != tokens.len() {
        return Err("there are more or fewer token types than tokens".into());
    }
    let model = get("model").and_then(Meta::text).unwrap_or("(none)");
    let flag = |name: &str, default: bool| match get(name) {
        Some(Meta::Bool(b)) => *b,
        _ => default,
    };
    let bos = flag("add_bos_token", model == "llama");
    match model {
        "llama" => {
            let scores = items("scores")?;
            let piece = |(i, (text, kind)): (usize, (&&str, &u64))| {
                let score = scores.get(i).and_then(Meta::real).unwrap_or(0.0) as f32;
                Piece { text: (*text).to_owned(), score, kind: *kind }
            };
            let mut pieces: Vec<Piece> = tokens.iter().zip(&types).enumerate().map(piece).collect();
            // Some files call the unknown token a control token and say its id apart.
            let named = get("unknown_token_id").and_then(Meta::unsigned).unwrap_or(0);
            let named = usize::try_from(named).ok().and_then(|id| pieces.get_mut(id));
            match named {
                Some(piece) if !types.contains(&(UNKNOWN as u64)) => piece.kind = UNKNOWN as u64,
                _ => {}
            }
            let model = SentencePiece { pieces, kind: BYTE_PAIRS, dummy_prefix: flag("add_space_prefix", true) };
            Ok((model.to_tokenizer_json()?, bos))
        }
        "bert" => Ok((word_pieces::tokenizer_json(gguf, &tokens, &types)?, false)),
        "gpt2" => Ok((byte_level(&tokens, &types, items("merges")?, get("pre").and_then(Meta::text))?, bos)),
        other => Err(format!("tokenizer model {other} is not read")),
    }
}

/// An entry of `added_tokens`.
fn added_token(id: usize, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
}

fn byte_level(tokens: &[&str], types: &[u64], merges: &[Meta], pre: Option<&str>) -> Result<Value, String> {
    let pre = pre.unwrap_or("default");
    let row =
        PRES.iter().find(|p| p.name == pre).ok_or_else(|| format!("the pre-tokenizer {pre} is not recognised"))?;
    let vocab: BTreeMap<&str, usize> = tokens.iter().enumerate().map(|(id, &t)| (t, id)).collect();
    let merges: Option<Vec<&str>> = merges.iter().map(Meta::text).collect();
    let added: Vec<Value> = (tokens.iter().zip(types).enumerate())
        .filter(|(_, (_, t))| matches!(**t as i32, CONTROL | USER_DEFINED))
        .map(|(id, (t, kind))| added_token(id, t, *kind as i32 == CONTROL))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": row.split.is_empty()});
    let split = json!({"type": "Split", "pattern": {"Regex": row.split}, "behavior": "Isolated", "invert": false});
    let steps = if row.split.is_empty() { vec![byte_level] } else { vec![split, byte_level] };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": if row.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": merges.ok_or("a merge is no text")?},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    fn books() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/books-10m")
    }

    fn gguf(keys: Vec<(String, Meta)>) -> Gguf {
        Gguf { metadata: keys.into_iter().collect(), tensors: Vec::new() }
    }

    #[test]
    fn a_sentencepiece_tokenizer_survives_the_way_there_and_back() {
        let config = json!({"bos_token_id": 1, "eos_token_id": 2});
        let keys = gguf_tokenizer(&books(), &config, 8192).unwrap();
        let there = gguf(keys);
        assert_eq!(there.get("tokenizer.ggml.bos_token_id"), Some(&Meta::U32(1)));
        assert_eq!(there.get("tokenizer.ggml.add_bos_token"), Some(&Meta::Bool(true)));
        let back = Tokenizer::of_gguf(&there, Path::new("x.gguf"), Some(1)).unwrap();
        let original = Tokenizer::open(&books(), Some(1)).unwrap();
        let text = std::fs::read_to_string(books().join("evaluation.txt")).unwrap();
        let text: String =
            text.chars().take(40_000).chain("\u{1f600} tab\tand  two spaces, 42 \u{e9}t\u{e9}".chars()).collect();
        assert_eq!(back.encode(&text, 8192).unwrap(), original.encode(&text, 8192).unwrap());
        assert_eq!(back.bos(), Some(1));
    }

    #[test]
    fn what_folders_say_of_tokens_beside_the_model_counts_as_for_the_converter() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(books().join("tokenizer.model"), dir.path().join("tokenizer.model")).unwrap();
        let write = |file: &str, value: Value| std::fs::write(dir.path().join(file), value.to_string()).unwrap();
        write("added_tokens.json", json!({"<listed>": 8192, "<far>": 9000}));
        write(
            "tokenizer_config.json",
            json!({"unk_token": "<unk>", "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": true},
                "8193": {"content": "<unused7>", "special": false},
                "8194": {"content": "a▁▁b", "special": false},
                "8199": {"content": "beyond", "special": false},
            }}),
        );
        let config = |kind: &str| json!({"model_type": kind, "bos_token_id": 1});
        let of = |kind: &str| gguf(gguf_tokenizer(dir.path(), &config(kind), 8197).unwrap());
        let there = of("gemma2");
        let item = |name: &str, id: usize| there.get(&key(name)).unwrap().items().unwrap()[id].clone();
        let token = |id: usize| (item("tokens", id).text().unwrap().to_owned(), item("token_type", id));
        for (id, text, kind) in [
            (0, "<unk>", CONTROL),
            (8192, "<listed>", USER_DEFINED),
            (8193, "<unused7>", CONTROL),
            (8194, "a  b", USER_DEFINED),
            (8196, "[PAD8196]", UNUSED),
        ] {
            assert_eq!(token(id), (text.to_owned(), Meta::I32(kind)));
        }
        assert_eq!((item("scores", 0), item("scores", 8194)), (Meta::F32(ADDED_SCORE), Meta::F32(ADDED_SCORE)));
        assert_eq!(there.get(&key("unknown_token_id")), Some(&Meta::U32(0)));
        // Gemma puts no space before a text, whatever the model says, and its file has no token of the type unknown.
        assert_eq!(there.get(&key("add_space_prefix")), Some(&Meta::Bool(false)));
        assert_eq!(of("llama").get(&key("add_space_prefix")), Some(&Meta::Bool(true)));
        let back = Tokenizer::of_gguf(&there, Path::new("x.gguf"), None).unwrap();
        let ids = back.encode("xa  by<listed>", 8197).unwrap();
        assert!(ids.contains(&8194) && ids.last() == Some(&8192), "{ids:?}");
        // Of Phi-3 the looks of a token do not count, and tokenizer.json does.
        write(
            "tokenizer.json",
            json!({"added_tokens": [{"id": 2, "content": "</s>", "special": false}], "model": {"type": "BPE"}}),
        );
        let phi = of("phi3");
        let types = phi.get(&key("token_type")).unwrap().items().unwrap();
        assert_eq!((&types[2], &types[8193]), (&Meta::I32(USER_DEFINED), &Meta::I32(USER_DEFINED)));
    }

    fn byte_level_tokenizer(split: &str, normalizer: Value) -> Value {
        json!({
            "added_tokens": [{"id": 4, "content": "<|end|>", "special": true}],
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            ]},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": [["a", "b"]]},
        })
    }

    #[test]
    fn byte_level_tokenizers_are_classified_by_their_expressions() {
        let (llama, qwen) = (PRES[0].split, PRES[1].split);
        for (split, normalizer, expected) in [
            (llama, Value::Null, Some("llama-bpe")),
            (qwen, json!({"type": "NFC"}), Some("qwen2")),
            (qwen, Value::Null, None),
            (PRES[2].split, Value::Null, Some("gpt-4o")),
            (r"\s+", Value::Null, None),
        ] {
            let found = classify(&byte_level_tokenizer(split, normalizer)).map(|p| p.name);
            assert_eq!(found.ok(), expected, "{split}");
        }
        let keys = from_byte_level(&byte_level_tokenizer(llama, Value::Null), 7).unwrap();
        let there = gguf(keys);
        let (back, bos) = tokenizer_json(&there).unwrap();
        assert!(!bos);
        assert_eq!(back["model"]["merges"][0], "a b");
        assert_eq!(there.get("tokenizer.ggml.tokens").unwrap().items().unwrap()[6], Meta::Text("[PAD6]".into()));
        let error = from_byte_level(&byte_level_tokenizer(llama, Value::Null), 3).unwrap_err();
        assert!(error.contains("beyond the 3 rows"), "{error}");
    }
}

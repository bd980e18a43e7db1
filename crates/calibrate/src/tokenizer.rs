//! Tokenizers as model folders carry them: `tokenizer.json`, else a SentencePiece `tokenizer.model`.

use crate::{Error, sentencepiece};
use bitmill_checkpoint::Checkpoint;
use bitmill_checkpoint::gguf::Gguf;
use rayon::prelude::*;
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BPE;
use tokenizers::{
    DecoderWrapper, Model, ModelWrapper, NormalizerWrapper, PostProcessor, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerImpl, TruncationDirection,
};

/// Parts of a text whose ids are kept together.
const TOGETHER: usize = 256;

/// A tokenizer and the token that opens every window.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    dir: PathBuf,
    /// Where what lies on either side of a space is encoded as if it stood alone, the texts of added tokens, which its model does
    /// not know.
    parted: Option<Vec<String>>,
}

impl Tokenizer {
    /// Opens the tokenizer of model folder `dir`. `bos` is the config's `bos_token_id`.
    ///
    /// The BOS token is used if the tokenizer itself adds it to a text, or if `tokenizer_config.json` says
    /// `add_bos_token: true`; models trained without one (Qwen2) get windows of plain text.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] and [`Error::Tokenizer`].
    pub fn open(dir: &Path, bos: Option<u32>) -> Result<Self, Error> {
        let (json, model) = (dir.join("tokenizer.json"), dir.join("tokenizer.model"));
        let (file, bytes) = if json.is_file() {
            (json.clone(), read(&json)?)
        } else if model.is_file() {
            let converted = sentencepiece::to_tokenizer_json(&read(&model)?);
            let json = converted.map_err(|reason| Error::Tokenizer { file: model.clone(), reason })?;
            (model.clone(), json.to_string().into_bytes())
        } else {
            return Err(Error::NoTokenizer { dir: dir.to_owned() });
        };
        let fail = |reason: String| Error::Tokenizer { file: file.clone(), reason };
        let inner = build(&bytes).map_err(fail)?;
        let added = inner.encode("a", true).map_err(|e| fail(e.to_string()))?.get_ids().first().copied();
        let wants = match tokenizer_config(dir).get("add_bos_token").and_then(serde_json::Value::as_bool) {
            Some(flag) => flag,
            None => added.is_some() && added == bos,
        };
        Ok(Tokenizer { parted: parted(&inner), inner, bos: bos.filter(|_| wants), dir: dir.to_owned() })
    }

    /// The tokenizer of an opened folder or GGUF file; `bos` as for [`Tokenizer::open`].
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn of(model: &Checkpoint, bos: Option<u32>) -> Result<Self, Error> {
        match model.gguf() {
            Some(gguf) => Tokenizer::of_gguf(gguf, model.dir(), bos),
            None => Tokenizer::open(model.dir(), bos),
        }
    }

    /// The tokenizer that the GGUF file `file` carries.
    pub(crate) fn of_gguf(gguf: &Gguf, file: &Path, bos: Option<u32>) -> Result<Self, Error> {
        let fail = |reason: String| Error::Tokenizer { file: file.to_owned(), reason };
        let (json, wants) = crate::gguf::tokenizer_json(gguf).map_err(fail)?;
        let inner = build(json.to_string().as_bytes()).map_err(fail)?;
        Ok(Tokenizer { parted: parted(&inner), inner, bos: bos.filter(|_| wants), dir: file.to_owned() })
    }

    /// Token ids of `text`, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text cannot be encoded, [`Error::Vocabulary`] when a token id is not below `vocab`.
    pub fn encode(&self, text: &str, vocab: usize) -> Result<Vec<u32>, Error> {
        let fail = |e: tokenizers::Error| Error::Tokenizer { file: self.dir.clone(), reason: e.to_string() };
        let ids = match (&self.parted, self.inner.get_model()) {
            (Some(added), ModelWrapper::BPE(model)) => self.encode_parts(text, added, model),
            _ => self.encode_whole(text),
        };
        self.checked(ids.map_err(fail)?, vocab)
    }

    fn encode_whole(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec())
    }

    /// Encodes every part once, however often it occurs, and those without `added` tokens by `model` alone, which is what is left
    /// of the tokenizer then.
    fn encode_parts(&self, text: &str, added: &[String], model: &BPE) -> tokenizers::Result<Vec<u32>> {
        let parts = parts(text, added);
        // Of words, few are new.
        let (mut different, mut known) = (Vec::new(), HashMap::with_capacity(parts.len() / 4));
        let mut number = |part| {
            *known.entry(part).or_insert_with(|| {
                different.push(part);
                different.len() - 1
            })
        };
        let parts: Vec<usize> = parts.into_iter().map(&mut number).collect();
        let encode = |part: &str, ids: &mut Vec<u32>| -> tokenizers::Result<()> {
            match part.is_empty() || added.iter().any(|token| part.contains(token)) {
                true => ids.extend(self.encode_whole(part)?),
                false => ids.extend(model.tokenize(&format!("▁{}", part.replace(' ', "▁")))?.into_iter().map(|t| t.id)),
            }
            Ok(())
        };
        // The ids of some parts, one after another, and where those of each end.
        let some = |parts: &[&str]| -> tokenizers::Result<(Vec<u32>, Vec<usize>)> {
            let (mut ids, mut ends) = (Vec::new(), Vec::with_capacity(parts.len()));
            for part in parts {
                encode(part, &mut ids)?;
                ends.push(ids.len());
            }
            Ok((ids, ends))
        };
        let blocks = different.par_chunks(TOGETHER).map(some).collect::<tokenizers::Result<Vec<_>>>()?;
        let of = |part: usize| {
            let (ids, ends) = &blocks[part / TOGETHER];
            let at = part % TOGETHER;
            &ids[if at == 0 { 0 } else { ends[at - 1] }..ends[at]]
        };
        Ok(parts.into_iter().flat_map(|part| of(part).iter().copied()).collect())
    }

    fn checked(&self, ids: Vec<u32>, vocab: usize) -> Result<Vec<u32>, Error> {
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(&token) => Err(Error::Vocabulary { dir: self.dir.clone(), token, vocab }),
            None => Ok(ids),
        }
    }

    /// Token ids of one sentence with the special tokens the tokenizer itself puts around it (`[CLS]` … `[SEP]`), the
    /// sentence cut so that there are at most `limit` in all.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; [`Error::Window`] when the special tokens leave no room.
    pub fn sentence(&self, text: &str, vocab: usize, limit: usize) -> Result<Vec<u32>, Error> {
        let fail = |reason: String| Error::Tokenizer { file: self.dir.clone(), reason };
        let frame = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(false));
        if limit <= frame {
            let reason = format!("the tokenizer adds {frame} special tokens to every sentence");
            return Err(Error::Window { window: limit, reason });
        }
        let mut encoding = self.inner.encode(text, false).map_err(|e| fail(e.to_string()))?;
        encoding.truncate(limit - frame, 0, TruncationDirection::Right);
        let encoding = self.inner.post_process(encoding, None, true).map_err(|e| fail(e.to_string()))?;
        if encoding.get_type_ids().iter().any(|&t| t != 0) {
            return Err(fail("it gives the tokens of a single sentence several types, which is unsupported".into()));
        }
        self.checked(encoding.get_ids().to_vec(), vocab)
    }

    /// The text that `ids` stand for, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        let fail = |e: tokenizers::Error| Error::Tokenizer { file: self.dir.clone(), reason: e.to_string() };
        self.inner.decode(ids, true).map_err(fail)
    }

    /// The token that opens every window, if the model was trained with one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }
}

/// The texts of the added tokens of a `tokenizer` that encodes a text with a space between two words as it encodes what lies on
/// either side of it, one after the other, because it puts a space before a text itself, and no token has one after anything else:
/// that of Llama 2, for example, which would else work on the whole text as on one word.
fn parted(tokenizer: &tokenizers::Tokenizer) -> Option<Vec<String>> {
    let plain = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let normalizer = tokenizer.get_normalizer().and_then(|n| serde_json::to_value(n).ok());
    let (Some(normalizer), ModelWrapper::BPE(model)) = (normalizer, tokenizer.get_model()) else { return None };
    let added = tokenizer.get_added_tokens_decoder();
    let vocabulary = model.get_vocab();
    let is_parted = normalizer == plain
        && tokenizer.get_pre_tokenizer().is_none()
        && model.dropout.is_none_or(|share| share == 0.0)
        && !model.ignore_merges
        && added
            .values()
            .all(|t| !(t.content.contains([' ', '▁']) || t.single_word || t.lstrip || t.rstrip || t.normalized))
        && vocabulary.contains_key("▁")
        && vocabulary.keys().all(|token| !token.trim_start_matches('▁').contains('▁'));
    is_parted.then(|| added.into_values().map(|token| token.content).collect())
}

/// What lies between the spaces of `text` that are between two other characters, of ASCII, so that none is what a space becomes, and
/// neither ends or begins one of the `added` tokens, which are found before spaces are looked at.
fn parts<'a>(text: &'a str, added: &[String]) -> Vec<&'a str> {
    let [mut ends, mut begins] = [[false; 256]; 2];
    for c in (0..=u8::MAX).filter(|&c| c.is_ascii_graphic() || c == b'\n') {
        ends[usize::from(c)] = !added.iter().any(|token| token.as_bytes().last() == Some(&c));
        begins[usize::from(c)] = !added.iter().any(|token| token.as_bytes().first() == Some(&c));
    }
    let (mut parts, mut from) = (Vec::new(), 0);
    for (i, at) in text.as_bytes().windows(3).enumerate() {
        if matches!(at, [a, b' ', b] if ends[usize::from(*a)] && begins[usize::from(*b)]) {
            parts.push(&text[from..i + 1]);
            from = i + 2;
        }
    }
    parts.push(&text[from..]);
    parts
}

/// A tokenizer whose model is known to be one of byte pairs.
type OfPairs = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

fn build(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    // Most are, and are read at once where nobody asks which model there is.
    let mut inner = match serde_json::from_slice::<OfPairs>(bytes) {
        Ok(inner) => inner.into(),
        Err(_) => tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?,
    };
    // Windows are cut later; a limit stored in the file must not cut the text before that.
    inner.with_truncation(None).map_err(|e| e.to_string())?;
    inner.with_padding(None);
    Ok(inner)
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(file).map_err(|e| Error::Tokenizer { file: file.to_owned(), reason: e.to_string() })
}

fn tokenizer_config(dir: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(dir.join("tokenizer_config.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn books() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/books-10m")
    }

    #[test]
    fn sentencepiece_model_and_tokenizer_json_agree() {
        let json = Tokenizer::open(&books(), Some(1)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for file in ["tokenizer.model", "tokenizer_config.json"] {
            std::fs::copy(books().join(file), dir.path().join(file)).unwrap();
        }
        let model = Tokenizer::open(dir.path(), Some(1)).unwrap();
        let text = std::fs::read_to_string(books().join("evaluation.txt")).unwrap();
        let text: String =
            text.chars().take(60_000).chain("\u{1f600} tab\tand  two spaces, 42 \u{e9}t\u{e9}".chars()).collect();
        assert_eq!(json.encode(&text, 8192).unwrap(), model.encode(&text, 8192).unwrap());
        assert_eq!((json.bos(), model.bos()), (Some(1), Some(1)));
    }

    #[test]
    fn a_text_is_encoded_alike_in_parts() {
        let tokenizer = Tokenizer::open(&books(), Some(1)).unwrap();
        let Some(added) = &tokenizer.parted else { panic!("a tokenizer that encodes parts") };
        let text = std::fs::read_to_string(books().join("evaluation.txt")).unwrap();
        let text: String = text.chars().take(20_000).collect();
        let odd = "two  spaces, <s>a token and </s> another one\nnew line Ünïcödé wörds 日本 語 7 8 9  ▁ a▁b c\t d"
            .repeat(20);
        for text in [text.as_str(), &odd, "", " ", "a b", " a b "] {
            let whole = tokenizer.encode_whole(text).unwrap();
            let encode = |part: &str| tokenizer.encode_whole(part).unwrap();
            assert_eq!(parts(text, added).into_iter().flat_map(encode).collect::<Vec<_>>(), whole);
            assert_eq!(tokenizer.encode(text, 8192).unwrap(), whole);
        }
    }

    #[test]
    fn added_tokens_are_found_before_parts() {
        let bytes = std::fs::read(books().join("tokenizer.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let mut added = json["added_tokens"][1].clone();
        (added["content"], added["id"]) = ("quux".into(), 8192.into());
        json["added_tokens"].as_array_mut().unwrap().push(added);
        let inner = build(json.to_string().as_bytes()).unwrap();
        let tokenizer = Tokenizer { parted: parted(&inner), inner, bos: None, dir: books() };
        assert!(tokenizer.parted.is_some());
        let text = "one quux two quux three, quux four";
        let whole = tokenizer.encode_whole(text).unwrap();
        assert!(whole.contains(&8192));
        assert_eq!(tokenizer.encode(text, 8193).unwrap(), whole);
    }

    #[test]
    fn a_token_across_a_space_forbids_parts() {
        let bytes = std::fs::read(books().join("tokenizer.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert!(parted(&build(&bytes).unwrap()).is_some());
        json["model"]["vocab"]["e▁t"] = 8192.into();
        assert!(parted(&build(json.to_string().as_bytes()).unwrap()).is_none());
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        json["added_tokens"][1]["rstrip"] = true.into();
        assert!(parted(&build(json.to_string().as_bytes()).unwrap()).is_none());
    }

    #[test]
    fn each_failure_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Tokenizer::open(dir.path(), None), Err(Error::NoTokenizer { .. })));
        std::fs::write(dir.path().join("tokenizer.model"), b"\x0a\xff\xff\xff\xff\x0f").unwrap();
        let error = Tokenizer::open(dir.path(), None).err().unwrap().to_string();
        assert!(error.contains("tokenizer.model") && error.contains("not a readable tokenizer"), "{error}");
        std::fs::write(dir.path().join("tokenizer.json"), b"{}").unwrap();
        assert!(Tokenizer::open(dir.path(), None).err().unwrap().to_string().contains("tokenizer.json"));
        let tokenizer = Tokenizer::open(&books(), Some(1)).unwrap();
        assert!(matches!(tokenizer.encode("some words", 10), Err(Error::Vocabulary { vocab: 10, .. })));
    }
}

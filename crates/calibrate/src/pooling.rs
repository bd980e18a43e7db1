//! How hidden states become the embedding of a sentence, as a sentence-transformers folder says it.

use crate::Error;
use bitmill_checkpoint::Checkpoint;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Keys of old pooling configs, and what they mean when true.
const FLAGS: [(&str, Option<Pooling>); 6] = [
    ("pooling_mode_cls_token", Some(Pooling::Cls)),
    ("pooling_mode_max_tokens", Some(Pooling::Max)),
    ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
    ("pooling_mode_mean_sqrt_len_tokens", None),
    ("pooling_mode_weightedmean_tokens", None),
    ("pooling_mode_lasttoken", Some(Pooling::Last)),
];

/// Values of a GGUF file's `pooling_type`.
const POOLINGS: [(u64, Pooling); 3] = [(1, Pooling::Mean), (2, Pooling::Cls), (3, Pooling::Last)];

/// From the hidden states `[tokens, hidden]` of a sentence to one vector `[hidden]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean over all tokens, special ones included.
    Mean,
    /// The first token.
    Cls,
    /// The largest value of each channel.
    Max,
    /// The last token.
    Last,
}

impl Pooling {
    /// Its number in a GGUF file, which has none for the largest value.
    #[must_use]
    pub fn gguf(self) -> Option<u64> {
        POOLINGS.iter().find(|(_, own)| *own == self).map(|(number, _)| *number)
    }

    /// The files by which a folder says so, of hidden states of `width` channels: their names and contents.
    #[must_use]
    pub fn files(self, width: usize) -> [(&'static str, Value); 2] {
        let module = |index: u8, path: &str, kind: &str| json!({"idx": index, "name": index.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")});
        let mut pooling = json!({"word_embedding_dimension": width});
        for (flag, own) in FLAGS {
            pooling[flag] = json!(own == Some(self));
        }
        [
            ("modules.json", json!([module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")])),
            ("1_Pooling/config.json", pooling),
        ]
    }

    /// Pools `hidden`, row-major `[tokens, width]` with at least one token.
    #[must_use]
    pub fn pool(self, hidden: &[f32], width: usize) -> Vec<f32> {
        let tokens = hidden.len() / width;
        match self {
            Pooling::Mean => {
                let mut sum = vec![0.0f64; width];
                for row in hidden.chunks_exact(width) {
                    sum.iter_mut().zip(row).for_each(|(s, &v)| *s += f64::from(v));
                }
                sum.into_iter().map(|s| (s / tokens as f64) as f32).collect()
            }
            Pooling::Cls => hidden[..width].to_vec(),
            Pooling::Last => hidden[(tokens - 1) * width..].to_vec(),
            Pooling::Max => {
                let mut max = hidden[..width].to_vec();
                for row in hidden.chunks_exact(width) {
                    max.iter_mut().zip(row).for_each(|(m, &v)| *m = m.max(v));
                }
                max
            }
        }
    }
}

/// What a folder says about sentences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sentences {
    /// How they are pooled; the mean where nothing is said.
    pub pooling: Pooling,
    /// Tokens after which they are cut, special tokens included.
    pub limit: Option<usize>,
}

impl Sentences {
    /// What an opened folder or GGUF file says; mean pooling where it says nothing.
    ///
    /// # Errors
    /// As [`Sentences::read`].
    pub fn of(model: &Checkpoint) -> Result<Self, Error> {
        let pooling = Sentences::stated(model)?.unwrap_or(Pooling::Mean);
        Ok(Sentences { pooling, limit: Sentences::limit(model.dir())? })
    }

    /// How an opened folder or GGUF file says that hidden states are pooled, if it does.
    ///
    /// # Errors
    /// As [`Sentences::read`].
    pub fn stated(model: &Checkpoint) -> Result<Option<Pooling>, Error> {
        let Some(gguf) = model.gguf() else {
            let stated = model.dir().join("modules.json").is_file();
            return Ok(if stated { Some(Sentences::read(model.dir())?.pooling) } else { None });
        };
        let key = format!("{}.pooling_type", gguf.architecture());
        let Some(value) = gguf.get(&key) else { return Ok(None) };
        match value.unsigned() {
            Some(0) => Ok(None),
            Some(number) if POOLINGS.iter().any(|(own, _)| *own == number) => {
                Ok(POOLINGS.iter().find(|(own, _)| *own == number).map(|(_, pooling)| *pooling))
            }
            _ => Err(wrong(
                model.dir(),
                format!("{key} is {value:?}; means (1), first tokens (2) and last ones (3) are computed here"),
            )),
        }
    }

    /// Tokens after which the folder's own pipeline cuts a sentence, from `sentence_bert_config.json`; what else the
    /// pipeline does is of no concern here.
    ///
    /// # Errors
    /// [`Error::Sentences`] for a file that is not understood.
    pub fn limit(dir: &Path) -> Result<Option<usize>, Error> {
        let file = dir.join("sentence_bert_config.json");
        match json(&file)?.as_ref().and_then(|config| config.get("max_seq_length")) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().filter(|&n| n > 0) {
                Some(limit) => Ok(Some(limit as usize)),
                None => Err(wrong(&file, format!("max_seq_length is {value}, not a positive number"))),
            },
        }
    }

    /// Reads `modules.json` of folder `dir`, the pooling config it points to, and `sentence_bert_config.json`. A folder
    /// without them is a plain encoder: mean pooling, no limit.
    ///
    /// # Errors
    /// [`Error::Sentences`] for a file that is not understood or a module beyond encoder, pooling and normalization.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let limit = Sentences::limit(dir)?;
        let modules_file = dir.join("modules.json");
        let Some(modules) = json(&modules_file)? else { return Ok(Sentences { pooling: Pooling::Mean, limit }) };
        let Some(modules) = modules.as_array() else { return Err(wrong(&modules_file, "is not a list".into())) };
        let mut pooling = None;
        for module in modules {
            let text = |key: &str| module.get(key).and_then(Value::as_str).unwrap_or_default();
            match text("type").rsplit('.').next().unwrap_or_default() {
                "Transformer" | "Normalize" | "Dropout" => {}
                "Pooling" if pooling.is_none() => {
                    // A path of a stranger's file must not lead out of the folder.
                    let path = Path::new(text("path"));
                    if path.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
                        return Err(wrong(&modules_file, format!("the path {path:?} leads out of the folder")));
                    }
                    pooling = Some(read_pooling(&dir.join(path).join("config.json"))?);
                }
                other => {
                    let reason = format!("module `{other}` is not computed here; remove it to compare without it");
                    return Err(wrong(&modules_file, reason));
                }
            }
        }
        Ok(Sentences { pooling: pooling.unwrap_or(Pooling::Mean), limit })
    }
}

/// Both spellings: a `pooling_mode`, or a flag per mode of which one is true.
fn read_pooling(file: &Path) -> Result<Pooling, Error> {
    let Some(config) = json(file)? else { return Err(wrong(file, "is missing; modules.json names it".into())) };
    if let Some(mode) = config.get("pooling_mode") {
        let known =
            [("cls", Pooling::Cls), ("max", Pooling::Max), ("mean", Pooling::Mean), ("lasttoken", Pooling::Last)];
        let found = known.iter().find(|(name, _)| mode.as_str() == Some(name)).map(|(_, pooling)| *pooling);
        return found.ok_or_else(|| {
            wrong(file, format!("pooling_mode {mode} is not computed here; cls, max, mean and lasttoken are"))
        });
    }
    let on = FLAGS.iter().filter(|(key, _)| config.get(key) == Some(&Value::Bool(true)));
    match on.collect::<Vec<_>>().as_slice() {
        [] => Ok(Pooling::Mean),
        [(_, Some(pooling))] => Ok(*pooling),
        [(key, None)] => Err(wrong(file, format!("{key} is not computed here; cls, max, mean and lasttoken are"))),
        _ => Err(wrong(file, "several poolings are joined, which is not computed here; leave one of them true".into())),
    }
}

fn json(file: &Path) -> Result<Option<Value>, Error> {
    match std::fs::read(file) {
        // The model may be a GGUF file, which has no files in it.
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(wrong(file, format!("cannot be read ({e})"))),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| wrong(file, format!("is not JSON ({e})"))),
    }
}

fn wrong(file: &Path, reason: String) -> Error {
    Error::Sentences { file: PathBuf::from(file), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poolings_equal_their_definitions() {
        let hidden = [1.0, 5.0, 3.0, -2.0, 2.0, 0.0];
        assert_eq!(Pooling::Mean.pool(&hidden, 2), [2.0, 1.0]);
        assert_eq!(Pooling::Cls.pool(&hidden, 2), [1.0, 5.0]);
        assert_eq!(Pooling::Max.pool(&hidden, 2), [3.0, 5.0]);
        assert_eq!(Pooling::Last.pool(&hidden, 2), [2.0, 0.0]);
    }

    #[test]
    fn folders_are_read_or_refused_by_file() {
        let read = |modules: &str, pooling: &str, limit: &str| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
            for (file, text) in
                [("modules.json", modules), ("1_Pooling/config.json", pooling), ("sentence_bert_config.json", limit)]
            {
                if !text.is_empty() {
                    std::fs::write(dir.path().join(file), text).unwrap();
                }
            }
            Sentences::read(dir.path()).map_err(|e| e.to_string())
        };
        let modules = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;
        let mean = Sentences { pooling: Pooling::Mean, limit: None };
        assert_eq!(read("", "", ""), Ok(mean));
        assert_eq!(read(modules, "{}", r#"{"max_seq_length": 256}"#), Ok(Sentences { limit: Some(256), ..mean }));
        let flags = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#;
        assert_eq!(read(modules, flags, "").unwrap().pooling, Pooling::Cls);
        assert_eq!(read(modules, r#"{"pooling_mode": "max"}"#, "").unwrap().pooling, Pooling::Max);
        let dense = modules.replace("Normalize", "Dense");
        let out = modules.replace("1_Pooling", "../elsewhere");
        let both = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#;
        for (modules, pooling, limit, words) in [
            (modules, "", "", "1_Pooling/config.json"),
            (modules, "{", "", "not JSON"),
            (modules, both, "", "several"),
            (modules, r#"{"pooling_mode_weightedmean_tokens": true}"#, "", "weightedmean"),
            (modules, r#"{"pooling_mode": ["cls", "max"]}"#, "", "pooling_mode"),
            (modules, "{}", r#"{"max_seq_length": -1}"#, "max_seq_length"),
            (&dense, "{}", "", "`Dense`"),
            (&out, "{}", "", "leads out"),
            ("{}", "{}", "", "not a list"),
        ] {
            let said = read(modules, pooling, limit).unwrap_err();
            assert!(said.contains(words), "{words}: {said}");
        }
    }
}

//! What the environment says about the hub: where it is, who asks, and whether it may be asked at all.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

/// Where models are unless HF_ENDPOINT says otherwise.
const HUB: &str = "https://huggingface.co";

/// The token of a user, and where it was found.
pub(super) struct Token {
    pub(super) secret: String,
    source: String,
}

/// Says where it was found, and nothing of it.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

/// The variable that forbids connections, if one does.
pub(super) fn offline(variable: impl Fn(&str) -> Option<OsString>) -> Option<&'static str> {
    let yes =
        |value: OsString| ["1", "on", "yes", "true"].contains(&value.to_string_lossy().to_ascii_lowercase().as_str());
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| variable(name).is_some_and(yes))
}

/// The address of the hub.
pub(super) fn endpoint(variable: impl Fn(&str) -> Option<OsString>) -> String {
    let given = variable("HF_ENDPOINT").map(|endpoint| endpoint.to_string_lossy().trim_end_matches('/').to_owned());
    given.unwrap_or_else(|| HUB.to_owned())
}

/// The file a login writes the token to.
pub(super) fn token_file(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let home = || variable("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let shared = || variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|c| c.join("huggingface"));
    let folder = || variable("HF_HOME").map(PathBuf::from).or_else(shared).map(|home| home.join("token"));
    variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(folder)
}

/// The token in use, by the order in which the hub's clients look for it.
pub(super) fn token(variable: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<Option<Token>> {
    let named =
        ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(|name| Some((name.to_owned(), variable(name)?)));
    let (source, secret) = match (named, token_file(&variable)) {
        (Some((name, secret)), _) => (format!("the token of {name}"), secret.to_string_lossy().trim().to_owned()),
        (None, Some(file)) => match std::fs::read_to_string(&file) {
            Ok(secret) => (format!("the token in {}", file.display()), secret.trim().to_owned()),
            Err(_) => return Ok(None),
        },
        (None, None) => return Ok(None),
    };
    anyhow::ensure!(
        secret.chars().all(|c| c.is_ascii_graphic()),
        "{source} holds characters that no token has; log in again with `hf auth login`"
    );
    Ok((!secret.is_empty()).then_some(Token { secret, source }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_as_the_clients_read_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let of = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|(n, v)| ((*n).into(), v.into())).collect();
            move |name: &str| set.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone())
        };
        for (set, expected) in [
            (&[("HF_TOKEN", "hf_own"), ("HF_HOME", home)][..], Some(("hf_own", "the token of HF_TOKEN"))),
            (&[("HF_HOME", home)], Some(("hf_file", "the token in"))),
            (&[("HF_TOKEN_PATH", "/nowhere/token"), ("HF_HOME", home)], None),
            (&[("HOME", "/nowhere")], None),
        ] {
            let found = token(of(set)).unwrap();
            assert_eq!(found.as_ref().map(|t| t.secret.as_str()), expected.map(|e| e.0), "{set:?}");
            let said = found.map(|token| token.to_string()).unwrap_or_default();
            assert!(said.contains(expected.map_or("", |e| e.1)) && !said.contains("hf_"), "{said}");
        }
        assert!(token(of(&[("HF_TOKEN", "two words")])).is_err());
        assert_eq!(offline(of(&[("HF_HUB_OFFLINE", "ON")])), Some("HF_HUB_OFFLINE"));
        assert_eq!(
            offline(of(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")])),
            Some("TRANSFORMERS_OFFLINE")
        );
        assert_eq!(offline(of(&[("HF_HUB_OFFLINE", "0")])), None);
        assert_eq!(endpoint(of(&[("HF_ENDPOINT", "http://mirror/")])), "http://mirror");
        assert!(endpoint(of(&[])).starts_with("https://"));
    }
}

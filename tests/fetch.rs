//! Models by their name on the hub, fetched from a hub that each test is: a server on this machine, with a cache of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{bitmill, failure, success};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// More requests than this are a loop.
const MOST: usize = 60;

/// What a test has the hub do.
#[derive(Default)]
struct Behaviour {
    /// Answers to the list of files: a status in the place of 200, by revision.
    refused: BTreeMap<String, u16>,
    /// Of the weights, so many bytes are sent before the connection breaks; `None` is all of them.
    cut: Option<usize>,
    /// What the weights claim to be in size, and their blob in name.
    claims: Option<(u64, &'static str)>,
}

/// One request, as far as tests look at it.
#[derive(Debug, Clone)]
struct Request {
    path: String,
    range: String,
    authorization: String,
}

struct Hub {
    address: String,
    files: BTreeMap<String, Vec<u8>>,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<Request>>,
    closed: AtomicBool,
}

impl Hub {
    /// Serves `files` as the repository `tiny/model` until the guard is dropped.
    fn open(files: BTreeMap<String, Vec<u8>>) -> Guard {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (behaviour, requests) = (Mutex::default(), Mutex::default());
        let hub = Arc::new(Hub { address, files, behaviour, requests, closed: AtomicBool::new(false) });
        let serving = Arc::clone(&hub);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.closed.load(Ordering::SeqCst) {
                    return;
                }
                serving.answer(stream.unwrap());
            }
        });
        Guard { hub, thread: Some(thread) }
    }

    /// One request of a connection, and its end.
    fn answer(&self, mut stream: TcpStream) {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let Some(Ok(first)) = lines.next() else { return };
        let path = first.split(' ').nth(1).unwrap().to_owned();
        let mut request = Request { path, range: String::new(), authorization: String::new() };
        for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = value.into(),
                "authorization" => request.authorization = value.into(),
                _ => {}
            }
        }
        self.requests.lock().unwrap().push(request.clone());
        let count = self.requests.lock().unwrap().len();
        let response = if count > MOST { plain(503, &[], b"") } else { self.response(&request) };
        // A client that has read enough may be gone.
        let _ = stream.write_all(&response);
    }

    fn response(&self, request: &Request) -> Vec<u8> {
        let behaviour = self.behaviour.lock().unwrap();
        if let Some(revision) = request.path.strip_prefix("/api/models/tiny/model/revision/") {
            if let Some(&status) = behaviour.refused.get(revision) {
                return plain(status, &[], b"{}");
            }
            if ![COMMIT, "main", "refs%2Fpr%2F1"].contains(&revision) {
                return plain(404, &[], b"{}");
            }
            let siblings: Vec<_> = self.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
            return plain(200, &[], serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string().as_bytes());
        }
        let (name, large) = match request.path.strip_prefix("/blobs/") {
            Some(name) => (name, true),
            None => (request.path.strip_prefix(&format!("/tiny/model/resolve/{COMMIT}/")).unwrap_or_default(), false),
        };
        let Some(bytes) = self.files.get(name) else { return plain(404, &[], b"{}") };
        let weights = name.ends_with(".safetensors");
        let (size, etag) = behaviour.claims.filter(|_| weights).unwrap_or((bytes.len() as u64, ""));
        let etag = if etag.is_empty() { format!("{:08x}-{}", bytes.len(), name.len()) } else { etag.into() };
        if weights && !large {
            // Large files lie elsewhere.
            let tag = format!("\"{etag}\"");
            let location = format!("http://{}/blobs/{name}", self.address);
            return plain(302, &[("Location", &location), ("X-Linked-Etag", &tag), ("X-Repo-Commit", COMMIT)], b"");
        }
        let (from, to) = request.range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to.parse().map_or(bytes.len(), |to: usize| (to + 1).min(bytes.len()));
        if from >= bytes.len() {
            return plain(416, &[], b"");
        }
        let range = format!("bytes {from}-{}/{size}", to - 1);
        let headers = [("Content-Range", &*range), ("ETag", &etag), ("X-Repo-Commit", COMMIT)];
        let mut response = plain(206, &headers, &bytes[from..to]);
        if let Some(cut) = behaviour.cut.filter(|&cut| weights && to - from > cut) {
            response.truncate(response.len() - (to - from) + cut);
        }
        response
    }
}

fn plain(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// A hub, closed in the end.
struct Guard {
    hub: Arc<Hub>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.hub.closed.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(&self.hub.address));
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Guard {
    /// The binary with `args`, this hub, and a cache in `home`.
    fn bitmill(&self, home: &Path, args: &[&str]) -> Command {
        let mut command = bitmill(args);
        for name in [
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
        ] {
            command.env_remove(name);
        }
        for name in [
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HUGGING_FACE_HUB_TOKEN",
        ] {
            command.env_remove(name);
        }
        command.env("HF_HOME", home).env("HF_ENDPOINT", format!("http://{}", self.hub.address));
        command
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.hub.requests.lock().unwrap())
    }

    fn behave(&self, behaviour: Behaviour) {
        *self.hub.behaviour.lock().unwrap() = behaviour;
    }
}

/// A tiny model, with what a repository has besides and nobody here needs.
fn model() -> BTreeMap<String, Vec<u8>> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/models/tests/golden/llama-gqa");
    let read = |name: &str| std::fs::read(golden.join(name)).unwrap();
    let mut files: BTreeMap<String, Vec<u8>> =
        ["config.json", "model.safetensors"].into_iter().map(|name| (name.into(), read(name))).collect();
    for (name, text) in [
        ("tokenizer.json", "{}"),
        ("README.md", "a card"),
        ("LICENSE", ""),
        ("pytorch_model.bin", "a pickle"),
        ("modeling_own.py", "code"),
        ("onnx/model.onnx", "another container"),
        ("1_Pooling/config.json", "{}"),
    ] {
        files.insert(name.into(), text.into());
    }
    files
}

fn repository(home: &Path) -> PathBuf {
    home.join("hub/models--tiny--model")
}

#[test]
fn what_is_missing_is_fetched_once_and_nothing_else() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::open(model()));
    let (home, out) = (dir.path().join("home"), dir.path().join("out"));
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("token"), "hf_secret\n").unwrap();
    let quantize =
        ["quantize", "tiny/model", "--method", "rtn", "--group-size", "8", "--no-report", "-o", out.to_str().unwrap()];
    let done = hub.bitmill(&home, &quantize).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{said}");
    assert!(said.contains("fetching tiny/model (main, commit 0123") && !said.contains("hf_secret"), "{said}");
    assert!(out.join("README.md").is_file());
    let requests = hub.requests();
    assert!(requests.iter().all(|r| r.authorization == "Bearer hf_secret"), "{requests:?}");
    let asked = |part: &str| requests.iter().any(|r| r.path.contains(part));
    for part in ["pytorch_model", "modeling_own", "onnx"] {
        assert!(!asked(part), "{part}: {requests:?}");
    }
    let snapshot = repository(&home).join("snapshots").join(COMMIT);
    for (name, bytes) in model() {
        let fetched = std::fs::read(snapshot.join(&name)).ok();
        let wanted = !["pytorch_model.bin", "modeling_own.py", "onnx/model.onnx", "LICENSE"].contains(&name.as_str());
        assert_eq!(fetched, wanted.then_some(bytes), "{name}");
    }
    let refs: Vec<_> =
        std::fs::read_dir(repository(&home).join("refs")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(refs, ["main"]);
    // What is there needs no hub; a file that went is all that is fetched again.
    success(&mut hub.bitmill(&home, &["inspect", "tiny/model"]));
    assert!(hub.requests().is_empty());
    std::fs::remove_file(snapshot.join("config.json")).unwrap();
    success(&mut hub.bitmill(&home, &["inspect", "tiny/model"]));
    // (An empty file is asked for again, and is no more there.)
    let again = ["/revision/main", "/config.json", "/LICENSE"];
    assert!(hub.requests().iter().all(|r| again.iter().any(|end| r.path.ends_with(end))));
    // Other revisions of the same files take no second copy.
    success(&mut hub.bitmill(&home, &["inspect", "tiny/model", "--revision", "refs/pr/1"]));
    success(&mut hub.bitmill(&home, &["inspect", "tiny/model", "--revision", COMMIT]));
    assert!(!hub.requests().iter().any(|r| r.path.starts_with("/blobs/") && r.range == "bytes=0-"));
    assert_eq!(std::fs::read_to_string(repository(&home).join("refs/refs/pr/1")).unwrap(), COMMIT);
}

#[test]
fn a_download_that_breaks_off_leaves_no_model_and_goes_on_where_it_stopped() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::open(model()));
    let home = dir.path();
    hub.behave(Behaviour { cut: Some(5000), ..Behaviour::default() });
    let said = failure(&mut hub.bitmill(home, &["inspect", "tiny/model"]), 1);
    assert!(said.contains("model.safetensors") && said.contains("the same command goes on"), "{said}");
    assert!(!repository(home).join("refs/main").exists());
    let snapshot = repository(home).join("snapshots").join(COMMIT);
    assert!(snapshot.join("config.json").exists() && !snapshot.join("model.safetensors").exists());
    hub.requests();
    hub.behave(Behaviour::default());
    success(&mut hub.bitmill(home, &["inspect", "tiny/model"]));
    // Three attempts were cut after 5000 bytes each.
    assert!(
        hub.requests().iter().any(|r| r.path.starts_with("/blobs/") && r.range == "bytes=15000-"),
        "{:?}",
        hub.requests()
    );
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), model()["model.safetensors"]);
    // A part that is as long as the file, or longer, is begun again.
    let blob = std::fs::canonicalize(snapshot.join("model.safetensors")).unwrap();
    for length in [model()["model.safetensors"].len(), 1_000_000] {
        // Its link stays, and leads nowhere.
        std::fs::remove_file(&blob).unwrap();
        std::fs::write(blob.with_extension("part"), vec![7; length]).unwrap();
        success(&mut hub.bitmill(home, &["inspect", "tiny/model"]));
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), model()["model.safetensors"]);
    }
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::open(model()));
    let said = |status: u16, token: Option<&str>, args: &[&str]| {
        let refused = ["main", "v2"].into_iter().map(|revision| (revision.to_owned(), status)).collect();
        hub.behave(Behaviour { refused, ..Behaviour::default() });
        let mut command = hub.bitmill(dir.path(), &[&["inspect", "tiny/model"], args].concat());
        token.map(|token| command.env("HF_TOKEN", token));
        let text = failure(&mut command, 1);
        assert!(!text.contains("hf_secret"), "{text}");
        text
    };
    let page = format!("accept its terms on http://{}/tiny/model", hub.hub.address);
    let token_file = dir.path().join("token").display().to_string();
    for (status, token, args, words) in [
        (401, None, &[][..], &["with 401", "gated or private", &page, "no token was sent", &token_file][..]),
        (403, Some("hf_secret"), &[], &["with 403", &page, "the token of HF_TOKEN was sent"]),
        (401, Some("hf_secret"), &["--revision", "v2"], &["with 401", "the token of HF_TOKEN was sent"]),
        (404, None, &[], &["with 404", "there is no tiny/model", "is no path here"]),
        (429, None, &[], &["429", "too many requests"]),
        (503, None, &[], &["with 503", "the same command goes on"]),
    ] {
        let text = said(status, token, args);
        words.iter().for_each(|word| assert!(text.contains(word), "{status}: `{word}` is missing from: {text}"));
    }
    hub.behave(Behaviour::default());
    let text = failure(&mut hub.bitmill(dir.path(), &["inspect", "tiny/model", "--revision", "v3"]), 1);
    assert!(text.contains("is on http://127.0.0.1") && text.contains("has no revision v3"), "{text}");
    let mut offline = hub.bitmill(dir.path(), &["inspect", "tiny/model"]);
    hub.requests();
    let text = failure(offline.env("HF_HUB_OFFLINE", "1"), 1);
    assert!(text.contains("HF_HUB_OFFLINE forbids") && text.contains("hf download tiny/model"), "{text}");
    assert!(hub.requests().is_empty());
    let mut nobody = hub.bitmill(dir.path(), &["inspect", "tiny/model"]);
    // A port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = failure(nobody.env("HF_ENDPOINT", format!("http://{free}")), 1);
    for words in ["from http://127.0.0.1", "HTTPS_PROXY", "HF_ENDPOINT", "hf download tiny/model"] {
        assert!(text.contains(words), "`{words}` is missing from: {text}");
    }
    assert!(!repository(dir.path()).join("refs").exists());
    // Where `tiny` is a folder, `tiny/model` is a path that is not there, unless a revision is asked for.
    std::fs::create_dir(dir.path().join("tiny")).unwrap();
    let here = |args: &[&str]| {
        let mut command = hub.bitmill(dir.path(), args);
        failure(command.current_dir(dir.path()).env("HF_HUB_OFFLINE", "0"), 1)
    };
    let text = here(&["inspect", "tiny/model"]);
    assert!(text.contains("tiny is a folder here") && text.contains("--revision main"), "{text}");
    assert!(hub.requests().is_empty());
    here(&["inspect", "tiny/model", "--revision", "v3"]);
    assert!(!hub.requests().is_empty());
}

#[test]
fn what_a_hub_claims_is_not_believed() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::open(model()));
    let said = |claims| {
        hub.behave(Behaviour { claims: Some(claims), ..Behaviour::default() });
        failure(&mut hub.bitmill(dir.path(), &["inspect", "tiny/model"]), 1)
    };
    // More than any disk has.
    let text = said((1 << 60, ""));
    assert!(text.contains("HF_HUB_CACHE") && text.contains("hub"), "{text}");
    assert!(said((10, "../../../../evil")).contains("answers for another model.safetensors"));
    let weights = model()["model.safetensors"].len() as u64;
    let text = said((weights + 1, "longer"));
    assert!(text.contains("bytes came where"), "{text}");
    assert!(!repository(dir.path()).join("snapshots").join(COMMIT).join("model.safetensors").exists());
    let mut pickles = model();
    pickles.remove("model.safetensors");
    let other = Hub::open(pickles);
    let text = failure(&mut other.bitmill(dir.path(), &["inspect", "tiny/model"]), 1);
    assert!(text.contains("pytorch_model.bin") && text.contains("pickles are not fetched"), "{text}");
}

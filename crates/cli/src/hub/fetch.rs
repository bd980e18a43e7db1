//! Fetching a model into the hub's cache: what is missing of it, one file after another, through hf-hub.
//!
//! Files are fetched by the commit that the revision stands for, so that all are of one state, and the revision is written down
//! only when all are there. A file gets its name when it is whole; what a download that broke off has of it is taken up by the next.

use super::account::{self, Token};
use super::{Wanted, files, variable};
use crate::progress::Progress;
use crate::units;
use anyhow::{Context, anyhow, bail, ensure};
use bitmill_checkpoint::ensure_free;
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a file whose transfer breaks off is taken up again.
const ATTEMPTS: u32 = 3;

/// How long a hub may take to answer the first question.
const PATIENCE: Duration = Duration::from_secs(30);

/// The hub, asked for one repository.
struct Hub<'a> {
    wanted: &'a Wanted<'a>,
    api: Api,
    endpoint: String,
    token: Option<Token>,
}

/// A file to be fetched.
struct File {
    name: String,
    etag: String,
    bytes: u64,
}

/// Fetches what the cache lacks of `wanted` and returns its snapshot.
///
/// # Errors
/// A name, revision or file that the hub does not have or does not give, a network or a disk that fails, each with a remedy.
pub(super) fn fetch(wanted: &Wanted<'_>) -> anyhow::Result<PathBuf> {
    let (endpoint, token) = (account::endpoint(variable), account::token(variable)?);
    let api = ApiBuilder::from_cache(Cache::new(wanted.cache.clone()))
        .with_endpoint(endpoint.clone())
        .with_token(token.as_ref().map(|token| token.secret.clone()))
        .with_progress(false)
        .with_user_agent("bitmill", env!("CARGO_PKG_VERSION"))
        .build();
    let hub = Hub { wanted, api: api.context("preparing to connect")?, endpoint, token };
    let repository = &wanted.repository;
    let (commit, listed) = hub.listing()?;
    let model = |reason| anyhow!("{repository} is on {}, but no model that bitmill reads: {reason}", hub.endpoint);
    let small = files::small(&wanted.inside, &listed).map_err(model)?;
    let (folder, repo) = (wanted.folder(), hub.repo(&commit));
    let snapshot = folder.join("snapshots").join(&commit);
    eprintln!(
        "fetching {repository} ({}, commit {commit}) from {} to {}",
        wanted.revision(),
        hub.endpoint,
        folder.display()
    );
    let files = |names: &[String]| hub.files(&repo, names, (&snapshot, &commit));
    let done = files(&small).and_then(|()| {
        let weights = files::weights(&wanted.inside, &listed, &snapshot).map_err(model)?;
        files(&weights)
    });
    // hf-hub notes every commit it was asked for as a revision of its own name.
    let _ = std::fs::remove_file(folder.join("refs").join(&commit));
    done?;
    if wanted.revision() != commit {
        let pointer = folder.join("refs").join(wanted.revision());
        let write = || {
            std::fs::create_dir_all(pointer.parent().unwrap_or(&folder))?;
            std::fs::write(&pointer, &commit)
        };
        write().with_context(|| format!("writing {}", pointer.display()))?;
    }
    Ok(snapshot)
}

impl Hub<'_> {
    fn repo(&self, revision: &str) -> ApiRepo {
        let name = self.wanted.repository.clone();
        self.api.repo(Repo::with_revision(name, RepoType::Model, revision.to_owned()))
    }

    /// The commit that the revision stands for, and the names of its files.
    fn listing(&self) -> anyhow::Result<(String, Vec<String>)> {
        let info = info(&self.repo(self.wanted.revision())).map_err(|e| self.explain(e, "its list of files"))?;
        ensure!(is_plain(&info.sha), "{} says that the commit is {:?}, which is none", self.endpoint, info.sha);
        Ok((info.sha, info.siblings.into_iter().map(|file| file.rfilename).collect()))
    }

    /// Fetches those of the files `names` that the snapshot lacks.
    fn files(&self, repo: &ApiRepo, names: &[String], (snapshot, commit): (&Path, &str)) -> anyhow::Result<()> {
        let mut missing = Vec::new();
        for name in names.iter().filter(|name| !snapshot.join(name).exists()) {
            let about = match self.api.metadata(&repo.url(name)) {
                Ok(about) => about,
                // An empty file has no first byte to ask for, and says nothing.
                Err(e) if unfit(&e) && !files::is_weights(Path::new(name)) => continue,
                Err(e) => return Err(self.explain(e, name)),
            };
            // A link to a blob that is gone would stand in the way of the file.
            if snapshot.join(name).is_symlink() {
                std::fs::remove_file(snapshot.join(name)).with_context(|| format!("removing the dead link {name}"))?;
            }
            let (etag, bytes) = (about.etag().to_owned(), about.size() as u64);
            ensure!(is_plain(&etag) && about.commit_hash() == commit, "{} answers for another {name}", self.endpoint);
            let blob = self.wanted.folder().join("blobs").join(&etag);
            // Another revision has the same.
            if blob.metadata().is_ok_and(|held| held.len() == bytes) {
                link(&etag, &snapshot.join(name), name).with_context(|| format!("linking {}", blob.display()))?;
                continue;
            }
            missing.push(File { name: name.clone(), etag, bytes });
        }
        let total: u64 = missing.iter().map(|file| file.bytes).sum();
        if missing.is_empty() {
            return Ok(());
        }
        ensure_free(&self.wanted.cache, total).context("the hub's cache (HF_HUB_CACHE names another place)")?;
        let (bar, mut before) = (Progress::new(total), 0);
        for file in &missing {
            bar.message(format!("{}, {} in all", file.name, units::bytes(total)));
            let fetched = self.file(repo, file, (&bar, before));
            if fetched.is_err() {
                bar.finish();
            }
            fetched?;
            before += file.bytes;
            bar.set(before);
            bar.plain_line(&format!("{}, {}", file.name, units::bytes(file.bytes)));
        }
        bar.finish();
        Ok(())
    }

    fn file(&self, repo: &ApiRepo, file: &File, (bar, before): (&Progress, u64)) -> anyhow::Result<()> {
        let blob = self.wanted.folder().join("blobs").join(&file.etag);
        let mut attempt = 1;
        let path = loop {
            match repo.download_with_progress(&file.name, Bytes { bar, before, now: 0 }) {
                Ok(path) => break path,
                // What is there of it is not its beginning.
                Err(e) if unfit(&e) && attempt < ATTEMPTS => {
                    let _ = std::fs::remove_file(blob.with_extension("part"));
                }
                Err(e) if broken_off(&e) && attempt < ATTEMPTS => std::thread::sleep(Duration::from_millis(500)),
                Err(e) => return Err(self.explain(e, &file.name)),
            }
            attempt += 1;
        };
        let got = path.metadata().with_context(|| format!("inspecting {}", path.display()))?.len();
        if got != file.bytes {
            let _ = (std::fs::remove_file(&path), std::fs::remove_file(&blob));
            bail!(
                "{}: {got} bytes came where {} were announced; the same command fetches it again",
                file.name,
                file.bytes
            );
        }
        Ok(())
    }

    /// What a failure means, and what to do about it.
    fn explain(&self, error: ApiError, what: &str) -> anyhow::Error {
        let Hub { wanted, endpoint, token, .. } = self;
        let (repository, given) = (&wanted.repository, wanted.given.display());
        let found = format!("{given} is no path here, and fetching {repository} ({what}) from {endpoint} failed");
        let account = match token {
            Some(token) => format!("{token} was sent"),
            None => {
                let file =
                    account::token_file(variable).map_or(String::new(), |f| format!(", looked for in {}", f.display()));
                format!("no token was sent (HF_TOKEN, or what `hf auth login` writes{file})")
            }
        };
        match &error {
            ApiError::RequestError(e) => match **e {
                ureq::Error::StatusCode(code @ (401 | 403)) => anyhow!(
                    "{found} with {code}: it is gated or private, or there is none of this name; accept its terms on {endpoint}/{repository} \
                     with the account of your token; {account}"
                ),
                ureq::Error::StatusCode(404) => match wanted.revision {
                    Some(revision) if info(&self.repo(super::MAIN)).is_ok() => {
                        anyhow!(
                            "{repository} is on {endpoint}, but has no revision {revision}; its page lists branches and tags"
                        )
                    }
                    _ => anyhow!("{found} with 404: there is no {repository}; check the name"),
                },
                ureq::Error::StatusCode(429) => anyhow!("{found} with 429, too many requests; wait a while; {account}"),
                ureq::Error::StatusCode(code) => anyhow!("{found} with {code}; {}", self.later()),
                ref other => self.unreachable(&found, other),
            },
            ApiError::IoError(e) => match e.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => anyhow!(
                    "{found}: the disk of the cache {} is full; free some space or name another place with HF_HUB_CACHE, then the same \
                     command goes on",
                    wanted.cache.display()
                ),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::NotFound => {
                    anyhow!(
                        "{found}: the cache {} cannot be written ({e}); name another place with HF_HUB_CACHE",
                        wanted.cache.display()
                    )
                }
                _ => self.unreachable(&found, e),
            },
            ApiError::LockAcquisition(file) => {
                anyhow!(
                    "{found}: another process is fetching it; wait for that, or remove {} if there is none",
                    file.display()
                )
            }
            other => anyhow!("{found}: the answer is not the hub's ({other}); is HF_ENDPOINT the address of a hub?"),
        }
    }

    fn later(&self) -> &'static str {
        "try it later: the same command goes on with what is there"
    }

    fn unreachable(&self, found: &str, reason: &dyn std::fmt::Display) -> anyhow::Error {
        anyhow!(
            "{found}: {reason}; HTTPS_PROXY names a proxy and HF_ENDPOINT a mirror, where one is needed; {}; or, {}",
            self.later(),
            self.wanted.elsewhere()
        )
    }
}

/// What the hub says of a repository. It is the first that it is asked, so this is where one that does not answer is found out.
fn info(repo: &ApiRepo) -> Result<RepoInfo, ApiError> {
    let request = repo.info_request().config().timeout_connect(Some(PATIENCE)).timeout_recv_response(Some(PATIENCE));
    let mut response = request.build().call().map_err(Box::new)?;
    Ok(response.body_mut().read_json().map_err(Box::new)?)
}

/// Whether the part of a file that an earlier download left is of no use.
fn unfit(error: &ApiError) -> bool {
    let range = |e: &ureq::Error| matches!(e, ureq::Error::StatusCode(416));
    matches!(error, ApiError::InvalidResume) || matches!(error, ApiError::RequestError(e) if range(e))
}

/// Whether a transfer that had begun broke off.
fn broken_off(error: &ApiError) -> bool {
    let network =
        [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted, ErrorKind::Other];
    matches!(error, ApiError::IoError(e) if network.contains(&e.kind()))
}

/// Whether what a server calls a commit or a blob can be the name of a file.
fn is_plain(name: &str) -> bool {
    (1..=128).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Links a blob, as hf-hub does, into the snapshot as `path`, which is `name` there.
fn link(etag: &str, path: &Path, name: &str) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let up = "../".repeat(2 + Path::new(name).components().count() - 1);
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), path)
}

/// Bytes of a file as steps of a bar that has `before` behind it.
struct Bytes<'a> {
    bar: &'a Progress,
    before: u64,
    now: u64,
}

impl hf_hub::api::Progress for Bytes<'_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.now = 0;
    }

    fn update(&mut self, size: usize) {
        self.now += size as u64;
        self.bar.set(self.before + self.now);
    }

    fn finish(&mut self) {}
}

//! The rules of the house that no compiler checks: where files lie, how they open, what they may not contain.
//!
//! Each test reads the repository as text, collects every violation, and fails with the whole list; a message says what
//! to do. Code is judged with comments and literals blanked out, so that prose about `unsafe` is not `unsafe`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms, left to right: each may depend only on those before it. New rooms go to the right end.
const ROOMS: [&str; 7] = ["scheme", "kernels", "checkpoint", "models", "calibrate", "quantize", "cli"];

/// Where `unsafe` lives: SIMD, and the one file that maps checkpoint shards.
const UNSAFE: [&str; 2] = ["crates/kernels/", "crates/checkpoint/src/shard.rs"];

/// What a visitor sees first. Dotfiles and what .gitignore names are allowed besides.
const TOP: [&str; 7] = ["Cargo.toml", "Cargo.lock", "crates", "tools", "tests", "benches", "models"];

/// Names that say nothing about what is inside.
const NAMELESS: [&str; 8] = ["utils", "util", "helpers", "helper", "common", "manager", "core", "misc"];

/// Folders and files where a panic is how a failure is reported.
const PANICS_REPORT: [&str; 4] = ["tests", "tests.rs", "benches", "fuzz_targets"];

const LONGEST_FILE: usize = 600;

/// One Rust file of the repository.
struct Source {
    /// Relative to the root, with forward slashes.
    path: String,
    text: String,
    /// The text with comments, strings and character literals blanked out.
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let listing = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> = listing.map(|entry| entry.expect("a readable directory").path()).collect();
    paths.sort();
    paths
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).expect("file names are UTF-8")
}

fn sources() -> Vec<Source> {
    fn walk(dir: &Path, found: &mut Vec<Source>) {
        for path in entries(dir) {
            if path.is_dir() {
                if name(&path) != "target" && !name(&path).starts_with('.') {
                    walk(&path, found);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = read(&path);
                let relative = path.strip_prefix(root()).expect("found under the root");
                let path = relative.to_str().expect("paths are UTF-8").replace('\\', "/");
                found.push(Source { path, code: blank(&text), text });
            }
        }
    }
    let mut found = Vec::new();
    for dir in ["crates", "tools", "tests", "benches"] {
        walk(&root().join(dir), &mut found);
    }
    assert!(found.len() > 10, "the walk over the repository found only {} files", found.len());
    found
}

/// Fails with every violation, one per line.
fn none(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}\n  {}", violations.join("\n  "));
}

#[test]
fn every_file_opens_by_saying_what_it_is() {
    let heads = sources().into_iter().filter(|s| !s.text.starts_with("//! "));
    none("first line is `//! what this file is`", &heads.map(|s| s.path).collect::<Vec<_>>());
}

#[test]
fn no_file_is_too_long_to_read() {
    let lengths = sources().into_iter().map(|s| (s.text.lines().count(), s.path));
    let long: Vec<String> =
        lengths.filter(|(n, _)| *n > LONGEST_FILE).map(|(n, path)| format!("{path}: {n} lines")).collect();
    none(&format!("at most {LONGEST_FILE} lines: split by meaning"), &long);
}

#[test]
fn unsafe_stays_in_its_two_places() {
    let outside = sources().into_iter().filter(|s| !UNSAFE.iter().any(|home| s.path.starts_with(home)));
    let found: Vec<String> =
        outside.flat_map(|s| lines_with(&s.path, &s.code, |line| has_word(line, "unsafe"))).collect();
    none(&format!("`unsafe` only in {}", UNSAFE.join(" and ")), &found);
}

#[test]
fn nothing_panics_for_convenience() {
    let all = sources();
    let test_files: BTreeSet<String> = all.iter().flat_map(test_modules).collect();
    let mut found = Vec::new();
    for source in &all {
        let in_tests = source.path.split('/').any(|part| PANICS_REPORT.contains(&part));
        if !in_tests && !test_files.contains(&source.path) {
            let code = without_tests(&source.code);
            found.extend(lines_with(&source.path, &code, |line| {
                line.contains(".unwrap()") || line.contains(".expect(")
            }));
        }
    }
    none(
        "no `.unwrap()` or `.expect(` outside tests and benches: return an error, or match and say which invariant broke",
        &found,
    );
}

#[test]
fn no_module_is_named_after_nothing() {
    let mut found = Vec::new();
    for source in sources() {
        let parts = source.path.split('/').map(|part| part.trim_end_matches(".rs"));
        found.extend(parts.filter(|part| NAMELESS.contains(part)).map(|part| format!("{}: {part}", source.path)));
        let inline = |line: &str| NAMELESS.iter().any(|name| line.contains(&format!("mod {name} {{")));
        found.extend(lines_with(&source.path, &source.code, inline));
    }
    none("name a module after what it knows", &found);
}

#[test]
fn every_dependency_says_what_for() {
    let manifest = read(&root().join("Cargo.toml"));
    let mut found = Vec::new();
    let mut above = "";
    for line in section(&manifest, "[workspace.dependencies]") {
        let room = |line: &str| line.contains("path = ");
        let explained = above.starts_with('#') || (room(line) && room(above));
        if !line.is_empty() && !line.starts_with('#') && !explained {
            found.push(line.to_owned());
        }
        above = line;
    }
    none("a comment above each entry of [workspace.dependencies] says what it is for", &found);
}

#[test]
fn rooms_depend_only_to_the_left() {
    let place = |room: &str| ROOMS.iter().position(|r| *r == room);
    let mut found = Vec::new();
    for dir in entries(&root().join("crates")) {
        let manifest = dir.join("Cargo.toml");
        if !manifest.exists() {
            continue; // the facade `bitmill`, whose manifest is the root's
        }
        let Some(here) = place(name(&dir)) else {
            found.push(format!("crates/{}: unknown room, add it to the right end of ROOMS", name(&dir)));
            continue;
        };
        for line in read(&manifest).lines().filter_map(|line| line.strip_prefix("bitmill-")) {
            let other = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if place(other).is_none_or(|there| there >= here) {
                found.push(format!("crates/{}: depends on bitmill-{other}", name(&dir)));
            }
        }
    }
    none(&format!("rooms depend to the left only: {}", ROOMS.join(" <- ")), &found);
}

#[test]
fn the_top_level_is_the_map() {
    let ignored = read(&root().join(".gitignore"));
    let ignored: BTreeSet<&str> = ignored.lines().filter_map(|line| line.strip_prefix('/')).collect();
    let allowed = |entry: &str| {
        let known = TOP.contains(&entry) || entry == "README.md" || entry.starts_with("LICENSE");
        known || entry.starts_with('.') || ignored.contains(entry)
    };
    let top = entries(root());
    let found: Vec<String> = top.iter().map(|path| name(path).to_owned()).filter(|entry| !allowed(entry)).collect();
    none("only the known entries at top level", &found);
}

/// Lines of a TOML section, trimmed.
fn section<'a>(manifest: &'a str, head: &str) -> impl Iterator<Item = &'a str> {
    let lines = manifest.lines().map(str::trim).skip_while(move |line| *line != head);
    lines.skip(1).take_while(|line| !line.starts_with('['))
}

fn lines_with(path: &str, code: &str, matches: impl Fn(&str) -> bool) -> Vec<String> {
    let hits = code.lines().enumerate().filter(|(_, line)| matches(line));
    hits.map(|(i, line)| format!("{path}:{}: {}", i + 1, line.trim())).collect()
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|part| part == word)
}

/// Files that hold a module declared under `#[cfg(test)]`, as `mod name;` beside or below the declaring file.
fn test_modules(source: &Source) -> Vec<String> {
    let (dir, file) = source.path.rsplit_once('/').unwrap_or(("", &source.path));
    let stem = file.trim_end_matches(".rs");
    let dir = if ["lib", "main", "mod"].contains(&stem) { dir.to_owned() } else { format!("{dir}/{stem}") };
    let after = source.code.split("#[cfg(test)]").skip(1).filter_map(|rest| rest.split(['{', ';']).next());
    let names = after.filter_map(|item| item.split_once("mod ")).map(|(_, name)| name.trim().to_owned());
    names.flat_map(|name| [format!("{dir}/{name}.rs"), format!("{dir}/{name}/mod.rs")]).collect()
}

/// Blanked code with every item under `#[cfg(test)]` removed, line numbers kept.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        let item = &rest[at..];
        let mut depth = 0usize;
        let end = item.char_indices().find_map(|(i, c)| {
            match c {
                '{' | '(' | '[' => depth += 1,
                '}' | ')' | ']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            (depth == 0 && (c == ';' || c == '}')).then_some(i + 1)
        });
        let end = end.unwrap_or(item.len());
        kept.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    kept + rest
}

/// The text with comments, strings and character literals replaced by spaces; line breaks stay.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let length = literal(&chars[at..]).max(1);
        if length > 1 {
            out.extend(chars[at..at + length].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
        } else {
            out.push(chars[at]);
        }
        at += length;
    }
    out
}

/// Length of the comment or literal that starts here; 0 when none does.
fn literal(s: &[char]) -> usize {
    let starts = |prefix: &str| prefix.chars().eq(s.iter().copied().take(prefix.len()));
    if starts("//") {
        return s.iter().position(|c| *c == '\n').unwrap_or(s.len());
    }
    if starts("/*") {
        let mut depth = 0usize;
        for (i, pair) in s.windows(2).enumerate() {
            match pair {
                ['/', '*'] => depth += 1,
                ['*', '/'] if depth == 1 => return i + 2,
                ['*', '/'] => depth -= 1,
                _ => {}
            }
        }
        return s.len();
    }
    let raw = s.iter().take_while(|c| **c == 'b').count();
    if s.get(raw) == Some(&'r') {
        let hashes = s[raw + 1..].iter().take_while(|c| **c == '#').count();
        let body = raw + 1 + hashes;
        if s.get(body) == Some(&'"') {
            let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
            let end = s[body + 1..].windows(close.len()).position(|w| w == close);
            return end.map_or(s.len(), |i| body + 1 + i + close.len());
        }
    }
    let quoted = |quote: char| {
        let mut i = 1;
        while i < s.len() && s[i] != quote {
            i += if s[i] == '\\' { 2 } else { 1 };
        }
        (i + 1).min(s.len())
    };
    match s {
        ['"', ..] => quoted('"'),
        ['\'', '\\', ..] => quoted('\''),
        ['\'', _, '\'', ..] => 3, // otherwise a lifetime
        _ => 0,
    }
}

#[test]
fn the_checks_see_code_and_nothing_else() {
    let text = "let a = \"unsafe {\"; // unsafe\n/* unsafe /* x */ */ let c = '{'; f::<'a>(r#\"un\"safe\"#, '\\'');\nunsafe {}";
    let lines: Vec<String> = lines_with("f", &blank(text), |line| has_word(line, "unsafe"));
    assert_eq!(lines, ["f:3: unsafe {}"]);
    assert_eq!(blank(text).matches('{').count(), 1);
    assert!(!has_word("#![forbid(unsafe_code)]", "unsafe"));

    let tested = "fn a() {}\n#[cfg(test)]\nconst C: [u8; 1] = [0];\nfn b() { c.unwrap() }\n#[cfg(test)]\nmod tests {\n fn d() { e.unwrap() }\n}\n";
    let left = lines_with("f", &without_tests(tested), |line| line.contains(".unwrap()"));
    assert_eq!(left, ["f:4: fn b() { c.unwrap() }"]);

    let parent = Source { path: "crates/x/src/a.rs".into(), text: String::new(), code: "#[cfg(test)]\nmod b;".into() };
    assert_eq!(test_modules(&parent)[0], "crates/x/src/a/b.rs");
}

//! What is read, cut into windows: texts into windows of equal length for a decoder, of one sentence each for an encoder;
//! images are windows as they are.

use crate::images::{self, Image};
use crate::{Error, Tokenizer};
use bitmill_models::{Images, Window};
use std::path::{Path, PathBuf};

/// What the model reads at a time. A decoder's windows are all of one length and open with BOS where the model uses one;
/// an encoder's are sentences as its tokenizer frames them, of any length, so that no token of them is padding; those of a
/// model of images are an image each.
#[derive(Debug, Clone)]
pub struct Windows {
    content: Content,
    /// Tokens of the longest window, special tokens included.
    pub length: usize,
    /// Tokens of the text they were cut from.
    pub text_tokens: usize,
}

#[derive(Debug, Clone)]
enum Content {
    /// `[windows][tokens]`.
    Tokens(Vec<Vec<u32>>),
    Images(Vec<Image>),
}

/// Most tokens of a held-out window.
const HELD_LENGTH: usize = 512;

/// Where window `i` starts.
fn start(i: usize, stride: usize, seed: u64) -> usize {
    match seed {
        0 => i * stride,
        _ => i * stride + (splitmix(seed.wrapping_add(i as u64)) % stride.max(1) as u64) as usize,
    }
}

impl Windows {
    /// These windows of tokens.
    #[must_use]
    pub fn of_tokens(tokens: Vec<Vec<u32>>) -> Self {
        let length = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let text_tokens = tokens.iter().map(Vec::len).sum();
        Windows { content: Content::Tokens(tokens), length, text_tokens }
    }

    /// The images of `files`, which must be such as `images` says, a window each.
    ///
    /// Image i of N is number i·⌊L/N⌋ of the L that the files hold one after another. N is `count`, or L where that is less. A
    /// `seed` other than 0 moves every choice by a reproducible random part of the stride.
    ///
    /// # Errors
    /// [`Error::Images`] for a file that holds none, or others, or numbers that are NaN or infinite.
    pub fn images<P: AsRef<Path>>(files: &[P], images: &Images, count: usize, seed: u64) -> Result<Self, Error> {
        let mut all = Vec::new();
        for file in files {
            all.extend(images::open(file.as_ref(), images)?);
        }
        let count = count.clamp(1, all.len().max(1));
        let stride = all.len() / count;
        let chosen = (0..count.min(all.len())).map(|i| all[start(i, stride, seed)].clone()).collect();
        Ok(Windows::of_images(chosen, images))
    }

    fn of_images(all: Vec<Image>, images: &Images) -> Self {
        let length = 1 + images.patches();
        Windows { text_tokens: all.len() * length, content: Content::Images(all), length }
    }

    /// Cuts `text` (token ids without special tokens) into at most `count` windows of `length` tokens.
    ///
    /// Window i of N starts at token i·⌊(T − length)/N⌋ and is BOS + the next `length − 1` tokens (`length` tokens for
    /// a model without BOS). N is `count`, or fewer where the text has not enough tokens for `count` windows that do
    /// not overlap. A `seed` other than 0 moves every start by a reproducible random part of the stride.
    ///
    /// # Errors
    /// [`Error::ShortText`] (named `name`) when the text has not one window.
    pub fn pack(
        name: &str,
        text: &[u32],
        bos: Option<u32>,
        length: usize,
        count: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        let take = length - usize::from(bos.is_some());
        if take == 0 || length < 2 {
            return Err(Error::Window { window: length, reason: "a window needs at least two tokens".into() });
        }
        if text.len() < length {
            return Err(Error::ShortText { name: name.into(), tokens: text.len(), needed: length });
        }
        let count = count.clamp(1, (text.len() / take).max(1));
        let stride = (text.len() - length) / count;
        let start = |i| start(i, stride, seed);
        let window = |i| bos.into_iter().chain(text[start(i)..start(i) + take].iter().copied()).collect();
        Ok(Windows { text_tokens: text.len(), ..Windows::of_tokens((0..count).map(window).collect()) })
    }

    /// Reads, tokenizes and packs `texts`, pairs of a name and its content.
    ///
    /// # Errors
    /// As [`Windows::pack`] and [`Tokenizer::encode`].
    pub fn from_texts(
        texts: &[(String, String)],
        tokenizer: &Tokenizer,
        vocab: usize,
        length: usize,
        count: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        Ok(Windows::with_held_out(texts, tokenizer, vocab, (length, count, seed), 0)?.0)
    }

    /// As [`Windows::from_texts`] with `(length, count, seed)`, and at most `held` windows of at most 512 tokens that share
    /// no token with those: they lie in the gaps between them, evenly over the text. `None` where the gaps are too
    /// small.
    ///
    /// # Errors
    /// As [`Windows::from_texts`].
    pub fn with_held_out(
        texts: &[(String, String)],
        tokenizer: &Tokenizer,
        vocab: usize,
        (length, count, seed): (usize, usize, u64),
        held: usize,
    ) -> Result<(Self, Option<Self>), Error> {
        let mut ids = Vec::new();
        for (_, text) in texts {
            ids.extend(tokenizer.encode(text, vocab)?);
        }
        let names: Vec<&str> = texts.iter().map(|(name, _)| name.as_str()).collect();
        let windows = Windows::pack(&names.join(", "), &ids, tokenizer.bos(), length, count, seed)?;
        let gaps = Windows::gaps(&ids, tokenizer.bos(), &windows, seed, held);
        Ok((windows, gaps))
    }

    /// Windows of `text` between those that [`Windows::pack`] cut from it.
    fn gaps(text: &[u32], bos: Option<u32>, packed: &Windows, seed: u64, held: usize) -> Option<Self> {
        let (count, length) = (packed.count(), packed.length.min(HELD_LENGTH));
        let begins = usize::from(bos.is_some());
        let (take, own) = (packed.length - begins, length - begins);
        let stride = (text.len() - packed.length) / count;
        let start = |i: usize| start(i, stride, seed);
        let gap = |i: usize| (start(i) + take, if i + 1 < count { start(i + 1) } else { text.len() });
        let wanted = held.min(count);
        let place = |j: usize| {
            let (from, to) = gap(j * count / wanted);
            let room = to.checked_sub(from)?.checked_sub(own)?;
            Some(from + room / 2)
        };
        let window = |at: usize| bos.into_iter().chain(text[at..at + own].iter().copied()).collect();
        let tokens: Vec<Vec<u32>> = (0..wanted).filter_map(place).map(window).collect();
        (!tokens.is_empty()).then(|| Windows { text_tokens: text.len(), ..Windows::of_tokens(tokens) })
    }

    /// The sentences of `texts`, one a line and blank lines skipped, each cut to at most `limit` tokens with the special
    /// tokens the tokenizer puts around it.
    ///
    /// Sentence i of N is line i·⌊L/N⌋ of the L lines. N is `count`, or L where that is less. A `seed` other than 0 moves
    /// every choice by a reproducible random part of the stride.
    ///
    /// # Errors
    /// [`Error::ShortText`] when there is no sentence; as [`Tokenizer::sentence`].
    pub fn sentences(
        texts: &[(String, String)],
        tokenizer: &Tokenizer,
        vocab: usize,
        limit: usize,
        count: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        let lines = texts.iter().flat_map(|(_, text)| text.lines()).map(str::trim);
        let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        if lines.is_empty() {
            let names: Vec<&str> = texts.iter().map(|(name, _)| name.as_str()).collect();
            return Err(Error::ShortText { name: names.join(", "), tokens: 0, needed: 1 });
        }
        let count = count.clamp(1, lines.len());
        let stride = lines.len() / count;
        let sentence = |i: usize| tokenizer.sentence(lines[start(i, stride, seed)], vocab, limit);
        Ok(Windows::of_tokens((0..count).map(sentence).collect::<Result<Vec<_>, _>>()?))
    }

    /// The windows of all `parts`, one after another; of texts, or of images.
    ///
    /// # Errors
    /// [`bitmill_models::Error::Reads`] where both are among them.
    pub fn joined(parts: Vec<Windows>) -> Result<Windows, Error> {
        let length = parts.iter().map(|w| w.length).max().unwrap_or(0);
        let text_tokens = parts.iter().map(|w| w.text_tokens).sum();
        let (mut tokens, mut images) = (Vec::new(), Vec::new());
        for part in parts {
            match part.content {
                Content::Tokens(own) => tokens.extend(own),
                Content::Images(own) => images.extend(own),
            }
        }
        let content = match (tokens.is_empty(), images.is_empty()) {
            (_, true) => Content::Tokens(tokens),
            (true, false) => Content::Images(images),
            (false, false) => return Err(bitmill_models::Error::Reads { expected: "text", got: "images" }.into()),
        };
        Ok(Windows { content, length, text_tokens })
    }

    /// What the model reads in window `w`.
    ///
    /// # Errors
    /// An image that cannot be read.
    pub fn get(&self, w: usize) -> Result<Window<'_>, Error> {
        match &self.content {
            Content::Tokens(tokens) => Ok(Window::from(&tokens[w])),
            Content::Images(images) => Ok(Window::Image(images[w].pixels()?.into())),
        }
    }

    /// The tokens of window `w`.
    ///
    /// # Panics
    /// Where the windows are images: what asks for tokens runs models that predict some.
    #[must_use]
    pub fn tokens(&self, w: usize) -> &[u32] {
        match &self.content {
            Content::Tokens(tokens) => &tokens[w],
            Content::Images(_) => panic!("images have no tokens"),
        }
    }

    /// Whether each is an image.
    #[must_use]
    pub fn are_images(&self) -> bool {
        matches!(self.content, Content::Images(_))
    }

    /// Tokens of every window.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        match &self.content {
            Content::Tokens(tokens) => tokens.iter().map(Vec::len).collect(),
            Content::Images(images) => vec![self.length; images.len()],
        }
    }

    /// Number of windows.
    #[must_use]
    pub fn count(&self) -> usize {
        match &self.content {
            Content::Tokens(tokens) => tokens.len(),
            Content::Images(images) => images.len(),
        }
    }

    /// Hash of the token ids, or of the images.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        match &self.content {
            Content::Tokens(tokens) => tokens.iter().flatten().for_each(|t| {
                hash.update(&t.to_le_bytes());
            }),
            Content::Images(images) => images.iter().for_each(|image| image.hash(&mut hash)),
        }
        // Where windows differ in length, the tokens alone do not say where one ends.
        if self.lengths().iter().any(|&length| length != self.length) {
            self.lengths().iter().for_each(|&length| {
                hash.update(&(length as u64).to_le_bytes());
            });
        }
        hash.finalize().to_hex().to_string()
    }

    /// `count` of the windows, evenly chosen; all of them where there are no more.
    #[must_use]
    pub fn sample(&self, count: usize) -> Windows {
        let count = count.clamp(1, self.count());
        let chosen = (0..count).map(|i| i * self.count() / count);
        let content = match &self.content {
            Content::Tokens(tokens) => Content::Tokens(chosen.map(|i| tokens[i].clone()).collect()),
            Content::Images(images) => Content::Images(chosen.map(|i| images[i].clone()).collect()),
        };
        Windows { content, ..*self }
    }
}

/// Reads text files as (name, content) pairs.
///
/// # Errors
/// [`Error::Text`] for a file that is missing or not UTF-8.
pub fn read_texts<P: AsRef<Path>>(files: &[P]) -> Result<Vec<(String, String)>, Error> {
    let read = |file: &P| {
        let path: PathBuf = file.as_ref().to_owned();
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok((path.display().to_string(), text)),
            Err(source) => Err(Error::Text { file: path, source }),
        }
    };
    files.iter().map(read).collect()
}

/// One step of the SplitMix64 generator: a well-mixed function of its argument.
#[must_use]
pub fn splitmix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number from 0 to below 1 from the upper bits of `random`.
#[must_use]
pub fn uniform(random: u64) -> f32 {
    (random >> 40) as f32 / (1u64 << 24) as f32
}

/// Whether window `w` of `count` is one of those held out: one in `one_in`, and at least the last.
#[must_use]
pub fn held_out(w: usize, count: usize, one_in: usize) -> bool {
    (w + 1).is_multiple_of(one_in) || (count < one_in && w + 1 == count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn windows_follow_the_meter() {
        let text: Vec<u32> = (100..1100).collect();
        let w = Windows::pack("t", &text, Some(1), 8, 10, 0).unwrap();
        assert_eq!((w.count(), w.length), (10, 8));
        // Stride ⌊(1000 − 8)/10⌋ = 99.
        assert_eq!(w.tokens(3), [1, 397, 398, 399, 400, 401, 402, 403]);
        let w = Windows::pack("t", &text, None, 8, 10, 0).unwrap();
        assert_eq!(w.tokens(1), (199..207).collect::<Vec<u32>>());
    }

    #[test]
    fn short_texts_are_refused_by_name() {
        let error = Windows::pack("a.txt, b.txt", &[5; 7], Some(1), 8, 1, 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the text (a.txt, b.txt) has 7 tokens, one window needs 8; give a longer text or a smaller window"
        );
        assert!(Windows::pack("t", &[5; 7], Some(1), 1, 1, 0).is_err());
        assert_eq!(Windows::pack("t", &[5; 20], Some(1), 8, 100, 0).unwrap().count(), 2);
    }

    proptest! {
        #[test]
        fn every_window_lies_in_the_text(n in 8usize..3000, length in 2usize..64, count in 1usize..200, seed: u64, bos: bool) {
            let text: Vec<u32> = (0..n as u32).collect();
            if let Ok(w) = Windows::pack("t", &text, bos.then_some(9), length, count, seed) {
                prop_assert!(w.count() >= 1 && w.count() <= count);
                prop_assert!(w.lengths().iter().all(|&l| l == length));
                // Held-out windows share no token with them.
                let b = usize::from(bos);
                let seen: BTreeSet<u32> = (0..w.count()).flat_map(|i| &w.tokens(i)[b..]).copied().collect();
                if let Some(held) = Windows::gaps(&text, bos.then_some(9), &w, seed, 5) {
                    prop_assert!(held.count() <= 5 && held.lengths().iter().all(|&l| l == length.min(512)));
                    prop_assert!((0..held.count()).all(|i| held.tokens(i)[b..].iter().all(|id| !seen.contains(id))));
                }
            }
        }
    }
}

//! Images as a model reads them: the tensor `pixel_values`, `[N, channels, height, width]` in f32, of a safetensors file, which
//! is mapped and handed out image by image. How pictures become such numbers is the model's own preprocessing.

use crate::Error;
use bitmill_checkpoint::{Checkpoint, Dtype};
use bitmill_models::Images;
use std::path::Path;
use std::sync::Arc;

/// The tensor of a file of images.
pub const PIXELS: &str = "pixel_values";

/// One image of a file.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    file: Arc<Checkpoint>,
    index: usize,
    /// Numbers of an image.
    size: usize,
    /// Hash of all images of the file.
    content: blake3::Hash,
}

impl Image {
    /// Row-major `[channels, height, width]`.
    pub(crate) fn pixels(&self) -> Result<Vec<f32>, Error> {
        let view = self.file.tensor(PIXELS)?;
        let bytes = &view.bytes[self.index * self.size * 4..][..self.size * 4];
        Ok(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }

    /// Adds what tells it from others.
    pub(crate) fn hash(&self, hash: &mut blake3::Hasher) {
        hash.update(self.content.as_bytes()).update(&(self.index as u64).to_le_bytes());
    }
}

/// The images of `path`, which must be such as `images` says.
pub(crate) fn open(path: &Path, images: &Images) -> Result<Vec<Image>, Error> {
    let [channels, height, width] = images.shape();
    let wanted = format!("[N, {channels}, {height}, {width}] in float32, as the model's own image processor makes it");
    let wrong = |reason: String| Error::Images { file: path.to_owned(), reason };
    let file = Checkpoint::open_file(path).map_err(|e| wrong(e.to_string()))?;
    let view = match file.tensor(PIXELS) {
        Ok(view) => view,
        Err(_) => {
            let held: Vec<&str> = file.names().take(4).collect();
            return Err(wrong(format!("there is no tensor {PIXELS} ({}); save one {wanted}", held.join(", "))));
        }
    };
    let count = match *view.shape {
        [count, ref shape @ ..] if count > 0 && *shape == images.shape() => count,
        _ => return Err(wrong(format!("{PIXELS} is {:?}; the model reads {wanted}", view.shape))),
    };
    if view.dtype != Dtype::F32 {
        return Err(wrong(format!("{PIXELS} is {:?}; the model reads {wanted}", view.dtype)));
    }
    let size = channels * height * width;
    if let Some(at) = view.first_non_finite() {
        return Err(wrong(format!("image {} of {PIXELS} holds a number that is NaN or infinite", at / size)));
    }
    let content = blake3::Hasher::new().update_rayon(view.bytes).finalize();
    let file = Arc::new(file);
    Ok((0..count).map(|index| Image { file: Arc::clone(&file), index, size, content }).collect())
}

#[cfg(test)]
mod tests {
    use crate::Windows;
    use bitmill_checkpoint::{Dtype, OutputPlan, TensorSpec};
    use bitmill_models::{Images, Window};
    use std::path::{Path, PathBuf};

    const IMAGES: Images = Images { channels: 2, size: [4, 6], patch: [2, 3] };

    /// A file of one tensor, whose bytes are `values`.
    fn file(dir: &Path, name: &str, dtype: Dtype, shape: &[usize], values: &[f32]) -> PathBuf {
        let spec = TensorSpec::new(name, dtype, shape);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).take(spec.bytes()).collect();
        let plan = OutputPlan::new(vec![spec], u64::MAX).unwrap();
        plan.create(dir).unwrap().write(name, &bytes).unwrap();
        dir.join(plan.files().next().unwrap().0)
    }

    #[test]
    fn images_are_chosen_evenly_and_known_by_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0..10 * 48).map(|i| i as f32).collect();
        let path = file(dir.path(), "pixel_values", Dtype::F32, &[10, 2, 4, 6], &values);
        let open = |count| Windows::images(&[&path], &IMAGES, count, 0).unwrap();
        let windows = open(3);
        assert_eq!((windows.count(), windows.length, windows.lengths()), (3, 5, vec![5; 3]));
        let first = |windows: &Windows, w| match windows.get(w).unwrap() {
            Window::Image(pixels) => pixels[0],
            Window::Tokens(_) => panic!("tokens"),
        };
        assert_eq!([0, 1, 2].map(|w| first(&windows, w)), [0.0, 144.0, 288.0]);
        assert_eq!(open(100).count(), 10);
        assert_eq!(open(3).fingerprint(), windows.fingerprint());
        assert_ne!(open(4).fingerprint(), windows.fingerprint());
        let twice = Windows::joined(vec![windows.clone(), open(10)]).unwrap();
        assert_eq!((twice.count(), twice.text_tokens, first(&twice, 4)), (13, 65, 48.0));
        assert_eq!(twice.sample(2).count(), 2);
        assert!(Windows::joined(vec![windows, Windows::of_tokens(vec![vec![1]])]).is_err());
    }

    #[test]
    fn what_is_no_image_is_refused_by_file() {
        let mut nan = vec![0.5f32; 96];
        nan[50] = f32::NAN;
        let plain = vec![0.5f32; 96];
        for (name, dtype, shape, values, words) in [
            ("images", Dtype::F32, &[2, 2, 4, 6][..], &plain, "no tensor pixel_values (images)"),
            (
                "pixel_values",
                Dtype::F32,
                &[2, 4, 6, 2],
                &plain,
                "pixel_values is [2, 4, 6, 2]; the model reads [N, 2, 4, 6]",
            ),
            ("pixel_values", Dtype::F32, &[2, 4, 6], &plain, "pixel_values is [2, 4, 6]"),
            ("pixel_values", Dtype::BF16, &[2, 2, 4, 6], &plain, "pixel_values is BF16"),
            ("pixel_values", Dtype::F32, &[2, 2, 4, 6], &nan, "image 1 of pixel_values holds a number that is NaN"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = file(dir.path(), name, dtype, shape, values);
            let said = Windows::images(&[&path], &IMAGES, 1, 0).unwrap_err().to_string();
            assert!(said.contains(words) && said.contains("model.safetensors"), "{words}: {said}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, "a text").unwrap();
        assert!(Windows::images(&[&path], &IMAGES, 1, 0).unwrap_err().to_string().contains("x.safetensors"));
    }
}

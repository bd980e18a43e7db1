//! Weights as a file has them, which a kernel makes wide in its cache.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Bytes of a line of the cache.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Consecutive weights.
#[derive(Debug, Clone, Copy)]
pub enum Stored<'a> {
    /// In single precision.
    F32(&'a [f32]),
    /// Bytes of bfloat16, the lower first.
    Bf16(&'a [[u8; 2]]),
}

impl<'a> Stored<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Stored::F32(w) => w.len(),
            Stored::Bf16(w) => w.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The weights from `from` on, `most` at most.
    ///
    /// # Panics
    /// Where `from` lies behind the last.
    #[must_use]
    #[inline(always)]
    pub fn part(&self, from: usize, most: usize) -> Self {
        let range = from..self.len().min(from + most);
        match *self {
            Stored::F32(w) => Stored::F32(&w[range]),
            Stored::Bf16(w) => Stored::Bf16(&w[range]),
        }
    }

    /// Has them fetched, to be read a little later. A processor foresees that by itself only within a page, and a tile is one.
    #[inline(always)]
    pub(super) fn fetch(&self) {
        #[cfg(target_arch = "x86_64")]
        {
            let (from, bytes) = match self {
                Stored::F32(w) => (w.as_ptr().cast::<i8>(), size_of_val(*w)),
                Stored::Bf16(w) => (w.as_ptr().cast::<i8>(), size_of_val(*w)),
            };
            for line in (0..bytes).step_by(LINE) {
                // SAFETY: the address is one of the slice, and fetching it changes nothing a program sees.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.add(line)) };
            }
        }
    }

    /// The numbers, which are written to `buffer` unless they lie somewhere already.
    ///
    /// # Panics
    /// Where they do not fit it.
    #[must_use]
    #[inline(always)]
    pub fn wide<'b>(&self, buffer: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match *self {
            Stored::F32(w) => w,
            Stored::Bf16(w) => {
                let wide = &mut buffer[..w.len()];
                for (wide, &bytes) in wide.iter_mut().zip(w) {
                    *wide = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
                }
                wide
            }
        }
    }
}

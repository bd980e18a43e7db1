//! Instruction sets, found at run time.
//!
//! A token exists only where the CPU has its features, so holding one is what makes calling a function compiled for them
//! sound. One row of [`Level`] names the features of a level once.

/// Proof that the CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// The token, where the features are there.
    #[must_use]
    pub fn here() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Avx2(()))
    }
}

/// What a kernel may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Level {
    /// The definition of every operation: no instruction beyond the target's own.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
}

impl Level {
    /// The fastest level of this CPU.
    #[must_use]
    pub fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = Avx2::here() {
            return Level::Avx2(token);
        }
        Level::Scalar
    }

    /// Every level of this CPU, slowest first.
    #[must_use]
    pub fn all() -> Vec<Level> {
        let mut all = vec![Level::Scalar];
        if Level::best() != Level::Scalar {
            all.push(Level::best());
        }
        all
    }
}

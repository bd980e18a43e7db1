//! Instruction sets, found at run time.
//!
//! A token exists only where the CPU has its features, so holding one is what makes calling a function compiled for them
//! sound. One row of [`Level`] names the features of a level once.

use std::sync::OnceLock;

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

/// Proof that the CPU has AVX-512 with VNNI (Cascade Lake, Zen 4 and later), and what [`Avx2`] proves.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512(Avx2);

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// The token, where the features are there.
    #[must_use]
    pub fn here() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::here().filter(|_| all).map(Avx512)
    }

    /// What it proves besides.
    #[must_use]
    pub fn avx2(self) -> Avx2 {
        self.0
    }
}

/// Proof that the CPU adds four products of bytes to a lane at once: Armv8.2 with dot products (Cortex-A76, Neoverse N1, Apple A13
/// and later).
#[cfg(target_arch = "aarch64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dot(());

#[cfg(target_arch = "aarch64")]
impl Dot {
    /// The token, where the feature is there.
    fn here() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Dot(()))
    }
}

/// Proof that the CPU multiplies matrices of two by eight bytes: Armv8.6 with i8mm (Cortex-X2, Neoverse V1
/// and N2, Apple M2 and later).
#[cfg(target_arch = "aarch64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Matrices(());

#[cfg(target_arch = "aarch64")]
impl Matrices {
    /// The token, where the features are there.
    fn here() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("i8mm").then_some(Matrices(()))
    }
}

/// Proof of NEON, which every CPU of this target has, and maybe of what multiplies bytes faster.
#[cfg(target_arch = "aarch64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neon {
    /// Dot products, where they may be used.
    pub(crate) dot: Option<Dot>,
    /// Products of matrices, where they may be used for many tokens.
    pub(crate) matrices: Option<Matrices>,
}

/// Proof that the CPU multiplies tiles of bfloat16 and of eight-bit integers (AMX: Sapphire Rapids and later), that the system
/// lets this process use their registers, and what [`Avx512`] proves.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amx(Avx512);

#[cfg(target_arch = "x86_64")]
impl Amx {
    /// The token, where the features are there and the system grants them, which it is asked for once a process.
    #[must_use]
    pub fn here() -> Option<Self> {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        Avx512::here().filter(|_| *GRANTED.get_or_init(|| has_tiles() && asks_for_tiles())).map(Amx)
    }

    /// What it proves besides.
    #[must_use]
    pub fn avx512(self) -> Avx512 {
        self.0
    }
}

/// Whether CPUID names the features of [`Amx`], which the standard library has no stable names for, and the system switches
/// their registers between threads. The CPU is known to have AVX-512.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    /// Products of bfloat16, tiles, products of eight bits.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    /// The tiles' shapes, and what is in them.
    const STATES: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: register 0 is there wherever the instruction is.
        unsafe { _xgetbv(0) }
    }
    if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & FEATURES != FEATURES {
        return false;
    }
    // SAFETY: AVX-512 is only reported where the system has switched XSAVE on.
    let states = unsafe { states() };
    states & STATES == STATES
}

/// Linux reserves the 8 KB that a thread's tiles are saved in only for processes that ask; other systems are not asked.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn asks_for_tiles() -> bool {
    /// ARCH_REQ_XCOMP_PERM of asm/prctl.h.
    const REQUEST: libc::c_long = 0x1023;
    /// The state that a tile's contents are.
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers, touches no memory of the process, and fails where the system knows it not.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn asks_for_tiles() -> bool {
    false
}

/// Proof that the CPU multiplies pairs of bfloat16 in one instruction, at twice the rate of f32: AVX-512 with BF16 (Cooper
/// Lake, Zen 4 and later). Where there are tiles too (AMX), products use them.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brain {
    avx512: Avx512,
    amx: Option<Amx>,
}

/// Never there on this target.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brain(std::convert::Infallible);

impl Brain {
    /// The token, where the features are there, for the fastest way.
    #[must_use]
    pub fn here() -> Option<Self> {
        Brain::all().pop()
    }

    /// Tokens for every way this CPU has, slowest first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let Some(avx512) = Avx512::here().filter(|_| is_x86_feature_detected!("avx512bf16")) else { return vec![] };
            let tiles = Amx::here().map(|amx| Brain { avx512, amx: Some(amx) });
            [Brain { avx512, amx: None }].into_iter().chain(tiles).collect()
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![]
    }

    /// Whether there are tiles.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn amx(self) -> Option<Amx> {
        self.amx
    }

    /// What holding the token contradicts.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn never(self) -> ! {
        match self.0 {}
    }
}

/// Proof that the CPU multiplies fours of bytes in one instruction, at twice the rate of bfloat16 and four times that of f32:
/// AVX-512 with VNNI (Cascade Lake, Zen 4 and later).
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eight(Avx512);

/// Never there on this target.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eight(std::convert::Infallible);

impl Eight {
    /// The token, where the features are there.
    #[must_use]
    pub fn here() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return Avx512::here().map(Eight);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// What holding the token contradicts.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn never(self) -> ! {
        match self.0 {}
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
    /// x86-64 with AVX-512 and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// 64-bit Arm with NEON, with or without dot products and products of matrices.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    /// x86-64 with AMX.
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
}

impl Level {
    /// The fastest level of this CPU, found once: rows ask for it one by one.
    #[must_use]
    pub fn best() -> Level {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(Level::find_best)
    }

    fn find_best() -> Level {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = Amx::here() {
            return Level::Amx(token);
        } else if let Some(token) = Avx512::here() {
            return Level::Avx512(token);
        } else if let Some(token) = Avx2::here() {
            return Level::Avx2(token);
        }
        #[cfg(target_arch = "aarch64")]
        return Level::Neon(Neon { dot: Dot::here(), matrices: Matrices::here() });
        #[cfg(not(target_arch = "aarch64"))]
        Level::Scalar
    }

    /// Every level of this CPU, slowest first.
    #[must_use]
    pub fn all() -> Vec<Level> {
        let mut all = vec![Level::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::here().map(Level::Avx2));
            all.extend(Avx512::here().map(Level::Avx512));
            all.extend(Amx::here().map(Level::Amx));
        }
        #[cfg(target_arch = "aarch64")]
        {
            all.push(Level::Neon(Neon { dot: None, matrices: None }));
            all.extend(Dot::here().map(|dot| Level::Neon(Neon { dot: Some(dot), matrices: None })));
            all.extend(Matrices::here().map(|m| Level::Neon(Neon { dot: Dot::here(), matrices: Some(m) })));
        }
        all
    }
}

/// Calls `$function`, which is `#[inline(always)]`, compiled for the instructions of `$level`.
macro_rules! at_level {
    ($level:expr, $function:path, ($($name:ident: $type:ty),*) $(-> $result:ty)?) => {
        match $level {
            $crate::Level::Scalar => $function($($name),*),
            #[cfg(target_arch = "x86_64")]
            $crate::Level::Avx2(_) => {
                #[target_feature(enable = "avx2,fma")]
                fn compiled($($name: $type),*) $(-> $result)? {
                    $function($($name),*)
                }
                // SAFETY: the level's token proves AVX2 and FMA.
                unsafe { compiled($($name),*) }
            }
            #[cfg(target_arch = "x86_64")]
            $crate::Level::Avx512(_) | $crate::Level::Amx(_) => {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn compiled($($name: $type),*) $(-> $result)? {
                    $function($($name),*)
                }
                // SAFETY: the level's token proves AVX-512 and FMA.
                unsafe { compiled($($name),*) }
            }
            // NEON is what the target is compiled for.
            #[cfg(target_arch = "aarch64")]
            $crate::Level::Neon(_) => $function($($name),*),
        }
    };
}
pub(crate) use at_level;

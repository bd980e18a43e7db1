//! The tile registers of AMX: eight, each of up to sixteen rows of 64 bytes.
//!
//! `tmm` registers cannot be operands of `asm!`, and nothing but `asm!` writes them, so they keep what they hold from one block
//! to the next on a thread; the system saves them when it takes the thread off its core. Products configure them when they
//! begin and release them at their end, some ten cycles each: a thread that has tiles in use pays for 8 KB at every switch.

use crate::level::Amx;
use std::arch::asm;
use std::marker::PhantomData;

/// Rows of a tile, and words of a row, at most.
pub(super) const SIDE: usize = 16;

/// The registers of this thread in the shapes of a product whose tiles are `DEPTH` words deep, until it is dropped: `tmm0` to
/// `tmm3` are sixteen rows of sixteen sums, `tmm4` and `tmm5` sixteen rows of `DEPTH` words of A, `tmm6` and `tmm7` `DEPTH` rows
/// of sixteen words of B. It cannot leave the thread.
#[derive(Debug)]
pub(super) struct Tiles<const DEPTH: usize>(PhantomData<*const ()>);

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl<const DEPTH: usize> Tiles<DEPTH> {
    /// Configures the registers of this thread.
    pub(super) fn configure(_: Amx) -> Self {
        const { assert!(DEPTH > 0 && DEPTH <= SIDE, "a tile that there is") };
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(4 * SIDE as u16);
        config.rows[..8].fill(SIDE as u8);
        config.row_bytes[4..6].fill(4 * DEPTH as u16);
        config.rows[6..8].fill(DEPTH as u8);
        // SAFETY: the token proves the instruction and that the system allows it; it reads the 64 bytes of `config`, which
        // describe eight tiles that palette 1 has.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags)) };
        Tiles(PhantomData)
    }
}

impl<const DEPTH: usize> Drop for Tiles<DEPTH> {
    fn drop(&mut self) {
        // SAFETY: that there is a value proves the instruction.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

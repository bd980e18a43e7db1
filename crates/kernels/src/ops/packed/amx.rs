//! Packed products with rounded activations of many tokens by AMX: `tdpbssd` multiplies sixteen tokens' inputs with sixteen
//! rows' codes, both signed, and adds four products to a 32-bit sum at a time.
//!
//! A vector of codes as AVX-512 unpacks it, four columns of sixteen rows, is a row of a tile of B, so a chunk of them is eight
//! rows, and two chunks fill a tile. Codes are centred as they are unpacked, once for all tokens, into the second cache: 32 bytes
//! of a row's chunk, 256 KB for 64 rows of 4096 columns. Tokens come as tiles of sixteen, laid out once for all strips.
//!
//! Two tiles of tokens meet two of rows. A span of them takes eight products of 16 cycles in groups of 128, and its 64 vectors of
//! sums a conversion and two multiplications each, 96 cycles on two units; in groups of 32 sixteen products half as deep, and 288
//! cycles. Which of both goes on while the other does is left to the CPU: single products between the vectors of the span before,
//! as attention has them, were a tenth slower here.

use super::super::strips::Strip;
use super::super::tiles::{SIDE, Tiles};
use super::avx512::{PAIR, code_bytes, end_of_pairs, int8_params};
use super::{CHUNK, LANES, Packed, PackedForm, ROUNDING, Rounded, SPAN, SPAN_CHUNKS, avx2, avx512};
use crate::level::Amx;
use crate::team::fill_chunks;
use std::arch::asm;
use std::arch::x86_64::*;

/// A span of sixteen tokens.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Inputs {
    values: [[i8; SPAN]; SIDE],
    scales: [f32; SIDE],
}

/// A span of sixteen rows: four columns of all of them, and the next four.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Codes([[[i8; 4 * SIDE]; CHUNK / 4]; SPAN_CHUNKS]);

/// A sum for each of sixteen tokens and rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums<T>([[T; SIDE]; SIDE]);

/// Two tiles of tokens by two of rows.
type Square<T> = [[Sums<T>; 2]; 2];

/// Activations of many tokens as tiles of A, sixteen tokens after sixteen, span by span.
#[derive(Default)]
pub(super) struct Tokens(Vec<Inputs>);

impl Tokens {
    /// Those of `x`, which meet codes of such a form; none of fewer than sixteen, which are not multiplied by tiles.
    pub(super) fn new(x: &Rounded<'_>, form: &PackedForm) -> Self {
        let (chunks, spans) = (form.chunks(), form.spans());
        let tokens = x.scales.len() / spans;
        if tokens < SIDE {
            return Tokens(Vec::new());
        }
        // Of the last tokens some may be there no more, nor all columns of the last span: they are multiplied for nothing.
        let nothing = Inputs { values: [[0; SPAN]; SIDE], scales: [0.0; SIDE] };
        let mut all = vec![nothing; tokens.div_ceil(SIDE) * spans];
        fill_chunks(&mut all, spans, ROUNDING * x.values.len(), |i, inputs| {
            let values = x.values[i * SIDE * chunks * CHUNK..].chunks_exact(chunks * CHUNK);
            let scales = x.scales[i * SIDE * spans..].chunks_exact(spans);
            for (t, (values, scales)) in values.zip(scales).enumerate().take(SIDE) {
                for (inputs, (values, scale)) in inputs.iter_mut().zip(values.chunks(SPAN).zip(scales)) {
                    inputs.values[t][..values.len()].copy_from_slice(values);
                    inputs.scales[t] = *scale;
                }
            }
        });
        Tokens(all)
    }
}

/// [`super::scalar::int8`], with `x` as tiles, too, where there are enough tokens.
pub(super) fn int8(
    token: Amx,
    w: &Packed<'_>,
    (x, tokens): (&Rounded<'_>, &Tokens),
    starts: &[i32],
    strip: &mut Strip<'_>,
) {
    if strip.tokens() < SIDE {
        // Few tokens wait for codes from memory, which are unpacked in registers there.
        return avx512::int8(token.avx512(), w, x, starts, strip);
    }
    let (mut pairs, mut last) = strip.split(end_of_pairs(strip));
    if !pairs.rows.is_empty() {
        let rows = by_parts!(w.form.bits, unpacked);
        // SAFETY: the token proves AVX-512 with VNNI, and AVX2, FMA and F16C.
        unsafe {
            let rows = rows(w, &pairs);
            // Pieces of two chunks, and of four, are made of whole tiles; so is the last of a row, whose codes end in zeros.
            if w.form.groups() == 1 || w.form.group_chunks().is_multiple_of(2) {
                strip_int8::<SIDE>(&Tiles::configure(token), w, &rows, tokens, starts, &mut pairs);
            } else {
                strip_int8::<{ CHUNK / 4 }>(&Tiles::configure(token), w, &rows, tokens, starts, &mut pairs);
            }
        }
    }
    if !last.rows.is_empty() {
        avx2::int8(token.avx512().avx2(), w, x, starts, &mut last);
    }
}

/// What all tokens share of the rows of a strip.
struct Unpacked {
    /// Centred, `[spans, pairs]`.
    codes: Vec<Codes>,
    /// [`int8_params`], `[pieces, pairs]`.
    params: Vec<(__m512, __m512)>,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn unpacked<const LOW: u32, const HIGH: u32>(w: &Packed<'_>, strip: &Strip<'_>) -> Unpacked {
    let (form, bytes) = (&w.form, 32 * (LOW + HIGH) as usize);
    let (first, pairs) = (strip.rows.start / LANES, strip.rows.len().div_ceil(PAIR));
    let mut codes = vec![Codes([[[0; 4 * SIDE]; CHUNK / 4]; SPAN_CHUNKS]); form.spans() * pairs];
    let mut params = Vec::with_capacity(form.pieces() * pairs);
    for pair in 0..pairs {
        let blocks = [w.block(first + 2 * pair), w.block(first + 2 * pair + 1)];
        for chunk in 0..form.chunks() {
            let at = chunk * blocks[0].step;
            let these = [blocks[0].chunk(at, bytes), blocks[1].chunk(at, bytes)];
            let out = &mut codes[chunk / SPAN_CHUNKS * pairs + pair].0[chunk % SPAN_CHUNKS];
            each_vector!(unpack_vector::<LOW, HIGH>(these, out));
        }
    }
    let mut chunk = 0;
    while chunk < form.chunks() {
        for pair in 0..pairs {
            let blocks = [w.block(first + 2 * pair), w.block(first + 2 * pair + 1)];
            params.push(int8_params(w, blocks, chunk / form.group_chunks()));
        }
        chunk = form.end_of_piece(chunk);
    }
    Unpacked { codes, params }
}

/// The four columns of vector `J`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack_vector<const LOW: u32, const HIGH: u32, const J: usize>(
    codes: [&[u8]; 2],
    out: &mut [[i8; 4 * SIDE]; CHUNK / 4],
) {
    let middle = _mm512_set1_epi8((1u8 << (LOW + HIGH - 1)).cast_signed());
    let centred = _mm512_sub_epi8(code_bytes::<LOW, HIGH, J>(codes), middle);
    // SAFETY: 64 bytes are there, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(out[J].as_mut_ptr().cast(), centred) };
}

/// A span of two tiles of tokens that meets two of rows.
#[derive(Clone, Copy)]
struct Place {
    span: usize,
    /// The pair of rows that comes first.
    pair: usize,
    /// The first piece of the span.
    piece: usize,
    /// Pieces of the span.
    count: usize,
}

/// Goes over the tokens, two tiles at a time, and for each over the spans, and for each over the rows: outputs of so many tokens
/// and of all rows of the strip lie in the first cache.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn strip_int8<const DEPTH: usize>(
    tiles: &Tiles<DEPTH>,
    w: &Packed<'_>,
    rows: &Unpacked,
    x: &Tokens,
    starts: &[i32],
    strip: &mut Strip<'_>,
) {
    let (form, pairs) = (&w.form, strip.rows.len().div_ceil(PAIR));
    let mut places = Vec::with_capacity(form.spans() * pairs.div_ceil(2));
    let mut piece = 0;
    for span in 0..form.spans() {
        let count = form.pieces_of(span).count();
        places.extend((0..pairs).step_by(2).map(|pair| Place { span, pair, piece, count }));
        piece += count;
    }
    let mut dots = [[[const { Sums([[0i32; SIDE]; SIDE]) }; 2]; 2]; SPAN_CHUNKS];
    let mut outputs = [[[const { Sums([[0.0f32; SIDE]; SIDE]) }; 2]; 2]; STRIP_SQUARES];
    for (token, inputs) in (0..strip.tokens()).step_by(2 * SIDE).zip(x.0.chunks(2 * form.spans())) {
        let (first, second) = inputs.split_at(form.spans());
        // Where one tile is left, it is multiplied twice.
        let sides = Sides { form, rows, pairs, inputs: [first, if second.is_empty() { first } else { second }] };
        let starts = Starts { all: starts, pieces: form.pieces(), token };
        outputs.fill([[const { Sums([[0.0; SIDE]; SIDE]) }; 2]; 2]);
        for place in &places {
            multiply(tiles, &sides, place, &mut dots);
            let add = match (place.count, w.zeros.is_empty()) {
                (1, true) => add::<1, false>,
                (1, false) => add::<1, true>,
                (2, true) => add::<2, false>,
                (2, false) => add::<2, true>,
                (3, true) => add::<3, false>,
                (3, false) => add::<3, true>,
                (_, true) => add::<SPAN_CHUNKS, false>,
                (_, false) => add::<SPAN_CHUNKS, true>,
            };
            add(&sides, place, starts, &dots, &mut outputs[place.pair / 2]);
        }
        // A token's outputs lie beside each other, those of the next a row of the matrix away.
        for t in 0..(strip.tokens() - token).min(2 * SIDE) {
            for pair in 0..pairs {
                let y = &outputs[pair / 2][t / SIDE][pair % 2].0[t % SIDE];
                strip.put(token + t, strip.rows.start + pair * PAIR, y);
            }
        }
    }
}

/// Squares of rows of a strip.
const STRIP_SQUARES: usize = super::STRIP / (2 * PAIR);

/// What is multiplied.
struct Sides<'a> {
    form: &'a PackedForm,
    rows: &'a Unpacked,
    /// Pairs of rows.
    pairs: usize,
    /// Two tiles of tokens, by spans.
    inputs: [&'a [Inputs]; 2],
}

/// The integer sums of every piece of a span.
#[inline(always)]
fn multiply<const DEPTH: usize>(
    tiles: &Tiles<DEPTH>,
    sides: &Sides<'_>,
    place: &Place,
    dots: &mut [Square<i32>; SPAN_CHUNKS],
) {
    let codes = &sides.rows.codes[place.span * sides.pairs..][..sides.pairs];
    let codes = [&codes[place.pair], &codes[(place.pair + 1).min(sides.pairs - 1)]];
    let inputs = sides.inputs.map(|inputs| &inputs[place.span]);
    let mut chunk = place.span * SPAN_CHUNKS;
    for dots in &mut dots[..place.count] {
        let end = sides.form.end_of_piece(chunk);
        begin(tiles);
        while chunk < end {
            step(tiles, inputs, codes, chunk % SPAN_CHUNKS);
            chunk += DEPTH * 4 / CHUNK;
        }
        chunk = end;
        store(tiles, dots);
    }
}

/// Adds the `N` pieces of a span to the outputs of a square.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn add<const N: usize, const ZEROS: bool>(
    sides: &Sides<'_>,
    place: &Place,
    starts: Starts<'_>,
    dots: &[Square<i32>; SPAN_CHUNKS],
    outputs: &mut Square<f32>,
) {
    for pair in 0..2 {
        let mut params = [(_mm512_setzero_ps(), _mm512_setzero_ps()); N];
        let row = (place.pair + pair).min(sides.pairs - 1);
        for (i, params) in params.iter_mut().enumerate() {
            *params = sides.rows.params[(place.piece + i) * sides.pairs + row];
        }
        for tile in 0..2 {
            for (t, input_scale) in sides.inputs[tile][place.span].scales.iter().enumerate() {
                let mut sum = _mm512_setzero_ps();
                for i in 0..N {
                    let (scale, from_middle) = params[i];
                    // SAFETY: 64 bytes are there, and the load needs no alignment.
                    let dot = unsafe { _mm512_loadu_si512(dots[i][tile][pair].0[t].as_ptr().cast()) };
                    let mut dot = _mm512_cvtepi32_ps(dot);
                    if ZEROS {
                        let start = starts.at(tile * SIDE + t, place.piece + i);
                        dot = _mm512_fmadd_ps(from_middle, _mm512_set1_ps(start as f32), dot);
                    }
                    sum = _mm512_fmadd_ps(dot, scale, sum);
                }
                let y = outputs[tile][pair].0[t].as_mut_ptr();
                // SAFETY: 64 bytes are there, and neither needs alignment.
                unsafe { _mm512_storeu_ps(y, _mm512_fmadd_ps(sum, _mm512_set1_ps(*input_scale), _mm512_loadu_ps(y))) };
            }
        }
    }
}

/// What sums start from, of the tokens from one on.
#[derive(Clone, Copy)]
struct Starts<'a> {
    all: &'a [i32],
    pieces: usize,
    token: usize,
}

impl Starts<'_> {
    /// Of a token and a piece; 0 of tokens that are not there.
    #[inline(always)]
    fn at(&self, token: usize, piece: usize) -> i32 {
        self.all.get((self.token + token) * self.pieces + piece).copied().unwrap_or(0)
    }
}

/// Sums of nothing.
#[inline(always)]
fn begin<const DEPTH: usize>(_: &Tiles<DEPTH>) {
    // SAFETY: that there are tiles proves the instructions.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// Adds the products of the columns from a chunk of the span on.
#[inline(always)]
fn step<const DEPTH: usize>(_: &Tiles<DEPTH>, inputs: [&Inputs; 2], codes: [&Codes; 2], chunk: usize) {
    assert!(chunk * CHUNK + 4 * DEPTH <= SPAN, "columns of the span");
    let a = inputs.map(|inputs| inputs.values.as_ptr().cast::<i8>().wrapping_add(chunk * CHUNK));
    let b = codes.map(|codes| codes.0[chunk..].as_ptr());
    // SAFETY: that there are tiles proves the instructions and the shapes. What is read are, of each of the inputs, sixteen rows of
    // 4 · DEPTH bytes, SPAN apart, which begin and end in those of `values`, and of each of the codes DEPTH rows of 64 bytes, 64
    // apart, from `chunk` on, all of which was checked to lie in the span.
    unsafe {
        asm!(
            "tileloadd tmm6, [{b0} + {row}]",
            "tileloadd tmm4, [{a0} + {span}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {span}]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            a0 = in(reg) a[0],
            a1 = in(reg) a[1],
            b0 = in(reg) b[0],
            b1 = in(reg) b[1],
            span = in(reg) SPAN,
            row = in(reg) 4 * SIDE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Stores the sums.
#[inline(always)]
fn store<const DEPTH: usize>(_: &Tiles<DEPTH>, dots: &mut Square<i32>) {
    let [[a, b], [c, d]] = dots.each_mut().map(|two| two.each_mut().map(|dots| dots.0.as_mut_ptr()));
    // SAFETY: that there are tiles proves the instructions; each writes sixteen rows of 64 bytes, 64 apart, which sums are.
    unsafe {
        asm!(
            "tilestored [{a} + {row}], tmm0",
            "tilestored [{b} + {row}], tmm1",
            "tilestored [{c} + {row}], tmm2",
            "tilestored [{d} + {row}], tmm3",
            a = in(reg) a,
            b = in(reg) b,
            c = in(reg) c,
            d = in(reg) d,
            row = in(reg) 4 * SIDE,
            options(nostack, preserves_flags),
        );
    }
}

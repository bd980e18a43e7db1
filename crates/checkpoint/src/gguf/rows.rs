//! The row order of queries and keys: pairs of rows that a rotation turns are neighbours in GGUF's `llama` files, and
//! half a head apart in model folders. Rows are whole, so reordering stored bytes is exact.

/// Rows of `data` from a folder's order into GGUF's: row `2i` of each head becomes what row `i` was, `2i + 1` what
/// `i + D/2` was.
#[must_use]
pub fn interleave<T: Copy>(data: &[T], rows: usize, heads: usize) -> Vec<T> {
    let (row, half) = (data.len() / rows, rows / heads / 2);
    let mut out = Vec::with_capacity(data.len());
    for head in 0..heads {
        for i in 0..2 * half {
            let from = interleaved_from(head * 2 * half + i, rows, heads);
            out.extend_from_slice(&data[from * row..(from + 1) * row]);
        }
    }
    out
}

/// The row of a folder's order that becomes `row` of `rows` in GGUF's.
#[must_use]
pub fn interleaved_from(row: usize, rows: usize, heads: usize) -> usize {
    let half = rows / heads / 2;
    let (first, i) = (row / (2 * half) * 2 * half, row % (2 * half));
    first + i / 2 + i % 2 * half
}

/// The inverse of [`interleave`], in place.
pub(crate) fn deinterleave<T: Copy>(data: &mut [T], rows: usize, heads: usize) {
    let (row, half) = (data.len() / rows, rows / heads / 2);
    let source = data.to_vec();
    for head in 0..heads {
        for i in 0..2 * half {
            let to = head * 2 * half + i / 2 + i % 2 * half;
            let from = head * 2 * half + i;
            data[to * row..(to + 1) * row].copy_from_slice(&source[from * row..(from + 1) * row]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_neighbours_and_come_apart_again() {
        // Two heads of four rows, two numbers each.
        let rows: Vec<u32> = (0..16).collect();
        let mut there = interleave(&rows, 8, 2);
        assert_eq!(there, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        deinterleave(&mut there, 8, 2);
        assert_eq!(there, rows);
    }
}

//! What the process asks of the system's allocator.

use std::alloc::{GlobalAlloc, Layout, System};

/// Has the allocator keep what is freed for the next buffer of that size instead of giving it back to the system, which clears
/// its pages anew: a tenth of a calibrated run's processor time, for a tenth more memory. Only glibc's can be told so.
pub fn keep_freed_memory() {
    /// As many as it can be told.
    const NEVER: i32 = 1 << 30;
    give_back_from(NEVER);
}

/// Has it give large buffers back all the same, since the holes that they leave hold nothing else: for models whose buffers are a
/// large part of memory, and take far longer to fill than to clear.
pub fn give_back_large_buffers() {
    const LARGE: i32 = 1 << 25;
    give_back_from(LARGE);
}

/// Bytes that the allocator takes from the system at least, so that large pages fit in; nobody pays for those that are not touched.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const AT_ONCE: i32 = 1 << 26;

/// Has buffers of so many bytes and more taken from the system, and given back.
fn give_back_from(bytes: i32) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes any parameter and value, tells by its result whether it follows them, and may be called while other
    // threads allocate.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, AT_ONCE);
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = bytes;
}

/// The system's allocator, but that buffers begin at a line of the cache: what goes through them 64 bytes at a time touches two
/// lines for each otherwise, which costs products a fourth of their time. For `#[global_allocator]`.
#[derive(Debug, Clone, Copy, Default)]
pub struct LineAllocator;

/// Bytes of a line.
const LINE: usize = 64;
/// Bytes from which on it matters.
const BUFFER: usize = 1 << 11;

/// What is asked of the system for a buffer of this layout: a line more, of which a word before the buffer tells how much was left
/// out. `None` for what is no buffer, or has an alignment of its own.
fn with_line(layout: Layout) -> Option<Layout> {
    const ANY: usize = 16;
    let is_buffer = layout.size() >= BUFFER && layout.align() <= ANY;
    // More than there can be is refused by who is asked for it as it is.
    is_buffer.then(|| Layout::from_size_align(layout.size() + LINE, ANY).ok()).flatten()
}

/// Where the buffer begins in memory that was taken for it, and that notes how much is before it.
///
/// # Safety
/// `memory` is null, or begins at a multiple of 16 bytes and has [`LINE`] of them to write to.
unsafe fn first_line(memory: *mut u8) -> *mut u8 {
    if memory.is_null() {
        return memory;
    }
    let skipped = LINE - memory as usize % LINE;
    // SAFETY: 16 to 64 bytes are left out, which are there and end at a line; the word is the last of them.
    unsafe {
        let begin = memory.add(skipped);
        begin.cast::<usize>().sub(1).write(skipped);
        begin
    }
}

/// How much is before a buffer.
///
/// # Safety
/// `begin` is what [`first_line`] returned for memory that is still taken.
unsafe fn skipped(begin: *mut u8) -> usize {
    // SAFETY: the word was written there.
    unsafe { begin.cast::<usize>().sub(1).read() }
}

// SAFETY: all memory is the system's. What it returns for a layout with a line more is passed on from the first line on, which
// leaves as many bytes as were asked for, and is found again by the word before that.
unsafe impl GlobalAlloc for LineAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of the system's allocator; a layout with a line is no smaller.
        unsafe {
            match with_line(layout) {
                Some(larger) => first_line(System.alloc(larger)),
                None => System.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`; the word that is written lies before the buffer.
        unsafe {
            match with_line(layout) {
                Some(larger) => first_line(System.alloc_zeroed(larger)),
                None => System.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, begin: *mut u8, layout: Layout) {
        // SAFETY: it was allocated here with this layout, so a buffer has its word, and the system gets back what it returned.
        unsafe {
            match with_line(layout) {
                Some(larger) => System.dealloc(begin.sub(skipped(begin)), larger),
                None => System.dealloc(begin, layout),
            }
        }
    }

    unsafe fn realloc(&self, begin: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that such a layout can be; a buffer that stays one moves with what is before it, and then to
        // its line, within memory that has room for either; what becomes one, or is one no more, is copied.
        unsafe {
            let new = Layout::from_size_align_unchecked(size, layout.align());
            match (with_line(layout), with_line(new)) {
                (None, None) => System.realloc(begin, layout, size),
                (Some(larger), Some(wanted)) => {
                    let before = skipped(begin);
                    let memory = System.realloc(begin.sub(before), larger, wanted.size());
                    if memory.is_null() {
                        return memory;
                    }
                    let after = LINE - memory as usize % LINE;
                    if after != before {
                        memory.add(before).copy_to(memory.add(after), layout.size().min(size));
                    }
                    first_line(memory)
                }
                _ => {
                    let other = self.alloc(new);
                    if !other.is_null() {
                        begin.copy_to_nonoverlapping(other, layout.size().min(size));
                        self.dealloc(begin, layout);
                    }
                    other
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_at_lines_and_keep_what_they_hold() {
        let allocator = LineAllocator;
        let sizes = [1, 24, 2000, 2047, 2048, 2049, 5000, 100_000, 3 << 20];
        for align in [1, 8, 16, 64, 4096] {
            for (from, to) in sizes.into_iter().flat_map(|from| sizes.map(|to| (from, to))) {
                let layout = |size| Layout::from_size_align(size, align).unwrap();
                // SAFETY: no layout is of no size, memory is written as far as it goes, read where it was written, and given back
                // with the layout that it has.
                unsafe {
                    let begin = allocator.alloc(layout(from));
                    (0..from).for_each(|i| begin.add(i).write((i % 251) as u8));
                    let other = allocator.alloc_zeroed(layout(to));
                    assert!((0..to).all(|i| other.add(i).read() == 0));
                    let grown = allocator.realloc(begin, layout(from), to);
                    assert!((0..from.min(to)).all(|i| grown.add(i).read() == (i % 251) as u8));
                    for (begin, size) in [(grown, to), (other, to)] {
                        assert_eq!(begin as usize % align.max(if size >= BUFFER { LINE } else { 1 }), 0);
                        (0..size).for_each(|i| begin.add(i).write(7));
                        allocator.dealloc(begin, layout(size));
                    }
                }
            }
        }
    }
}

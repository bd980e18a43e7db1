//! What the process asks of the system's allocator.

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

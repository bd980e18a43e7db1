//! What the process asks of the system's allocator.

/// Has the allocator keep what is freed for the next buffer of that size instead of giving it back to the system, which clears
/// its pages anew: a tenth of a calibrated run's processor time, for a tenth more memory. Large buffers go back all the same, since
/// holes that they leave would hold nothing else. Only glibc's can be told so.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Bytes of a buffer that is large: what is done with so many takes far longer than to clear them.
        const LARGE: libc::c_int = 1 << 25;
        // SAFETY: mallopt takes any parameter and value, tells by its result whether it follows them, and may be called while other
        // threads allocate.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}

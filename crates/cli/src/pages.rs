//! Memory in large pages.
//!
//! A calibrated run passes over buffers that no cache holds, again and again. With pages of 4 KB it misses an entry of the page
//! tables at every few lines of them, each of which a virtual machine looks up twice; with pages of 2 MB it does not. Linux gives
//! those to who asks for them, and glibc's allocator asks, for all that it takes, if it is told to before a process begins. So the
//! process begins again: only its first instant is lost, and it stays the same process to who started it.

/// Has this process begin again with an allocator that asks for large pages, where that is in question: on Linux with glibc,
/// where the system waits to be asked, and unless `GLIBC_TUNABLES` says something about them. Where it cannot, it goes on.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn ask_for_large_ones() {
    use std::os::unix::process::CommandExt;
    const VARIABLE: &str = "GLIBC_TUNABLES";
    const TUNABLE: &str = "glibc.malloc.hugetlb";
    let when = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let tunables = std::env::var(VARIABLE).unwrap_or_default();
    if !when.contains("[madvise]") || tunables.contains(TUNABLE) {
        return;
    }
    let separator = if tunables.is_empty() { "" } else { ":" };
    let mut arguments = std::env::args_os();
    let Ok(own) = std::env::current_exe() else { return };
    let mut again = std::process::Command::new(own);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    // It comes back only if it failed.
    let _ = again.args(arguments).env(VARIABLE, format!("{tunables}{separator}{TUNABLE}=1")).exec();
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn ask_for_large_ones() {}

//! Sizes and counts as people write and read them.

use std::time::Duration;

/// Parses `5GB`, `512MiB`, `1000000`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("`{unit}` is not a unit of size; write 5GB, 512MiB or a number of bytes")),
    };
    let number: f64 =
        number.parse().map_err(|_| format!("`{text}` is not a size; write 5GB, 512MiB or a number of bytes"))?;
    Ok((number * factor) as u64)
}

/// Parses a count above zero.
pub(crate) fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| format!("`{text}` is not a positive number"))
}

/// Parses a number of seconds, zero or more.
pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| format!("`{text}` is not a number of seconds"))
}

/// `1.50 GB`.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n, &["B", "kB", "MB", "GB", "TB"])
}

/// `10.5 M`.
pub(crate) fn count(n: u64) -> String {
    scaled(n, &["", "K", "M", "B", "T"])
}

fn scaled(n: u64, units: &[&str]) -> String {
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit]).trim_end().to_owned()
}

/// Memory that programs may still take without swapping, in bytes; where the system tells (Linux).
pub(crate) fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    kilobytes(&info, "MemAvailable:")
}

/// The most memory this process has held so far, in bytes; where the system tells (Linux).
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    kilobytes(&status, "VmHWM:")
}

/// The value of a line `key   123 kB`, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok().map(|kib: u64| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_write() {
        assert_eq!(parse_bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_bytes("1.5 MiB"), Ok(1_572_864));
        assert_eq!(parse_bytes("17"), Ok(17));
        assert_eq!(parse_seconds("0.25"), Ok(Duration::from_millis(250)));
        assert!(["-1", "inf", "NaN", "1s", ""].iter().all(|text| parse_seconds(text).is_err()));
        assert!(parse_bytes("5 parsecs").is_err() && parse_bytes("GB").is_err() && parse_bytes("-1").is_err());
        assert_eq!([bytes(17), bytes(10_490_000), bytes(999_999)], ["17 B", "10.5 MB", "1.00 MB"]);
        assert_eq!(count(10_490_000), "10.5 M");
    }
}

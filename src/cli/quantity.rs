//! Quantities as people type them: a bandwidth, a time.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

/// Bytes a second, never 0.
///
/// Written as a number, a prefix and a unit: `100M` and `100MB` are 100 × 10^6 bytes a second, `100MiB` is 100 × 2^20, `1Gbit` is
/// 10^9 bits a second (125 MB/s). Prefixes are `K`, `M`, `G` and `T`, in either case; `/s` may follow. A small `b`
/// alone is refused: some mean bits by it and some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth(pub NonZeroU64);

/// Text that is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// No bandwidth.
    #[error(
        "{given:?} is not a bandwidth: write bytes a second as 500K, 100M or 1G, or bits as 800Mbit or 10Gbit"
    )]
    Bandwidth {
        /// What was typed.
        given: String,
    },
    /// Bits or bytes?
    #[error("{given:?} could mean bits or bytes: write B for bytes or bit for bits")]
    BitsOrBytes {
        /// What was typed.
        given: String,
    },
    /// A bandwidth that would move nothing, or more than there is.
    #[error(
        "{given:?} is out of range: a bandwidth is at least 1000 bytes a second and below 2^63"
    )]
    BandwidthRange {
        /// What was typed.
        given: String,
    },
    /// No time.
    #[error("{given:?} is not a time: write seconds, or 500ms, 90s, 10m or 2h")]
    Time {
        /// What was typed.
        given: String,
    },
}

/// Less than this and a control message would take longer than its timeout.
const SLOWEST: f64 = 1000.0;

impl FromStr for Bandwidth {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Bandwidth, QuantityError> {
        let wrong = || QuantityError::Bandwidth {
            given: text.to_owned(),
        };
        let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
        let unit = unit.strip_suffix("/s").unwrap_or(unit);

        let (prefix, unit) = match unit.chars().next() {
            Some(prefix) if "KkMmGgTt".contains(prefix) => {
                (Some(prefix.to_ascii_uppercase()), &unit[1..])
            }
            _ => (None, unit),
        };
        let power = prefix.map_or(0, |prefix| {
            "KMGT".find(prefix).map_or(0, |at| at as i32 + 1)
        });
        let (base, bits): (f64, f64) = match unit {
            "" | "B" => (1000.0, 1.0),
            "iB" if prefix.is_some() => (1024.0, 1.0),
            "bit" => (1000.0, 8.0),
            "ibit" if prefix.is_some() => (1024.0, 8.0),
            "b" | "ib" => {
                return Err(QuantityError::BitsOrBytes {
                    given: text.to_owned(),
                });
            }
            _ => return Err(wrong()),
        };
        let bytes = number * base.powi(power) / bits;
        match NonZeroU64::new(bytes as u64) {
            Some(bytes) if (SLOWEST..i64::MAX as f64).contains(&(bytes.get() as f64)) => {
                Ok(Bandwidth(bytes))
            }
            _ => Err(QuantityError::BandwidthRange {
                given: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B/s", self.0)
    }
}

/// A time in seconds, or with a unit: `500ms`, `90s`, `10m`, `2h`; at most a hundred years.
///
/// # Errors
/// If it is anything else.
pub fn time(text: &str) -> Result<Duration, QuantityError> {
    let wrong = || QuantityError::Time {
        given: text.to_owned(),
    };
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "" | "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(wrong()),
    };
    if seconds > 100.0 * 366.0 * 86400.0 {
        return Err(wrong());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// A number, not negative, and what follows it.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((
        number
            .parse()
            .ok()
            .filter(|number: &f64| number.is_finite())?,
        unit,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_in_bytes_unless_it_says_bit() {
        for (text, bytes) in [
            ("100M", 100_000_000),
            ("100MB/s", 100_000_000),
            ("1.5G", 1_500_000_000),
            ("64k", 64_000),
            ("1MiB", 1_048_576),
            ("1Gbit", 125_000_000),
            ("10Gbit/s", 1_250_000_000),
            ("8Mibit", 1_048_576),
            ("250000", 250_000),
        ] {
            assert_eq!(
                text.parse::<Bandwidth>().expect(text).0.get(),
                bytes,
                "{text}"
            );
        }
    }

    #[test]
    fn what_could_mean_bits_or_bytes_is_refused() {
        for text in ["100Mb", "1Gb/s", "5b", "1Gib"] {
            assert!(
                matches!(
                    text.parse::<Bandwidth>(),
                    Err(QuantityError::BitsOrBytes { .. })
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn nonsense_is_no_bandwidth() {
        for text in [
            "", "M", "-1M", "1 M", "1X", "1..5M", "1Mbyte", "iB", "1iB", "NaN", "inf",
        ] {
            assert!(
                matches!(
                    text.parse::<Bandwidth>(),
                    Err(QuantityError::Bandwidth { .. })
                ),
                "{text}"
            );
        }
        for text in ["0", "0M", "999", "1bit", "99999999999999T"] {
            assert!(
                matches!(
                    text.parse::<Bandwidth>(),
                    Err(QuantityError::BandwidthRange { .. })
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn a_time_is_in_seconds_unless_it_says_otherwise() {
        for (text, ms) in [
            ("2", 2000),
            ("0.5", 500),
            ("500ms", 500),
            ("90s", 90_000),
            ("10m", 600_000),
            ("2h", 7_200_000),
        ] {
            assert_eq!(time(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "-1", "1d", "1e400", "99999999999h", "1 s"] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}

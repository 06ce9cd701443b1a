//! Durations in JSON: milliseconds as a number, exact to the microsecond.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The longest duration accepted from JSON: 10^12 ms, some 31 years.
const LONGEST_MS: f64 = 1e12;

pub(crate) fn serialize<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    (duration.as_micros() as f64 / 1000.0).serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    let ms = f64::deserialize(deserializer)?;
    if !(0.0..=LONGEST_MS).contains(&ms) {
        return Err(de::Error::custom(format_args!(
            "{ms} is not a number of milliseconds from 0 to {LONGEST_MS:e}"
        )));
    }
    Ok(Duration::from_micros((ms * 1000.0).round() as u64))
}

/// The same for a duration that may be missing.
pub(crate) mod option {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Millis(#[serde(with = "super")] Duration);

    pub(crate) fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        duration.map(Millis).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Millis>::deserialize(deserializer)?.map(|Millis(duration)| duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Times(
        #[serde(with = "super")] Duration,
        #[serde(with = "super::option")] Option<Duration>,
    );

    #[test]
    fn a_duration_survives_to_the_microsecond() {
        for micros in [0, 1, 1_499, 142_337, 86_400_000_001] {
            let times = Times(
                Duration::from_micros(micros),
                Some(Duration::from_micros(micros)),
            );
            let json = serde_json::to_string(&times).expect("serializable");
            assert_eq!(
                serde_json::from_str::<Times>(&json).expect("readable"),
                times
            );
        }
        assert_eq!(
            serde_json::to_string(&Times(Duration::from_micros(1_500), None))
                .expect("serializable"),
            "[1.5,null]"
        );
    }

    #[test]
    fn a_negative_or_endless_time_is_refused() {
        for json in ["[-1,null]", "[1e13,null]", "[0,-0.5]", "[\"1\",null]"] {
            assert!(serde_json::from_str::<Times>(json).is_err(), "{json}");
        }
    }
}

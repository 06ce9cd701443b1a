//! How page content is compressed, and the decision whether it should be.
//!
//! In: what encoding a frame cost and gained, and how fast the link takes bytes. Out: the codec for the next frame.
//! The decision reads no clock: durations are arguments.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;
use thiserror::Error;

/// How the payload of a page frame is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Codec {
    /// Not at all.
    None = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

impl Codec {
    /// The codec's number on the wire.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The codec of a number on the wire.
    pub const fn from_number(number: u8) -> Option<Codec> {
        match number {
            0 => Some(Codec::None),
            1 => Some(Codec::Lz4),
            2 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Codec::None => "none",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        })
    }
}

/// What the user asked for: `--compress auto|none|lz4|zstd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    /// Whatever moves the most raw bytes in a second, measured while moving.
    #[default]
    Auto,
    /// Always this codec.
    Always(Codec),
}

/// A text that names no compression.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("compression is one of auto, none, lz4, zstd")]
pub struct CompressionError;

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Compression, CompressionError> {
        Ok(match text {
            "auto" => Compression::Auto,
            "none" => Compression::Always(Codec::None),
            "lz4" => Compression::Always(Codec::Lz4),
            "zstd" => Compression::Always(Codec::Zstd),
            _ => return Err(CompressionError),
        })
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::Auto => f.write_str("auto"),
            Compression::Always(codec) => codec.fmt(f),
        }
    }
}

/// Chooses the codec of each frame.
///
/// With a link of `L` bytes/s, a codec of `C` raw bytes/s on one core and a ratio of `r` encoded to raw bytes, a raw
/// byte costs `1/C + r/L`; without a codec `1/L`. The sum, not the larger of the two, because encoding and QUIC's own
/// work share the cores: measured, compression pays below about 1 GB/s per core (DESIGN, section 9).
///
/// Every codec is tried once, then the cheapest is used; another codec must be a tenth cheaper to take over, so
/// that noise does not flip the choice. The ones not in use are tried again now and then, because memory changes: every
/// [`RETRY_FRAMES`] frames, and more rarely the more often a codec has lost.
///
/// [`RETRY_FRAMES`]: CodecChooser::RETRY_FRAMES
#[derive(Clone, Debug)]
pub struct CodecChooser {
    compression: Compression,
    /// Lz4, Zstd.
    codecs: [Estimate; 2],
    /// What the link takes, bytes per second; unknown until it was seen to be the bottleneck.
    link: Option<f64>,
    current: Codec,
    trying: Option<Codec>,
}

#[derive(Clone, Copy, Debug)]
struct Estimate {
    codec: Codec,
    /// Raw bytes per second and encoded/raw, once sampled.
    measured: Option<(f64, f64)>,
    /// Frames until it is tried again while not in use.
    retry_in: u32,
    /// What `retry_in` starts from after the next lost try.
    retry_after: u32,
}

/// How much of a new sample goes into an estimate.
const SMOOTHING: f64 = 0.25;
/// A codec takes over when a raw byte costs less than this share of what it costs now.
const TAKE_OVER: f64 = 0.9;
/// Before the link is known, compress what shrinks below this: 1 GB/s is where compression stops paying.
const ASSUMED_LINK: f64 = 1e9;

impl CodecChooser {
    /// Frames after which a codec not in use is tried again; doubles with every lost try, up to 16 times as long.
    pub const RETRY_FRAMES: u32 = 64;

    /// A chooser that has seen nothing yet.
    pub fn new(compression: Compression) -> CodecChooser {
        let unseen = |codec| Estimate {
            codec,
            measured: None,
            retry_in: 0,
            retry_after: CodecChooser::RETRY_FRAMES,
        };
        CodecChooser {
            compression,
            codecs: [unseen(Codec::Lz4), unseen(Codec::Zstd)],
            link: None,
            current: Codec::None,
            trying: None,
        }
    }

    /// The codec for the next frame.
    pub fn choose(&mut self) -> Codec {
        if let Compression::Always(codec) = self.compression {
            return codec;
        }
        let current = self.current;
        for estimate in &mut self.codecs {
            if estimate.codec != current {
                estimate.retry_in = estimate.retry_in.saturating_sub(1);
            }
        }
        self.trying = self
            .codecs
            .iter()
            .find(|e| e.codec != current && e.retry_in == 0)
            .map(|e| e.codec);
        self.trying.unwrap_or(current)
    }

    /// A frame of `raw_len` bytes became `encoded_len` with `codec`, which worked for `time`.
    ///
    /// `codec` is the one that [`CodecChooser::choose`] gave, also when the frame was sent as it is because the codec
    /// did not shrink it (`encoded_len` is then `raw_len`). Frames without data say nothing and are ignored.
    pub fn encoded(&mut self, codec: Codec, raw_len: usize, encoded_len: usize, time: Duration) {
        let Some(estimate) = self.codecs.iter_mut().find(|e| e.codec == codec) else {
            return;
        };
        if raw_len == 0 {
            return;
        }
        let speed = raw_len as f64 / time.as_secs_f64().max(1e-9);
        let ratio = encoded_len as f64 / raw_len as f64;
        let tried = self.trying.take() == Some(codec);
        estimate.measured = Some(match estimate.measured {
            // A try is the first look after a long time: what was seen before no longer counts.
            Some((old_speed, old_ratio)) if !tried => (
                old_speed + SMOOTHING * (speed - old_speed),
                old_ratio + SMOOTHING * (ratio - old_ratio),
            ),
            _ => (speed, ratio),
        });
        self.decide();
        for estimate in &mut self.codecs {
            if estimate.codec == self.current {
                estimate.retry_after = CodecChooser::RETRY_FRAMES;
            } else if tried && estimate.codec == codec {
                estimate.retry_in = estimate.retry_after;
                estimate.retry_after =
                    (estimate.retry_after * 2).min(16 * CodecChooser::RETRY_FRAMES);
            }
        }
    }

    /// The link took `bytes` encoded bytes in `time`.
    ///
    /// Only intervals in which the sender waited for the link count; otherwise the figure would say how fast pages
    /// were produced, and a slow codec would keep itself in use.
    pub fn link_took(&mut self, bytes: u64, time: Duration) {
        if bytes == 0 || time.is_zero() {
            return;
        }
        let speed = bytes as f64 / time.as_secs_f64();
        self.link = Some(match self.link {
            Some(old) => old + SMOOTHING * (speed - old),
            None => speed,
        });
        self.decide();
    }

    /// The codec in use when nothing is being tried; for reports.
    pub fn current(&self) -> Codec {
        match self.compression {
            Compression::Auto => self.current,
            Compression::Always(codec) => codec,
        }
    }

    fn decide(&mut self) {
        let now = self.cost(self.current).unwrap_or(f64::INFINITY);
        let best = [Codec::None, Codec::Lz4, Codec::Zstd]
            .into_iter()
            .filter_map(|codec| Some((codec, self.cost(codec)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1));
        let Some((codec, cost)) = best else { return };
        // Going back to raw pages costs nothing to be wrong about, so it needs no margin.
        let margin = if codec == Codec::None { 1.0 } else { TAKE_OVER };
        if cost < margin * now {
            self.current = codec;
        }
    }

    /// Seconds per raw byte.
    fn cost(&self, codec: Codec) -> Option<f64> {
        let link = self.link.unwrap_or(ASSUMED_LINK);
        if codec == Codec::None {
            return Some(1.0 / link);
        }
        let (speed, ratio) = self.codecs.iter().find(|e| e.codec == codec)?.measured?;
        Some(1.0 / speed + ratio / link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 1 << 20;

    /// What a codec does to the memory of a test.
    #[derive(Clone, Copy)]
    struct Memory {
        lz4: (f64, f64),
        zstd: (f64, f64),
    }

    const HEAP: Memory = Memory {
        lz4: (1.6e9, 0.25),
        zstd: (1.1e9, 0.14),
    };
    const RANDOM: Memory = Memory {
        lz4: (11e9, 1.0),
        zstd: (3e9, 1.0),
    };

    /// Runs `frames` frames and counts which codec each was given: none, lz4, zstd.
    fn run(chooser: &mut CodecChooser, memory: Memory, link: f64, frames: u32) -> [u32; 3] {
        let mut used = [0; 3];
        for _ in 0..frames {
            let codec = chooser.choose();
            used[usize::from(codec.number())] += 1;
            let (speed, ratio) = match codec {
                Codec::None => (f64::INFINITY, 1.0),
                Codec::Lz4 => memory.lz4,
                Codec::Zstd => memory.zstd,
            };
            let encoded = (FRAME as f64 * ratio) as usize;
            let time = Duration::from_secs_f64(FRAME as f64 / speed);
            chooser.encoded(codec, FRAME, encoded, time);
            chooser.link_took(
                encoded as u64,
                Duration::from_secs_f64(encoded as f64 / link),
            );
        }
        used
    }

    #[test]
    fn a_slow_link_is_given_the_strongest_codec() {
        let mut chooser = CodecChooser::new(Compression::Auto);
        run(&mut chooser, HEAP, 100e6, 100);
        assert_eq!(chooser.current(), Codec::Zstd);
    }

    #[test]
    fn a_link_faster_than_the_codecs_gets_raw_pages() {
        let mut chooser = CodecChooser::new(Compression::Auto);
        run(&mut chooser, HEAP, 4e9, 100);
        assert_eq!(chooser.current(), Codec::None);
        let used = run(&mut chooser, HEAP, 4e9, 1000);
        assert!(used[0] > 950, "tries must be rare: {used:?}");
    }

    #[test]
    fn memory_that_does_not_shrink_is_sent_as_it_is_on_any_link() {
        for link in [10e6, 1e9, 10e9] {
            let mut chooser = CodecChooser::new(Compression::Auto);
            run(&mut chooser, RANDOM, link, 200);
            assert_eq!(chooser.current(), Codec::None, "at {link} B/s");
        }
    }

    #[test]
    fn a_change_of_the_memory_is_noticed() {
        let mut chooser = CodecChooser::new(Compression::Auto);
        run(&mut chooser, RANDOM, 100e6, 3000);
        assert_eq!(chooser.current(), Codec::None);
        run(
            &mut chooser,
            HEAP,
            100e6,
            16 * CodecChooser::RETRY_FRAMES + 50,
        );
        assert_eq!(chooser.current(), Codec::Zstd);
        run(&mut chooser, RANDOM, 100e6, 50);
        assert_eq!(chooser.current(), Codec::None);
    }

    #[test]
    fn what_the_user_asks_for_is_always_used() {
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
            let mut chooser = CodecChooser::new(Compression::Always(codec));
            let used = run(&mut chooser, RANDOM, 1e9, 50);
            assert_eq!(used[usize::from(codec.number())], 50);
        }
    }

    #[test]
    fn frames_of_zeros_teach_nothing() {
        let mut chooser = CodecChooser::new(Compression::Auto);
        let codec = chooser.choose();
        chooser.encoded(codec, 0, 0, Duration::ZERO);
        assert_eq!(chooser.choose(), codec, "the codec is still to be tried");
    }

    #[test]
    fn a_compression_reads_as_it_is_written() {
        for text in ["auto", "none", "lz4", "zstd"] {
            let compression: Compression = text.parse().expect("a compression");
            assert_eq!(compression.to_string(), text);
        }
        assert_eq!("gzip".parse::<Compression>(), Err(CompressionError));
    }
}

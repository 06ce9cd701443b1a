//! What CRIU says of a dump of its own: the file `stats-dump` in its work directory.
//!
//! Two magic numbers, a length and a protobuf message (CRIU's images/stats.proto, criu/include/magic.h).

use std::path::Path;

use anyhow::{Context, Result, ensure};
use prost::Message;

const IMG_SERVICE_MAGIC: u32 = 0x5510_5940;
const STATS_MAGIC: u32 = 0x5709_3306;

/// The part of `dump_stats_entry` that is wanted.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct DumpStatistics {
    /// From the order to freeze until all tasks stood still, in microseconds.
    #[prost(uint32, required, tag = "1")]
    pub freezing_time: u32,
    /// How long they stood still after that, in microseconds. Of a last dump only until they were dumped.
    #[prost(uint32, required, tag = "2")]
    pub frozen_time: u32,
    /// Pages in the images of this dump.
    #[prost(uint64, required, tag = "7")]
    pub pages_written: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatistics>,
}

/// Reads the statistics of the dump whose work directory this is.
pub fn read(work: &Path) -> Result<DumpStatistics> {
    let file = work.join("stats-dump");
    let bytes = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    parse(&bytes).with_context(|| format!("in {}", file.display()))
}

fn parse(bytes: &[u8]) -> Result<DumpStatistics> {
    let word = |index: usize| {
        let word = bytes.get(index * 4..)?.first_chunk()?;
        Some(u32::from_le_bytes(*word))
    };
    ensure!(
        (word(0), word(1)) == (Some(IMG_SERVICE_MAGIC), Some(STATS_MAGIC)),
        "these are no statistics of CRIU"
    );
    let length = word(2).context("no length")? as usize;
    let message = bytes[12..].get(..length).context("cut short")?;
    StatsEntry::decode(message)?
        .dump
        .context("these are not statistics of a dump")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_as_criu_writes_them() {
        let dump = DumpStatistics {
            freezing_time: 103,
            frozen_time: 40_125,
            pages_written: 32_901,
        };
        let message = StatsEntry { dump: Some(dump) }.encode_to_vec();
        let mut file = Vec::new();
        for word in [IMG_SERVICE_MAGIC, STATS_MAGIC, message.len() as u32] {
            file.extend(word.to_le_bytes());
        }
        file.extend(message);
        assert_eq!(parse(&file).expect("statistics"), dump);
        file.pop();
        assert!(parse(&file).is_err());
        assert!(parse(b"short").is_err());
    }
}

//! What the fuzz targets share: where their first inputs come from.
//!
//! A target makes its seeds by the product's own encoders, so they follow every change of the format and no binary
//! files are kept. `scripts/fuzz` names the directory in `FUZZ_SEED_DIR`.

use std::path::Path;
use std::{env, fs};

/// Writes `seeds` where libFuzzer will look for them, if the caller asked for that.
///
/// # Panics
///
/// If they cannot be written: fuzzing from nothing would find little and look like success.
pub fn write_seeds(seeds: impl IntoIterator<Item = Vec<u8>>) {
    let Some(dir) = env::var_os("FUZZ_SEED_DIR") else {
        return;
    };
    for (number, seed) in seeds.into_iter().enumerate() {
        let path = Path::new(&dir).join(format!("seed-{number}"));
        fs::write(&path, seed).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    }
}

//! A benchmark on kernels that this machine does not run: `bench` itself is taken into each guest, and what it measured there
//! is added to the results here. Guests are emulated: ratios hold there, times do not.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rig::{Guest, Job, KERNELS};

use crate::record::commit;
use crate::{predump, trackers};

/// What to run in the guests.
#[derive(clap::Args)]
pub struct Arguments {
    /// Directory whose <BENCHMARK>.jsonl the results are added to.
    #[arg(long)]
    results: PathBuf,
    /// Directory that the benchmark needs beside `bench` and `migrate`; below the repository.
    #[arg(long)]
    with: Vec<PathBuf>,
    /// Memory of a guest in MiB.
    #[arg(long, default_value_t = 3072)]
    guest_memory: u32,
    /// When a guest is killed, in minutes.
    #[arg(long, default_value_t = 45)]
    limit: u64,
    /// The benchmark, a subcommand of `bench`, and its arguments. Its results have to go to /job/out/<BENCHMARK>.jsonl.
    #[arg(last = true, required = true)]
    benchmark: Vec<String>,
}

/// Runs the benchmark in a guest of each kernel, one after another. Returns whether it succeeded in all.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let name = arguments.benchmark.first().context("no benchmark")?;
    let bench = std::env::current_exe().context("finding this program's own file")?;
    let migrate = bench.with_file_name("migrate");
    std::fs::create_dir_all(&arguments.results)
        .with_context(|| format!("creating {}", arguments.results.display()))?;
    let results = arguments.results.join(format!("{name}.jsonl"));
    // Where tracked programs come from, for a benchmark that has some.
    let programs = arguments
        .with
        .first()
        .map(|directory| directory.canonicalize());
    let programs = programs.transpose()?.unwrap_or_default();
    let mut succeeded = true;
    for kernel in KERNELS {
        let script = format!(
            "export MIGRATE_COMMIT={} MIGRATE_TEST_PROGRAMS={} MIGRATE_TEST_SLOWNESS=10\n{} {}",
            commit()?,
            programs.display(),
            bench.display(),
            arguments.benchmark.join(" ")
        );
        let job = Job::new(&script)?;
        job.program(&bench)?;
        job.program(&migrate)?;
        for directory in &arguments.with {
            job.directory(&directory.canonicalize()?)?;
        }
        let mut guest = Guest::new(kernel);
        guest.memory_mib = arguments.guest_memory;
        // On one processor the engine's work would stand in the container's way and look like a freeze.
        guest.cpus = 2;
        guest.limit = Duration::from_secs(60 * arguments.limit);
        eprintln!("{name} in a {kernel} guest");
        match guest.run(job) {
            Ok(finished) => {
                eprintln!("{}", finished.output);
                append(&results, &finished.file(&format!("{name}.jsonl"))?)?;
            }
            Err(error) => {
                eprintln!("{error:?}");
                succeeded = false;
            }
        }
    }
    let table = match name.as_str() {
        "trackers" => trackers::table(&results)?,
        "predump" => predump::table(&results)?,
        _ => return Ok(succeeded),
    };
    let page = results.with_extension("md");
    std::fs::write(&page, &table).with_context(|| format!("writing {}", page.display()))?;
    println!("\n{table}");
    Ok(succeeded)
}

fn append(results: &Path, lines: &str) -> Result<()> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(results)
        .and_then(|mut file| file.write_all(lines.as_bytes()))
        .with_context(|| format!("adding to {}", results.display()))
}

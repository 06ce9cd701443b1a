//! The `migrate` program: arguments to library to exit code, and nothing else.

use std::process::ExitCode;

use migrate::cli::{self, Exit, Stop};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os()) {
        Ok(plan) => cli::run(plan).unwrap_or_else(|error| {
            eprintln!("migrate: {error:#}");
            Exit::Internal.into()
        }),
        Err(Stop::Told(text)) => {
            print!("{text}");
            Exit::Done.into()
        }
        Err(Stop::Wrong(said)) => {
            eprintln!("migrate: {said}");
            Exit::Usage.into()
        }
    }
}

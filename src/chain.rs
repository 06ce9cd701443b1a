//! An error and what caused it, on one line.

use std::error::Error;

/// The error's own text and that of each cause, joined by colons.
pub(crate) fn one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

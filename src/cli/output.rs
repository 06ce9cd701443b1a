//! Where the events of a migration go: a terminal, a pipe, or a program that reads JSON.

use std::io::{self, Write};

use super::progress::{Shown, show};
use crate::migration::event::TimedEvent;

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    Json,
    /// Lines for people.
    Lines,
    /// Lines for people, and one below them that passes.
    Terminal {
        /// Columns.
        width: usize,
    },
}

/// Writes events as they come.
#[derive(Debug)]
pub struct Output<W> {
    to: W,
    format: Format,
    /// A passing line stands on the terminal.
    passing: bool,
}

/// Takes the cursor to the first column and clears the line (ECMA-48 EL).
const CLEAR_LINE: &str = "\r\x1b[K";

impl<W: Write> Output<W> {
    /// Writes to `to`.
    pub fn new(to: W, format: Format) -> Output<W> {
        Output {
            to,
            format,
            passing: false,
        }
    }

    /// Writes an event and flushes.
    ///
    /// # Errors
    /// If it cannot be written; a reader that went away is [`io::ErrorKind::BrokenPipe`].
    pub fn event(&mut self, event: &TimedEvent) -> io::Result<()> {
        let width = match self.format {
            Format::Json => {
                serde_json::to_writer(&mut self.to, event)?;
                self.to.write_all(b"\n")?;
                return self.to.flush();
            }
            Format::Lines => None,
            Format::Terminal { width } => Some(width),
        };
        for shown in show(event, width) {
            if std::mem::take(&mut self.passing) {
                self.to.write_all(CLEAR_LINE.as_bytes())?;
            }
            match shown {
                Shown::Line(line) => writeln!(self.to, "{line}")?,
                Shown::Passing(line) => {
                    self.to.write_all(line.as_bytes())?;
                    self.passing = true;
                }
            }
        }
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::event::{Event, examples::examples};

    fn written(format: Format) -> String {
        let mut output = Output::new(Vec::new(), format);
        for event in examples() {
            output.event(&event).expect("a vector takes everything");
        }
        String::from_utf8(output.to).expect("text")
    }

    #[test]
    fn json_is_one_event_a_line_and_nothing_else() {
        let text = written(Format::Json);
        assert_eq!(text.lines().count(), examples().len());
        for (line, event) in text.lines().zip(examples()) {
            assert_eq!(serde_json::from_str::<TimedEvent>(line).expect(line), event);
        }
    }

    #[test]
    fn a_pipe_gets_no_control_characters() {
        let text = written(Format::Lines);
        assert!(
            text.chars().all(|c| c == '\n' || !c.is_control()),
            "{text:?}"
        );
        assert!(text.contains("web runs at 10.0.0.2:7070\n"));
    }

    #[test]
    fn a_passing_line_is_cleared_before_the_next() {
        let mut output = Output::new(Vec::new(), Format::Terminal { width: 80 });
        for event in examples() {
            if matches!(
                event.event,
                Event::RoundStarted { .. } | Event::RoundProgress { .. } | Event::RoundFinished(_)
            ) {
                output.event(&event).expect("a vector takes everything");
            }
        }
        let text = String::from_utf8(output.to).expect("text");
        assert_eq!(text.matches(CLEAR_LINE).count(), 2, "{text:?}");
        let last = text.rsplit(CLEAR_LINE).next().expect("some text");
        assert!(
            last.starts_with("round 1: 2.0 GiB in") && last.ends_with('\n'),
            "{last:?}"
        );
    }
}

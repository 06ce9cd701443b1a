//! Text written by a peer for a person to read.

use serde::{Deserialize, Serialize};
use std::fmt;

/// One line of text from a peer, safe to print on a terminal and to log.
///
/// At most [`PeerText::MAX_LEN`] bytes. Control characters, and the invisible ones that reorder or hide text, are
/// replaced by `?`: text never fails a message, it only loses what could deceive.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct PeerText(String);

impl PeerText {
    /// The longest text, in bytes; what is longer is cut.
    pub const MAX_LEN: usize = 512;

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn deceives(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

impl From<&str> for PeerText {
    fn from(text: &str) -> PeerText {
        let mut clean = String::new();
        for c in text.chars() {
            let c = if deceives(c) { '?' } else { c };
            if clean.len() + c.len_utf8() > PeerText::MAX_LEN {
                break;
            }
            clean.push(c);
        }
        PeerText(clean)
    }
}

impl From<String> for PeerText {
    fn from(text: String) -> PeerText {
        PeerText::from(text.as_str())
    }
}

impl From<PeerText> for String {
    fn from(text: PeerText) -> String {
        text.0
    }
}

impl fmt::Display for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_drive_the_terminal_or_flood_it() {
        let text = PeerText::from("memory\x1b[2J short\r\n\u{202e}");
        assert_eq!(text.as_str(), "memory?[2J short???");
        let long = PeerText::from("ä".repeat(600));
        assert_eq!(long.as_str().len(), 512);
        let odd = PeerText::from(format!("a{}", "ä".repeat(600)));
        assert_eq!(odd.as_str().len(), 511);
    }
}

//! The options the engine gives CRIU, as the text of its configuration file.
//!
//! A runtime passes its own options over CRIU's RPC; a configuration file named there is parsed afterwards and wins
//! (criu/cr-service.c, `setup_opts_from_req`). One `option value` a line; an option with an *optional* argument needs
//! `=`, with a space it is silently ignored.

use crate::source::burden::MOST_DELETED;
use std::path::Path;

/// How CRIU keeps packets away from sockets while it dumps them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkLock {
    /// No lock: right when no TCP connection is established (about 1 ms).
    Skip,
    /// An nftables table for the time of the dump (about 14 ms). Packets in flight between two ends of one
    /// container's loopback would otherwise reach one end after it was dumped and leave the other before.
    Nftables,
}

/// What a dump or restore is told.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The action script: see [`super::hook`].
    pub hook: &'a Path,
    /// At a dump: how sockets are kept still. A restore takes it from the images.
    pub network_lock: Option<NetworkLock>,
    /// At a restore: memory comes through userfaultfd.
    pub lazy_pages: bool,
}

impl Options<'_> {
    /// The file read after the runtime's own options, which it overrides.
    pub fn text(&self) -> String {
        // Runtimes put tasks into cgroups themselves; CRIU's own walk of all controllers takes 7–24 ms of the freeze.
        let mut text = String::from("manage-cgroups=ignore\n");
        text.push_str("tcp-established\n");
        text.push_str("file-locks\n");
        // Deleted but open files travel inside the images; how long that takes is looked at before the freeze.
        text.push_str(&format!("ghost-limit {}M\n", MOST_DELETED >> 20));
        text.push_str("link-remap\n");
        if self.lazy_pages {
            text.push_str("lazy-pages\n");
        }
        text
    }

    /// The file read when CRIU starts, named by `CRIU_CONFIG_FILE`.
    ///
    /// What no runtime sets and CRIU 4.1 cannot be told later: it reads the other file twice and then runs the script
    /// twice at each point, and a network lock there crashes it (criu/config.c looks at arguments it does not have).
    pub fn early_text(&self) -> String {
        let mut text = format!("action-script {}\n", self.hook.display());
        text.push_str(match self.network_lock {
            Some(NetworkLock::Skip) => "network-lock skip\n",
            Some(NetworkLock::Nftables) => "network-lock nftables\n",
            None => "",
        });
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_with_an_optional_argument_is_written_with_an_equals_sign() {
        let options = Options {
            hook: Path::new("/run/h"),
            network_lock: Some(NetworkLock::Skip),
            lazy_pages: true,
        };
        assert!(options.text().contains("manage-cgroups=ignore\n"));
        assert!(options.text().ends_with("lazy-pages\n"));
        assert_eq!(
            options.early_text(),
            "action-script /run/h\nnetwork-lock skip\n"
        );
    }
}

//! Names: of a migration, of a target's journal, of a container and of a peer's address.
//!
//! All of them come from outside (a peer, a file, the command line) and end up in paths, so each is checked
//! once, here, and is safe afterwards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One attempt to move one container. 128 random bits, so that an identifier is never used twice and a
/// stranger cannot guess one; written as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MigrationId(u128);

/// One journal directory of a target, chosen when the directory is made. A target that answers under
/// another `JournalId` than it prepared under has lost its records, and its "never heard of it" proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct JournalId(u128);

/// Text that is not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an identifier is 32 hexadecimal digits, not {given:?}")]
pub struct ParseIdError {
    /// What was given, cut to 64 characters.
    pub given: String,
}

macro_rules! id_of_128_bits {
    ($name:ident) => {
        impl $name {
            /// The identifier made of these bytes. The caller brings the randomness (`getrandom(2)`).
            pub const fn from_bytes(bytes: [u8; 16]) -> $name {
                $name(u128::from_be_bytes(bytes))
            }

            /// The same bytes again, for the wire.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<$name, ParseIdError> {
                parse_128_bits(text).map($name)
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<$name, ParseIdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

id_of_128_bits!(MigrationId);
id_of_128_bits!(JournalId);

/// A container's name as the runtime knows it: letters, digits, `_ + - .`, the rule of runc 1.1
/// (`libcontainer/factory_linux.go`, `idRegex`), at most 255 bytes, and neither `.` nor `..`. So it is always one
/// ordinary path component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ContainerId(String);

/// Text that cannot be a container's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a container id has 1 to 255 letters, digits or any of _ + - . (not {given:?})")]
pub struct ContainerIdError {
    /// What was given, cut to 64 characters.
    pub given: String,
}

impl ContainerId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = ContainerIdError;

    fn from_str(text: &str) -> Result<ContainerId, ContainerIdError> {
        let known = |b: u8| b.is_ascii_alphanumeric() || b"_+-.".contains(&b);
        if text.is_empty()
            || text.len() > 255
            || text == "."
            || text == ".."
            || !text.bytes().all(known)
        {
            return Err(ContainerIdError { given: cut(text) });
        }
        Ok(ContainerId(text.to_owned()))
    }
}

impl TryFrom<String> for ContainerId {
    type Error = ContainerIdError;

    fn try_from(text: String) -> Result<ContainerId, ContainerIdError> {
        text.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Where a target's agent listens: a host name or address, and a port. Written `host:port`, with an IPv6
/// address in brackets: `[2001:db8::1]:7070`. Names are looked up when connecting, not here.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PeerAddress {
    host: String,
    port: u16,
}

/// Text that is not `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerAddressError {
    /// No port is given.
    #[error("{given:?} has no port: write HOST:PORT, for example {given}:7070")]
    NoPort {
        /// What was given, cut to 64 characters.
        given: String,
    },
    /// The port is no number from 1 to 65535.
    #[error("{given:?} is not a port: it is a number from 1 to 65535")]
    Port {
        /// The text in the port's place, cut to 64 characters.
        given: String,
    },
    /// The host part is empty, has characters no host name has, or is an IPv6 address without brackets.
    #[error(
        "{given:?} is not a host name or address (an IPv6 address goes in brackets: [::1]:7070)"
    )]
    Host {
        /// The text in the host's place, cut to 64 characters.
        given: String,
    },
}

impl PeerAddress {
    /// The host name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The UDP port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for PeerAddress {
    type Err = PeerAddressError;

    fn from_str(text: &str) -> Result<PeerAddress, PeerAddressError> {
        let bad_host = |host: &str| PeerAddressError::Host { given: cut(host) };
        let no_port = || PeerAddressError::NoPort { given: cut(text) };

        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(|| bad_host(text))?;
            host.parse::<std::net::Ipv6Addr>()
                .map_err(|_| bad_host(host))?;
            (host, rest.strip_prefix(':').ok_or_else(no_port)?)
        } else {
            let (host, port) = text.rsplit_once(':').ok_or_else(no_port)?;
            let known = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if host.is_empty() || host.len() > 253 || !host.bytes().all(known) {
                return Err(bad_host(host));
            }
            (host, port)
        };
        match port.parse::<u16>() {
            Ok(number) if number != 0 && port.bytes().all(|b| b.is_ascii_digit()) => {
                Ok(PeerAddress {
                    host: host.to_owned(),
                    port: number,
                })
            }
            _ => Err(PeerAddressError::Port { given: cut(port) }),
        }
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = PeerAddressError;

    fn try_from(text: String) -> Result<PeerAddress, PeerAddressError> {
        text.parse()
    }
}

impl From<PeerAddress> for String {
    fn from(address: PeerAddress) -> String {
        address.to_string()
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn parse_128_bits(text: &str) -> Result<u128, ParseIdError> {
    let refused = || ParseIdError { given: cut(text) };
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(refused());
    }
    u128::from_str_radix(text, 16).map_err(|_| refused())
}

/// At most 64 characters of what a stranger sent, so that an error stays one short line.
fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_being_written_and_read() {
        let id = MigrationId::from_bytes([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0e0f");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(MigrationId::from_bytes(id.to_bytes()), id);
        let json = serde_json::to_string(&id).expect("an id is serializable");
        assert_eq!(
            serde_json::from_str::<MigrationId>(&json).expect("and readable"),
            id
        );
    }

    #[test]
    fn text_of_another_length_or_alphabet_is_no_id() {
        for text in [
            "",
            "0",
            "+00102030405060708090a0b0c0d0e0f",
            "g00102030405060708090a0b0c0d0e0f",
            &"0".repeat(33),
        ] {
            assert!(
                text.parse::<MigrationId>().is_err(),
                "{text:?} was taken for an id"
            );
        }
    }

    #[test]
    fn a_container_id_is_one_ordinary_path_component() {
        for good in ["web", "a.b-c_d+1", "..a"] {
            assert_eq!(good.parse::<ContainerId>().expect(good).as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(256),
        ] {
            assert!(
                bad.parse::<ContainerId>().is_err(),
                "{bad:?} was taken for a container id"
            );
        }
    }

    #[test]
    fn an_address_survives_being_written_and_read() {
        for text in ["10.0.0.2:7070", "host-b.example:1", "[2001:db8::1]:65535"] {
            assert_eq!(text.parse::<PeerAddress>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn an_address_without_host_or_port_is_refused_with_the_reason() {
        assert!(matches!(
            "host".parse::<PeerAddress>(),
            Err(PeerAddressError::NoPort { .. })
        ));
        assert!(matches!(
            "[::1]".parse::<PeerAddress>(),
            Err(PeerAddressError::NoPort { .. })
        ));
        for text in ["host:0", "host:65536", "host:", "host:+80", "[::1]:x"] {
            assert!(
                matches!(
                    text.parse::<PeerAddress>(),
                    Err(PeerAddressError::Port { .. })
                ),
                "{text}"
            );
        }
        for text in [
            ":7070",
            "::1:7070",
            "a/b:7070",
            "[::1:7070",
            "[nonsense]:7070",
        ] {
            assert!(
                matches!(
                    text.parse::<PeerAddress>(),
                    Err(PeerAddressError::Host { .. })
                ),
                "{text}"
            );
        }
    }
}

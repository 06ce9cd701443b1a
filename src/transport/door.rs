//! Who may begin a handshake: what strangers can cost is bounded before anything is spent on them.
//!
//! In goes where a first packet comes from and whether that address has been proven, out comes what to do with it. A handshake
//! costs memory and signatures; a Retry costs one packet, and proves that the sender is where it says. So while there is little to
//! do everybody may begin at once; when there is more, only who has proven its address; and of one address only so many, so that
//! no host takes the place of all others. What is not let in hears nothing and asks again, as after a lost packet.
//!
//! ```text
//!  first packet ─▶ quiet? ── yes ───────────────────────────▶ handshake ─▶ ok
//!                    │ no                                        │
//!                    └─▶ address proven? ─ no ─▶ Retry           └▶ failed: counts against the address for a while
//!                            │ yes
//!                            └─▶ room, for all and for it? ─ no ─▶ nothing
//! ```

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Handshakes under way from which on an address must be proven.
pub(super) const QUIET: usize = 8;

/// Handshakes under way at once.
const MOST: usize = 256;

/// Handshakes under way at once, and failed ones within [`MEMORY`], of one address.
pub(super) const MOST_OF_ONE: usize = 16;

/// How long a failed handshake counts against its address.
const MEMORY: Duration = Duration::from_secs(10);

/// Addresses that are remembered. When there are more the ones without a handshake under way are forgotten.
const ADDRESSES: usize = 4096;

/// What to do with a first packet.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Begin the handshake, and keep this as long as it goes on.
    Begin(Guest),
    /// Let it prove its address first.
    Prove,
    /// Do nothing.
    Ignore,
}

/// Keeps count of the handshakes of a listener.
#[derive(Debug, Default)]
pub(super) struct Door(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    under_way: usize,
    of_one: HashMap<IpAddr, Account>,
}

/// One address.
#[derive(Debug, Default)]
struct Account {
    under_way: usize,
    failed: usize,
    /// When the last of them failed.
    last: Option<Instant>,
}

/// A handshake under way. Dropping it ends it, and counts it as failed if its address was proven.
#[derive(Debug)]
pub(super) struct Guest {
    door: Arc<Door>,
    address: IpAddr,
    /// It has a place in the account of its address.
    counted: bool,
    failed: bool,
}

impl Door {
    /// What to do with a first packet from `from` now, of which the address is `proven` or could be anybody's.
    pub(super) fn knock(self: &Arc<Self>, from: SocketAddr, proven: bool, now: Instant) -> Verdict {
        let address = network_of(from.ip());
        let mut books = self.books();
        let failed = books.failed(address, now);
        if !proven && (books.under_way >= QUIET || failed > 0) {
            return Verdict::Prove;
        }
        if books.under_way >= MOST {
            return Verdict::Ignore;
        }
        // What was never proven counts against no address: it could be written by anybody who wants another kept out.
        if proven {
            let account = books.of_one.entry(address).or_default();
            if account.under_way + account.failed >= MOST_OF_ONE {
                return Verdict::Ignore;
            }
            account.under_way += 1;
        }
        books.under_way += 1;
        Verdict::Begin(Guest {
            door: Arc::clone(self),
            address,
            counted: proven,
            failed: proven,
        })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    /// How many handshakes of an address have failed of late.
    fn failed(&mut self, address: IpAddr, now: Instant) -> usize {
        if self.of_one.len() >= ADDRESSES {
            self.of_one.retain(|_, account| account.under_way > 0);
        }
        let Some(account) = self.of_one.get_mut(&address) else {
            return 0;
        };
        let over = |last| now.saturating_duration_since(last) > MEMORY;
        if account.last.is_some_and(over) {
            (account.failed, account.last) = (0, None);
        }
        account.failed
    }
}

impl Guest {
    /// The handshake has succeeded.
    pub(super) fn let_in(mut self) {
        self.failed = false;
    }

    /// It came as far as showing a certificate, which proves its address, and the certificate is unknown.
    pub(super) fn refuse(mut self) {
        self.failed = true;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut books = self.door.books();
        books.under_way -= 1;
        if !self.counted && !self.failed {
            return;
        }
        let account = books.of_one.entry(self.address).or_default();
        account.under_way -= usize::from(self.counted);
        if self.failed {
            account.failed += 1;
            account.last = Some(Instant::now());
        } else if account.under_way == 0 && account.failed == 0 {
            books.of_one.remove(&self.address);
        }
    }
}

/// What one host has to itself: an IPv4 address, or the 64 bits before the part of an IPv6 address that it chooses.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & !u128::from(u64::MAX)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().expect("an address"), 7)
    }

    fn begun(verdict: Verdict) -> Guest {
        match verdict {
            Verdict::Begin(guest) => guest,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn when_much_is_under_way_an_address_must_be_proven() {
        let (door, now) = (Arc::new(Door::default()), Instant::now());
        let strangers: Vec<Guest> = (0..QUIET)
            .map(|i| begun(door.knock(at(&format!("10.0.0.{i}")), false, now)))
            .collect();
        assert!(matches!(
            door.knock(at("10.1.0.1"), false, now),
            Verdict::Prove
        ));
        begun(door.knock(at("10.1.0.1"), true, now)).let_in();
        drop(strangers);
        begun(door.knock(at("10.1.0.1"), false, now)).let_in();
        // Addresses that were only written do not count.
        begun(door.knock(at("10.0.0.1"), false, now)).refuse();
        assert!(matches!(
            door.knock(at("10.0.0.1"), false, now),
            Verdict::Prove
        ));
        begun(door.knock(at("10.0.0.1"), true, now)).let_in();
    }

    #[test]
    fn one_address_has_so_many_handshakes_and_no_more_and_others_have_theirs() {
        let (door, now) = (Arc::new(Door::default()), Instant::now());
        let guests: Vec<Guest> = (0..MOST_OF_ONE)
            .map(|_| begun(door.knock(at("10.0.0.1"), true, now)))
            .collect();
        assert!(matches!(
            door.knock(at("10.0.0.1"), true, now),
            Verdict::Ignore
        ));
        begun(door.knock(at("10.0.0.2"), true, now)).let_in();
        // All of them fail: that counts for a while.
        drop(guests);
        assert!(matches!(
            door.knock(at("10.0.0.1"), true, now),
            Verdict::Ignore
        ));
        begun(door.knock(at("10.0.0.1"), true, now + MEMORY * 2)).let_in();
        let mut ours = (0..MOST_OF_ONE).map(|i| {
            let within = format!("2001:db8::{i:x}");
            begun(door.knock(at(&within), true, now))
        });
        let guests: Vec<Guest> = ours.by_ref().collect();
        assert!(matches!(
            door.knock(at("2001:db8::ffff"), true, now),
            Verdict::Ignore
        ));
        drop(guests);
    }

    #[test]
    fn there_is_an_end_to_handshakes_and_to_what_is_remembered() {
        let (door, now) = (Arc::new(Door::default()), Instant::now());
        let from = |i: usize| at(&format!("10.{}.{}.1", i / 200, i % 200));
        let guests: Vec<Guest> = (0..MOST)
            .map(|i| begun(door.knock(from(i), true, now)))
            .collect();
        assert!(matches!(door.knock(from(MOST), true, now), Verdict::Ignore));
        drop(guests);
        for i in 0..2 * ADDRESSES {
            drop(begun(door.knock(from(MOST + i), true, now)));
            assert!(door.books().of_one.len() <= ADDRESSES + 1);
        }
    }

    #[test]
    fn those_who_succeed_are_not_counted() {
        let (door, now) = (Arc::new(Door::default()), Instant::now());
        for _ in 0..10 * MOST_OF_ONE {
            begun(door.knock(at("10.0.0.1"), true, now)).let_in();
        }
        assert!(door.books().of_one.is_empty());
    }
}

//! What those who connect can cost: how many connections a peer has at once, and how many lines strangers put into the log.

use crate::transport::{Fingerprint, TransportError};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many containers may arrive at once. Each has descriptors for all of its memory, and processes of its own.
pub(super) const MAX_ARRIVALS: usize = 64;

/// How many connections a peer may have at once: as many as arrivals, and as many questions beside them. Each costs a thread.
const MAX_SEATS: usize = 2 * MAX_ARRIVALS;

/// Counts the connections of each peer.
#[derive(Debug, Default)]
pub(super) struct Seats(Mutex<HashMap<Fingerprint, usize>>);

/// A connection that is counted as long as this lives.
#[derive(Debug)]
pub(super) struct Seat {
    seats: Arc<Seats>,
    peer: Fingerprint,
}

impl Seats {
    /// Counts a connection of `peer`; `None` if it has as many as it may.
    pub(super) fn take(self: &Arc<Self>, peer: Fingerprint) -> Option<Seat> {
        let mut taken = self.taken();
        let of_peer = taken.entry(peer).or_default();
        if *of_peer >= MAX_SEATS {
            return None;
        }
        *of_peer += 1;
        Some(Seat {
            seats: Arc::clone(self),
            peer,
        })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<Fingerprint, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.taken();
        if let Some(of_peer) = taken.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

/// Says who was not let in, one of many when there are many: a log is not for strangers to fill.
#[derive(Debug, Default)]
pub(super) struct TurnedAway(Mutex<(Option<Instant>, u64)>);

/// Between two lines about who was not let in.
const PAUSE: Duration = Duration::from_secs(5);

impl TurnedAway {
    /// Says it, or counts it for the next line.
    pub(super) fn say(&self, from: SocketAddr, error: &TransportError) {
        if let Some(others) = self.others(Instant::now()) {
            tracing::warn!(%from, %error, others, "not let in");
        }
    }

    /// How many went unsaid since the last line, if it is time for one.
    fn others(&self, now: Instant) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, unsaid) = &mut *said;
        if last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            *unsaid += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(digit: char) -> Fingerprint {
        let text = format!("sha256:{}", digit.to_string().repeat(64));
        text.parse().expect("a fingerprint")
    }

    #[test]
    fn a_peer_has_so_many_connections_and_takes_none_of_anothers() {
        let seats = Arc::new(Seats::default());
        let mut taken: Vec<Seat> = (0..MAX_SEATS)
            .map(|_| seats.take(peer('1')).expect("a seat"))
            .collect();
        assert!(seats.take(peer('1')).is_none());
        assert!(seats.take(peer('2')).is_some());
        taken.pop();
        taken.push(seats.take(peer('1')).expect("one is free again"));
        drop(taken);
        assert!(seats.taken().is_empty());
    }

    #[test]
    fn of_many_strangers_one_line_is_said_and_the_rest_counted() {
        let (turned_away, now) = (TurnedAway::default(), Instant::now());
        assert_eq!(turned_away.others(now), Some(0));
        for _ in 0..1000 {
            assert_eq!(turned_away.others(now + PAUSE / 2), None);
        }
        assert_eq!(turned_away.others(now + PAUSE * 2), Some(1000));
        assert_eq!(turned_away.others(now + PAUSE * 4), Some(0));
    }
}

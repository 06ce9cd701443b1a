//! First flights of strangers: the packets with which QUIC connections begin, made by connecting to nobody and never continued.

use migrate::transport::{Connector, Identity, Settings, TrustStore};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UdpSocket;

/// The datagrams of `count` first flights, each of a connection of its own and of a host that nobody knows.
pub async fn first_flights(count: usize) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let identity = Arc::new(Identity::load_or_create(dir.path()).expect("an identity"));
    let settings = Settings {
        connect_timeout: Duration::from_secs(3600),
        ..Settings::default()
    };
    let stranger = Connector::new(identity, TrustStore::in_dir(dir.path()), settings);
    let mut flights = Vec::new();
    while flights.len() < count {
        // What a dropped connection still has to say goes to a socket that nobody reads any more.
        let nobody = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let addr = nobody.local_addr().expect("has an address");
        let batch = BATCH.min(count - flights.len());
        let connecting: Vec<_> = (0..batch)
            .map(|_| {
                let connector = stranger.clone();
                tokio::spawn(async move { connector.connect(addr).await.map(drop) })
            })
            .collect();
        let mut packet = [0; 2048];
        for _ in 0..batch {
            let (length, _) = nobody.recv_from(&mut packet).await.expect("a packet");
            flights.push(packet[..length].to_vec());
        }
        connecting.iter().for_each(tokio::task::JoinHandle::abort);
    }
    flights
}

/// Connections, each with a socket of its own, at once.
const BATCH: usize = 100;

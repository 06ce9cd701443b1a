//! A virtual cable between two hosts.

use std::net::Ipv4Addr;
use std::process::Child;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};

use crate::host::Host;

/// A veth pair with one end on each host, `10.77.x.1` on the first and `10.77.x.2` on the second. It goes with its hosts.
pub struct Link<'h> {
    ends: [(&'h Host, String); 2],
    subnet: u8,
}

impl<'h> Link<'h> {
    /// Joins two hosts. The interface on each is named after the other: `to-b` on host a. MTU 1500.
    pub fn join(a: &'h Host, b: &'h Host) -> Result<Link<'h>> {
        static MADE: AtomicU8 = AtomicU8::new(0);

        let link = Link {
            ends: [
                (a, format!("to-{}", b.name())),
                (b, format!("to-{}", a.name())),
            ],
            subnet: MADE.fetch_add(1, Ordering::Relaxed),
        };
        let [(_, on_a), (_, on_b)] = &link.ends;
        // Made in place, so that no name is ever taken in this machine's own network.
        a.in_network(&format!(
            "ip link add {on_a} type veth peer name {on_b} netns {}",
            b.pid()
        ))?;
        for ((host, interface), address) in link.ends.iter().zip([link.first(), link.second()]) {
            host.in_network(&format!("ip address add {address}/24 dev {interface}"))?;
            host.in_network(&format!("ip link set {interface} up"))?;
        }
        Ok(link)
    }

    /// Address of the first host.
    pub fn first(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.subnet, 1)
    }

    /// Address of the second host.
    pub fn second(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.subnet, 2)
    }

    /// Cuts the cable: packets vanish from now on, both ways.
    pub fn down(&self) -> Result<()> {
        let (host, interface) = &self.ends[0];
        host.in_network(&format!("ip link set {interface} down"))
            .map(drop)
    }

    /// Mends the cable.
    pub fn up(&self) -> Result<()> {
        let (host, interface) = &self.ends[0];
        host.in_network(&format!("ip link set {interface} up"))
            .map(drop)
    }

    /// Sets the largest packet, in bytes, at both ends.
    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        self.ends.iter().try_for_each(|(host, interface)| {
            host.in_network(&format!("ip link set {interface} mtu {mtu}"))
                .map(drop)
        })
    }

    /// Limits the rate of both directions, in megabits a second.
    pub fn limit_rate(&self, megabits: u32) -> Result<()> {
        // A bucket of 10 ms of the rate, no smaller than one large packet offloaded whole.
        let burst = (u64::from(megabits) * 1_000_000 / 8 / 100).max(128 * 1024);
        for (host, interface) in &self.ends {
            host.in_network(&format!("tc qdisc replace dev {interface} root tbf rate {megabits}mbit burst {burst} latency 50ms"))?;
        }
        Ok(())
    }

    /// Bytes sent by the first and by the second host since the link was made.
    pub fn bytes_sent(&self) -> Result<[u64; 2]> {
        let mut sent = [0; 2];
        for (bytes, (host, interface)) in sent.iter_mut().zip(&self.ends) {
            let shown: serde_json::Value = serde_json::from_str(
                &host.in_network(&format!("ip -json -stats link show dev {interface}"))?,
            )?;
            *bytes = shown[0]["stats64"]["tx"]["bytes"]
                .as_u64()
                .unwrap_or_default();
        }
        Ok(sent)
    }

    /// Asks for the bytes that a real wire would have carried since [`Link::limit_rate`], without waiting for the answer.
    ///
    /// An interface without hardware counts a large packet that is cut up later as one, with one header: a TCP stream looks
    /// as if it had next to no headers. The queue in front of it counts the headers of all pieces
    /// (`qdisc_pkt_len_init` in the kernel's net/core/dev.c).
    pub fn ask_wire_bytes(&self) -> Result<WireBytes> {
        let ask = |(host, interface): &(&Host, String)| {
            host.start_in_network(&format!("tc -json -stats qdisc show dev {interface} root"))
        };
        Ok(WireBytes {
            asked: [ask(&self.ends[0])?, ask(&self.ends[1])?],
        })
    }
}

/// An answer on its way.
#[derive(Debug)]
pub struct WireBytes {
    asked: [Child; 2],
}

impl WireBytes {
    /// Bytes sent by both hosts since they are counted.
    pub fn answer(self) -> Result<u64> {
        let mut bytes = 0;
        for asked in self.asked {
            let output = asked.wait_with_output()?;
            let shown: serde_json::Value = serde_json::from_slice(&output.stdout)
                .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
            bytes += shown[0]["bytes"]
                .as_u64()
                .with_context(|| format!("no bytes in {shown}"))?;
        }
        Ok(bytes)
    }
}

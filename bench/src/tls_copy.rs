//! The yardstick for total time: as many incompressible bytes over one TCP connection with TLS 1.3, from memory to memory.
//!
//! rustls with AES-128-GCM, the cipher migrate uses too, and the buffers of an ordinary program.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

use crate::measure::{Case, Costs, Measured, Site};

const PORT: u16 = 7072;
const NAME: &str = "target";
const CHUNK: usize = 256 * 1024;
const LIMIT: Duration = Duration::from_secs(120);

/// Sends the case's memory from host to host.
pub fn measure(site: &Site, case: &Case) -> Result<Measured> {
    let bench = std::env::current_exe()?;
    let bench = bench.to_string_lossy();
    let (address, mib) = (
        SocketAddrV4::new(site.link.second(), PORT).to_string(),
        case.memory_mib.to_string(),
    );
    let certificate = "/run/certificate";
    let mut receiver = site
        .target
        .spawn(&bench, ["part", "tls-receive", &address, &mib, certificate])?;
    receiver.wait_for("listening", LIMIT)?;
    std::fs::copy(site.target.path(certificate), site.source.path(certificate))?;

    let costs = Costs::start(site)?;
    site.source
        .run(&bench, ["part", "tls-send", &address, &mib, certificate])?;
    ensure!(
        receiver.wait(LIMIT)?.success(),
        "the receiver failed: {}",
        receiver.output()?
    );
    let mut measured = costs.end(site)?;
    let line = receiver.wait_for("received", LIMIT)?;
    let seconds = line
        .split_whitespace()
        .nth(1)
        .context("no time in what the receiver said")?;
    measured.total_s = seconds.parse()?;
    measured.verified = true;
    Ok(measured)
}

/// Listens, then takes so many bytes into memory and says how long that took from the first connection on.
pub fn receive(listen: SocketAddrV4, mib: u32, certificate: &Path) -> Result<()> {
    let key = rcgen::generate_simple_self_signed(vec![NAME.to_string()])?;
    let private =
        PrivateKeyDer::try_from(key.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)?;
    std::fs::write(certificate, key.cert.der())?;
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    println!("listening");
    let (connection, _) = listener.accept()?;

    let start = Instant::now();
    let mut stream = StreamOwned::new(ServerConnection::new(Arc::new(config))?, connection);
    // Untouched memory, as a target's is.
    let mut received = vec![0; (mib as usize) << 20];
    stream.read_exact(&mut received)?;
    let elapsed = start.elapsed();
    stream.write_all(&checksum(&received).to_le_bytes())?;
    stream.flush()?;
    println!("received {:.6}", elapsed.as_secs_f64());
    Ok(())
}

/// Sends so many random bytes, and fails when others arrived.
pub fn send(to: SocketAddrV4, mib: u32, certificate: &Path) -> Result<()> {
    let mut bytes = vec![0; (mib as usize) << 20];
    fill(&mut bytes);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(std::fs::read(certificate)?))?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = ClientConnection::new(Arc::new(config), ServerName::try_from(NAME)?)?;
    let expected = checksum(&bytes);
    let mut stream = StreamOwned::new(
        client,
        TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?,
    );
    for chunk in bytes.chunks(CHUNK) {
        stream.write_all(chunk)?;
    }
    stream.flush()?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    ensure!(
        u64::from_le_bytes(answer) == expected,
        "other bytes arrived than were sent"
    );
    Ok(())
}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(provider)
}

fn fill(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in bytes.chunks_exact_mut(8) {
        // xorshift64: enough that nothing compresses.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

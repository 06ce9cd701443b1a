//! Mutual TLS 1.3 in which a certificate is trusted by its fingerprint alone.
//!
//! There is no authority and no name: a peer is who its key says, and the trust store says who may come. The
//! handshake's signature is verified as always, so a copied certificate is worth nothing without its key. Sessions
//! are never resumed: each handshake looks at the trust store as it is then.

use super::fingerprint::Fingerprint;
use super::identity::Identity;
use super::trust::Trusted;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    PeerIncompatible, ServerConfig, SignatureScheme,
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The name every client asks for; nothing depends on it.
pub const SERVER_NAME: &str = "migrate";

/// What both sides say they speak inside TLS, so that another QUIC service is told apart at once.
const ALPN: &[u8] = b"migrate";

/// Lets in the peers of one reading of the trust store, and remembers whom it refused.
#[derive(Debug)]
pub struct PeerVerifier {
    trusted: Arc<Trusted>,
    provider: Arc<CryptoProvider>,
    refused: Mutex<Option<Fingerprint>>,
}

impl PeerVerifier {
    /// A verifier for one handshake.
    pub fn new(trusted: Arc<Trusted>) -> Arc<PeerVerifier> {
        Arc::new(PeerVerifier {
            trusted,
            provider: provider(),
            refused: Mutex::new(None),
        })
    }

    /// The peer that was refused, if one was.
    pub fn refused(&self) -> Option<Fingerprint> {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trust this verifier decides by.
    pub fn trusted(&self) -> &Trusted {
        &self.trusted
    }

    fn verify(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let fingerprint = Fingerprint::of(certificate);
        if self.trusted.name_of(fingerprint).is_some() {
            return Ok(());
        }
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(fingerprint);
        Err(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        ))
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The configuration of a client for one connection.
pub fn client(
    identity: &Identity,
    verifier: Arc<PeerVerifier>,
) -> Result<quinn::ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.certificate()], identity.key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    let config = QuicClientConfig::try_from(config).map_err(|_| no_initial_suite())?;
    Ok(quinn::ClientConfig::new(Arc::new(config)))
}

/// The configuration of a server for one connection.
pub fn server(
    identity: &Identity,
    verifier: Arc<PeerVerifier>,
) -> Result<quinn::ServerConfig, Error> {
    let config = server_tls(identity, verifier)?;
    let config = QuicServerConfig::try_from(config).map_err(|_| no_initial_suite())?;
    Ok(quinn::ServerConfig::with_crypto(Arc::new(config)))
}

fn server_tls(identity: &Identity, verifier: Arc<PeerVerifier>) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate()], identity.key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// aws-lc-rs with AES-128-GCM in front: the cheapest on processors with AES instructions, and QUIC's own initial suite.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let provider = PROVIDER.get_or_init(|| {
        let mut provider = aws_lc_rs::default_provider();
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        Arc::new(provider)
    });
    Arc::clone(provider)
}

fn no_initial_suite() -> Error {
    Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon)
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(
            PeerIncompatible::Tls13RequiredForQuic,
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(
            PeerIncompatible::Tls13RequiredForQuic,
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::trust::TrustedPeer;
    use rustls::client::ResolvesClientCert;
    use rustls::sign::CertifiedKey;
    use rustls::{ClientConnection, Connection, ServerConnection};

    /// Shows one host's certificate and signs with a key that may be another's.
    #[derive(Debug)]
    struct Shown(Arc<CertifiedKey>);

    impl ResolvesClientCert for Shown {
        fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            Some(self.0.clone())
        }

        fn has_certs(&self) -> bool {
            true
        }
    }

    fn host() -> Identity {
        let dir = tempfile::tempdir().expect("a directory");
        Identity::load_or_create(dir.path()).expect("an identity")
    }

    fn trusting(identity: &Identity) -> Arc<PeerVerifier> {
        PeerVerifier::new(Arc::new(Trusted::from_iter([TrustedPeer {
            name: "peer".parse().expect("a name"),
            fingerprint: identity.fingerprint(),
        }])))
    }

    /// A client that shows `certificate`'s certificate, signed for by `key`'s key, meets a server that trusts it.
    fn handshake(certificate: &Identity, key: &Identity) -> Result<(), Error> {
        let server_identity = host();
        let key = provider().key_provider.load_private_key(key.key())?;
        let shown = Shown(Arc::new(CertifiedKey::new(
            vec![certificate.certificate()],
            key,
        )));
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(trusting(&server_identity))
            .with_client_cert_resolver(Arc::new(shown));
        client.alpn_protocols = vec![ALPN.to_vec()];
        let name = SERVER_NAME.try_into().expect("a server name");
        let mut client = Connection::from(ClientConnection::new(Arc::new(client), name)?);
        let server = server_tls(&server_identity, trusting(certificate))?;
        let mut server = Connection::from(ServerConnection::new(Arc::new(server))?);
        while client.is_handshaking() || server.is_handshaking() {
            carry(&mut client, &mut server)?;
            carry(&mut server, &mut client)?;
        }
        Ok(())
    }

    fn carry(from: &mut Connection, to: &mut Connection) -> Result<(), Error> {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).expect("memory takes all");
        }
        let mut unread = &bytes[..];
        while !unread.is_empty() {
            to.read_tls(&mut unread).expect("memory gives all");
            to.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn a_copied_certificate_is_worth_nothing_without_its_key() {
        let (owner, thief) = (host(), host());
        handshake(&owner, &owner).expect("the owner of the certificate gets in");
        assert_eq!(
            handshake(&owner, &thief),
            Err(Error::InvalidCertificate(CertificateError::BadSignature))
        );
    }

    #[test]
    fn the_cheapest_cipher_is_offered_first() {
        assert_eq!(
            provider().cipher_suites[0].suite(),
            CipherSuite::TLS13_AES_128_GCM_SHA256
        );
    }
}

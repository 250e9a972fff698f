//! TLS for NBD over TCP, without sockets: bytes of the network in, bytes of the protocol out, and back.
//!
//! - [`TlsServer`]: certificate, key and the authority that vouches for clients
//! - [`TlsSession`]: one connection
//!
//! A client without a certificate of that authority does not get through the handshake: whoever reaches an export over the
//! network has proven who it is.

use crate::privilege;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// Why TLS does not work.
#[derive(Debug, Error)]
pub enum TlsError {
    #[error("cannot read {} from {}: {reason}", what, path.display())]
    Unreadable { what: &'static str, path: PathBuf, reason: String },
    #[error("{} holds no certificate; give one in PEM", path.display())]
    Empty { path: PathBuf },
    #[error("the certificates cannot be used: {0}; check that key and certificate belong together")]
    Unusable(String),
    #[error("TLS with the client failed: {0}")]
    Session(#[from] rustls::Error),
    #[error("TLS with the client failed: {0}")]
    Io(#[from] io::Error),
}

/// What makes sessions.
#[derive(Clone)]
pub struct TlsServer(Arc<ServerConfig>);

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsServer")
    }
}

fn open(path: &Path) -> Result<File, pem::Error> {
    privilege::open_read(path).map_err(pem::Error::Io)
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unreadable = |error: pem::Error| TlsError::Unreadable { what, path: path.into(), reason: error.to_string() };
    let chain: Vec<_> = CertificateDer::pem_reader_iter(open(path).map_err(unreadable)?)
        .collect::<Result<_, _>>()
        .map_err(unreadable)?;
    if chain.is_empty() { Err(TlsError::Empty { path: path.into() }) } else { Ok(chain) }
}

impl TlsServer {
    /// Reads the server's certificate chain and key and the authorities of clients, all in PEM.
    ///
    /// # Errors
    /// A file cannot be read, holds nothing of use, or key and certificate do not belong together.
    pub fn load(certificate: &Path, key: &Path, client_authority: &Path) -> Result<TlsServer, TlsError> {
        let chain = certificates("the certificate", certificate)?;
        let private = open(key).and_then(PrivateKeyDer::from_pem_reader).map_err(|error| TlsError::Unreadable {
            what: "the private key",
            path: key.into(),
            reason: error.to_string(),
        })?;
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let mut roots = RootCertStore::empty();
        for authority in certificates("the clients' authority", client_authority)? {
            roots.add(authority).map_err(|error| unusable(&error))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, private)
            .map_err(|error| unusable(&error))?;
        Ok(TlsServer(Arc::new(config)))
    }

    /// # Errors
    /// The configuration is refused.
    pub fn session(&self) -> Result<TlsSession, TlsError> {
        let mut connection = ServerConnection::new(Arc::clone(&self.0))?;
        // The caller bounds what it hands over, and takes it out again at once.
        connection.set_buffer_limit(None);
        Ok(TlsSession(Box::new(connection)))
    }
}

/// One connection's TLS.
pub struct TlsSession(Box<ServerConnection>);

impl fmt::Debug for TlsSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsSession")
    }
}

impl TlsSession {
    /// Takes bytes off the network, all of them, and appends what the client says to `plain`: at most as much as came in,
    /// and one record. What is to be answered on the way (handshake, alerts) is appended to `out`, also on failure.
    ///
    /// # Errors
    /// The client breaks the protocol or cannot prove who it is.
    pub fn receive(&mut self, mut input: &[u8], plain: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<(), TlsError> {
        let result = loop {
            if input.is_empty() {
                break Ok(());
            }
            if let Err(error) = self.0.read_tls(&mut input) {
                break Err(error.into());
            }
            let state = match self.0.process_new_packets() {
                Ok(state) => state,
                Err(error) => break Err(error.into()),
            };
            let len = state.plaintext_bytes_to_read();
            let at = plain.len();
            plain.resize(at + len, 0);
            if let Err(error) = self.0.reader().read_exact(&mut plain[at..]) {
                break Err(error.into());
            }
        };
        self.flush(out);
        result
    }

    /// Encrypts, appending to `out`.
    pub fn send(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        // Into memory, without a limit: it takes everything and cannot fail.
        let _ = self.0.writer().write_all(plain);
        self.flush(out);
    }

    /// The server's last word.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.0.send_close_notify();
        self.flush(out);
    }

    /// The client has not proven yet who it is.
    pub fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    fn flush(&mut self, out: &mut Vec<u8>) {
        while self.0.wants_write() {
            // Into memory.
            if self.0.write_tls(out).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;

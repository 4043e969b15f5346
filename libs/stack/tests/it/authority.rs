//! Certificates for the tests of encrypted connections.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::path::PathBuf;

/// A new authority, and a certificate for a server at 127.0.0.1. Its file is removed with the test.
pub struct Authority {
    pub file: PathBuf,
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

impl Authority {
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        // Another name than the certificate below: with the same one, OpenSSL takes that for self-signed.
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &authority)?;
        let file = std::env::temp_dir().join(format!("stack-{}-{:x}.pem", std::process::id(), rand::random::<u64>()));
        std::fs::write(&file, authority.pem())?;
        Ok(Self { file, certificate: certificate.pem().into(), key: key.serialize_pem().into() })
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

//! A URL whose credentials cannot be printed.

use std::fmt;

use secrecy::{ExposeSecret as _, SecretString};

/// A URL with a password. Its `Debug` output has only host, port and path, so that a log shows where the service connects.
#[derive(Clone)]
pub struct SecretUrl(SecretString);

impl SecretUrl {
    /// The whole URL.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl From<String> for SecretUrl {
    fn from(url: String) -> Self {
        Self(url.into())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.expose().rsplit('@').next().unwrap_or_default();
        let host = host.rsplit("://").next().unwrap_or_default();
        // Options are dropped too: libpq's `?password=` is one of them.
        f.write_str(host.split('?').next().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_and_path_are_printed() {
        for (url, printed) in [
            ("postgres://user:hidden@db:5432/tickets?password=hidden", "db:5432/tickets"),
            ("postgres://user:hid@den@db/tickets", "db/tickets"),
            ("nats://hidden@nats:4222", "nats:4222"),
            ("nats:4222", "nats:4222"),
        ] {
            assert_eq!(format!("{:?}", SecretUrl::from(url.to_owned())), printed);
        }
    }
}

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
        let url = self.expose();
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        // Options are dropped too: libpq's `?password=` is one of them.
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let hosts = authority.rsplit('@').next().unwrap_or_default();
        // A password with `/` or `,` that is not escaped: anything may be a part of it.
        if path.contains('@') || !hosts.split(',').all(is_host) {
            return f.write_str("…");
        }
        write!(f, "{hosts}{path}")
    }
}

/// Whether this is a host, perhaps with a port.
fn is_host(text: &str) -> bool {
    let (host, port) = if text.ends_with(']') { (text, "") } else { text.rsplit_once(':').unwrap_or((text, "")) };
    let is_address = host.starts_with('[') && host.ends_with(']');
    (is_address || !host.contains(':')) && port.bytes().all(|byte| byte.is_ascii_digit())
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
            ("postgres://db/tickets?user=u&password=hid@den", "db/tickets"),
            ("postgres://user:hid/den@db/tickets", "…"),
            ("nats://user:hid", "…"),
            ("postgres://user:hidden@one:5432,two:5432/tickets", "one:5432,two:5432/tickets"),
            ("postgres://user:hidden@[::1]:5432/tickets", "[::1]:5432/tickets"),
            ("postgres:///tickets?host=/var/run", "/tickets"),
        ] {
            assert_eq!(format!("{:?}", SecretUrl::from(url.to_owned())), printed);
        }
    }
}

//! The caller: a token in a cookie or in the `Authorization` header, verified with the configured key.

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use axum::extract::{FromRef, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use secrecy::ExposeSecret as _;
use serde::Deserialize;

use crate::config::Config;
use crate::error::ApiError;

/// A signed-in user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Opaque, never empty, and text that Postgres can store.
    pub id: String,
    /// Empty if the token has none.
    pub email: String,
}

/// The user of a request, or none.
///
/// As an extractor it never fails: an invalid token, cookie or header makes the request anonymous.
#[derive(Clone, Debug)]
pub struct Caller(Option<User>);

impl Caller {
    /// The signed-in user, or [`ApiError::NotAuthorized`].
    pub fn user(&self) -> Result<&User, ApiError> {
        self.0.as_ref().ok_or(ApiError::NotAuthorized)
    }
}

impl<S> FromRequestParts<S> for Caller
where
    S: Send + Sync,
    Keys: FromRef<S>,
{
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        let keys = Keys::from_ref(state);
        let from_cookie = session_cookies(&parts.headers).find_map(|cookie| keys.user(&session_token(cookie)?));
        Ok(Self(from_cookie.or_else(|| bearer_tokens(&parts.headers).find_map(|token| keys.user(token)))))
    }
}

/// The key that tokens are verified with, and its one algorithm. Cheap to clone.
#[derive(Clone)]
pub struct Keys(Arc<Pinned>);

struct Pinned {
    key: DecodingKey,
    rules: Validation,
}

impl Keys {
    /// Reads the configured key. Fails if it is malformed, or if it is a public key used as a secret.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        match (&config.jwt.jwt_key, &config.jwt.jwt_public_key) {
            (Some(secret), None) => Self::from_secret(secret.expose_secret()),
            (None, Some(pem)) => Self::from_pem(pem.expose_secret()),
            _ => bail!("exactly one of JWT_KEY and JWT_PUBLIC_KEY is needed"),
        }
    }

    fn from_secret(secret: &str) -> anyhow::Result<Self> {
        if secret.is_empty() {
            bail!("JWT_KEY is empty");
        }
        // With a public key as the HS256 secret, everyone could sign tokens.
        if secret.trim_start().starts_with("-----BEGIN") {
            bail!("JWT_KEY holds a PEM key: set JWT_PUBLIC_KEY instead");
        }
        Ok(Self::pinned(DecodingKey::from_secret(secret.as_bytes()), Algorithm::HS256))
    }

    fn from_pem(pem: &str) -> anyhow::Result<Self> {
        // Many tools cannot set variables of several lines.
        let pem = pem.replace("\\n", "\n");
        let ed25519 = DecodingKey::from_ed_pem(pem.as_bytes()).map(|key| (key, Algorithm::EdDSA));
        let (key, algorithm) = ed25519
            .or_else(|_| DecodingKey::from_ec_pem(pem.as_bytes()).map(|key| (key, Algorithm::ES256)))
            .context("JWT_PUBLIC_KEY is no PEM public key, Ed25519 or P-256")?;
        // A wrong curve is an error only when the key is used: use it now, not at the first request.
        jsonwebtoken::crypto::verify("", b"", &key, algorithm).context("JWT_PUBLIC_KEY is not on P-256 or Ed25519")?;
        Ok(Self::pinned(key, algorithm))
    }

    fn pinned(key: DecodingKey, algorithm: Algorithm) -> Self {
        let mut rules = Validation::new(algorithm);
        rules.required_spec_claims.clear();
        rules.validate_aud = false;
        rules.validate_nbf = true;
        rules.leeway = 0;
        // RFC 7519: not accepted on or after `exp`. The library alone accepts it during that second.
        rules.reject_tokens_expiring_in_less_than = 1;
        Self(Arc::new(Pinned { key, rules }))
    }

    fn user(&self, token: &[u8]) -> Option<User> {
        let claims = jsonwebtoken::decode::<Claims>(token, &self.0.key, &self.0.rules).ok()?.claims;
        if claims.id.is_empty() || claims.id.contains('\0') {
            return None;
        }
        Some(User { id: claims.id, email: claims.email.as_str().unwrap_or_default().to_owned() })
    }
}

#[derive(Deserialize)]
struct Claims {
    id: String,
    /// Of any type: an unusual address does not make a user anonymous.
    #[serde(default)]
    email: serde_json::Value,
}

/// The content of the session cookie.
#[derive(Deserialize)]
struct Session {
    jwt: String,
}

/// The values of all cookies that may hold a session, in their order. Headers are bytes, not text.
fn session_cookies(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers.get_all(header::COOKIE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b';')).filter_map(
        |pair| {
            let pair = pair.trim_ascii();
            let value = pair.strip_prefix(b"express:sess=").or_else(|| pair.strip_prefix(b"session="))?;
            Some(value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
        },
    )
}

/// The token in a cookie's base64 of `{"jwt":"<token>"}`.
fn session_token(cookie: &[u8]) -> Option<Vec<u8>> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new()
            .with_decode_padding_mode(DecodePaddingMode::Indifferent)
            .with_decode_allow_trailing_bits(true),
    );
    let standard = percent_encoding::percent_decode(cookie).map(|byte| match byte {
        b'-' => b'+',
        b'_' => b'/',
        other => other,
    });
    let json = LENIENT.decode(standard.collect::<Vec<u8>>()).ok()?;
    Some(serde_json::from_slice::<Session>(&json).ok()?.jwt.into_bytes())
}

fn bearer_tokens(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers.get_all(header::AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
    })
}

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};

/// The key that signs tokens for development and tests (`JWT_KEY` of the services). Never one for production.
pub const JWT_KEY: &str = "a key for development only, known to everybody";

/// A token of the user as an auth service issues it: HS256 over `{id, email, iat}`, without expiry.
pub fn token(user_id: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    let claims = json!({ "id": user_id, "email": format!("{user_id}@example.com"), "iat": now.as_secs() });
    jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(JWT_KEY.as_bytes()))
        .expect("plain JSON and a shared key can always be signed")
}

/// The value of the session cookie (`express:sess` or `session`) that carries [`token`] for the user.
pub fn cookie(user_id: &str) -> String {
    BASE64_STANDARD.encode(json!({ "jwt": token(user_id) }).to_string())
}

use axum::Router;
use axum::routing::get;
use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};
use bootstrap::{ApiError, Caller, Keys, Running};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

use crate::server::{config, start};

const ED25519: (&str, &str) = (
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIClEJWsrGTpEAleWq8+wSkfNCW4ElIErPO36DBFwQhzI\n-----END PRIVATE KEY-----",
    "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA6fRyKI24kAoq9i/V3hQtfsBbZJaCx1lRLIRFxCDz5wc=\n-----END PUBLIC KEY-----",
);
const P256: (&str, &str) = (
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgoyKvR9sYpUYxG2AG\n\
     +WROmZgM2Gfs1sYInvPhZXTFgVmhRANCAASKWxnEZF+WJcTwLzQy0CXPEyqK4hM5\nudYbL1o82oEknYEgoUGiY4BeZSqVYQ4LtS7XEz2QGJDGNr6NM7l19AbD\n\
     -----END PRIVATE KEY-----",
    "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEilsZxGRfliXE8C80MtAlzxMqiuIT\n\
     ObnWGy9aPNqBJJ2BIKFBomOAXmUqlWEOC7Uu1xM9kBiQxja+jTO5dfQGww==\n-----END PUBLIC KEY-----",
);
const P384: &str = "-----BEGIN PUBLIC KEY-----\nMHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEdEmDpoTB2lRdX8cmm2qh4mDLnJfJZ0s3\n\
     gbQFUMUd+QBeDX5yM1G8OgfTQdpe15IVH1mrgEuJ8mMIe0Xikn1j9u0N3yS7Ja8b\nnB40m10lfLiv9xjySfIfjjybuPu1A2C8\n-----END PUBLIC KEY-----";
const SECP256K1: &str = "-----BEGIN PUBLIC KEY-----\nMFYwEAYHKoZIzj0CAQYFK4EEAAoDQgAEhikV75QGF0DxsIx+hl9x71J/ZuMzvBIX\n\
     dStGfv8A0AIEReCkplaBwbaF/OsdRq3VquM6O6Govi9UvJVTGjpiMA==\n-----END PUBLIC KEY-----";

async fn whoami(caller: Caller) -> Result<String, ApiError> {
    let user = caller.user()?;
    Ok(format!("{} {}", user.id, user.email))
}

async fn service(key_option: &str) -> Running {
    let keys = Keys::new(&config(&[key_option])).unwrap();
    start(Router::new().route("/me", get(whoami)).with_state(keys)).await
}

/// The user that the service derives from these headers.
async fn identified(running: &Running, headers: &[(&str, &[u8])]) -> Option<String> {
    let mut request = Client::new().get(format!("http://{}/me", running.address));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send().await.unwrap();
    match response.status() {
        StatusCode::OK => Some(response.text().await.unwrap()),
        StatusCode::UNAUTHORIZED => {
            assert_eq!(response.text().await.unwrap(), r#"{"errors":[{"message":"Not authorized"}]}"#);
            None
        }
        other => panic!("{other} for {headers:?}"),
    }
}

fn token(algorithm: Algorithm, secret: &str, claims: &Value) -> String {
    encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
}

fn token_of(id: &str) -> String {
    token(Algorithm::HS256, "key", &json!({ "id": id, "email": "a@b.c", "iat": 1 }))
}

fn session(token: &str) -> String {
    json!({ "jwt": token }).to_string()
}

fn seconds_from_now(seconds: i64) -> i64 {
    i64::try_from(jsonwebtoken::get_current_timestamp()).unwrap() + seconds
}

#[tokio::test]
async fn a_token_is_valid_only_with_valid_claims_and_algorithm() {
    let running = service("--jwt-key=key").await;
    let hs256 = |claims: Value| token(Algorithm::HS256, "key", &claims);
    let unsigned = |header: &str| {
        let part = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.", part(header), part(r#"{"id":"u"}"#))
    };
    let valid = token_of("u");
    for (token, expected) in [
        (valid.clone(), Some("u a@b.c")),
        (hs256(json!({ "id": "u" })), Some("u ")),
        (hs256(json!({ "id": "u", "email": 5 })), Some("u ")),
        (hs256(json!({ "id": "u", "aud": "somebody", "more": [1] })), Some("u ")),
        (hs256(json!({ "id": "u", "exp": seconds_from_now(60) })), Some("u ")),
        (hs256(json!({ "id": "u", "exp": seconds_from_now(-1) })), None),
        (hs256(json!({ "id": "u", "exp": seconds_from_now(0) })), None),
        (hs256(json!({ "id": "u", "exp": 0 })), None),
        (hs256(json!({ "id": "u", "exp": -5 })), None),
        (hs256(json!({ "id": "u", "exp": "tomorrow" })), None),
        (hs256(json!({ "id": "u", "nbf": seconds_from_now(60) })), None),
        (hs256(json!({ "id": "" })), None),
        (hs256(json!({ "id": "\0" })), None),
        (hs256(json!({ "id": 7 })), None),
        (hs256(json!({ "email": "a@b.c" })), None),
        (hs256(json!("u")), None),
        (token(Algorithm::HS256, "another key", &json!({ "id": "u" })), None),
        (token(Algorithm::HS384, "key", &json!({ "id": "u" })), None),
        (token(Algorithm::HS512, "key", &json!({ "id": "u" })), None),
        (unsigned(r#"{"alg":"none","typ":"JWT"}"#), None),
        (unsigned(r#"{"alg":"HS256","typ":"JWT"}"#), None),
        (format!("{valid}x"), None),
        (valid.replacen('.', "", 1), None),
        ("..".to_owned(), None),
        (String::new(), None),
    ] {
        let bearer = format!("Bearer {token}");
        assert_eq!(identified(&running, &[("authorization", bearer.as_bytes())]).await.as_deref(), expected, "{token}");
        let cookie = format!("session={}", BASE64_STANDARD.encode(session(&token)));
        assert_eq!(identified(&running, &[("cookie", cookie.as_bytes())]).await.as_deref(), expected, "{token}");
    }
}

#[tokio::test]
async fn a_token_is_read_from_each_cookie_and_header() {
    let running = service("--jwt-key=key").await;
    let (one, two) = (token_of("one"), token_of("two"));
    // Padded with spaces until base64 needs `=` to fill up.
    let json = (0..3).map(|spaces| " ".repeat(spaces) + &session(&one)).find(|json| json.len() % 3 == 1).unwrap();
    let padded = BASE64_STANDARD.encode(&json);
    assert!(padded.ends_with("=="));
    let unpadded = BASE64_STANDARD_NO_PAD.encode(&json);
    let second = BASE64_STANDARD.encode(session(&two));
    for (headers, expected) in [
        (vec![("cookie", format!("express:sess={padded}"))], "one"),
        (vec![("cookie", format!("session={unpadded}"))], "one"),
        (vec![("cookie", format!("session={}", padded.replace('=', "%3D")))], "one"),
        (vec![("cookie", format!("session=\"{padded}\""))], "one"),
        (vec![("cookie", format!("a=b; session={padded} ;c"))], "one"),
        (vec![("cookie", format!("session=broken; express:sess={padded}"))], "one"),
        (vec![("cookie", format!("session={second}; express:sess={padded}"))], "two"),
        (vec![("cookie", "session=e30=".to_owned()), ("cookie", format!("session={second}"))], "two"),
        (vec![("authorization", format!("bEARER  {one} "))], "one"),
        (vec![("authorization", "Basic eDp5".to_owned()), ("authorization", format!("Bearer {one}"))], "one"),
        (vec![("cookie", "session=broken".to_owned()), ("authorization", format!("Bearer {one}"))], "one"),
        (vec![("cookie", format!("session={second}")), ("authorization", format!("Bearer {one}"))], "two"),
    ] {
        let bytes: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        assert_eq!(identified(&running, &bytes).await, Some(format!("{expected} a@b.c")), "{headers:?}");
    }
}

#[tokio::test]
async fn the_url_safe_alphabet_is_read_too() {
    let running = service("--jwt-key=key").await;
    let json = format!(r#"{{"x":"ûïÿ>>>???","jwt":"{}"}}"#, token_of("u"));
    let (standard, url_safe) = (BASE64_STANDARD_NO_PAD.encode(&json), BASE64_URL_SAFE_NO_PAD.encode(&json));
    assert_ne!(standard, url_safe);
    for value in [&standard, &url_safe, &standard.replace('/', "%2F").replace('+', "%2b")] {
        let cookie = format!("session={value}");
        assert_eq!(identified(&running, &[("cookie", cookie.as_bytes())]).await.as_deref(), Some("u a@b.c"), "{value}");
    }
}

#[tokio::test]
async fn malformed_tokens_make_a_request_anonymous() {
    let running = service("--jwt-key=key").await;
    let token = token_of("u");
    let wrong_name = format!("sessions={}; Session={0}; xsession={0}", BASE64_STANDARD.encode(session(&token)));
    let no_text = BASE64_STANDARD.encode(b"{\"jwt\":\"\xff\"}");
    for (name, value) in [
        ("cookie", b"session".as_slice()),
        ("cookie", b"session="),
        ("cookie", b"session=\""),
        ("cookie", b";;=;==;session=%;session=%zz"),
        ("cookie", b"session=\xff\xfe"),
        ("cookie", b"session=bnVsbA=="),
        ("cookie", b"session=eyJqd3QiOm51bGx9"),
        ("cookie", format!("session={no_text}").as_bytes()),
        ("cookie", wrong_name.as_bytes()),
        ("authorization", b""),
        ("authorization", b"Bearer"),
        ("authorization", b"Bearer "),
        ("authorization", b"Bearer \xff.\xff.\xff"),
        ("authorization", format!("Token {token}").as_bytes()),
        ("authorization", token.as_bytes()),
    ] {
        assert_eq!(identified(&running, &[(name, value)]).await, None, "{}", String::from_utf8_lossy(value));
    }
    assert_eq!(identified(&running, &[]).await, None);
}

#[tokio::test]
async fn public_keys_verify_their_own_algorithm_only() {
    let claims = json!({ "id": "u", "email": "a@b.c" });
    let ed25519 = EncodingKey::from_ed_pem(ED25519.0.as_bytes()).unwrap();
    let p256 = EncodingKey::from_ec_pem(P256.0.as_bytes()).unwrap();
    let eddsa = encode(&Header::new(Algorithm::EdDSA), &claims, &ed25519).unwrap();
    let es256 = encode(&Header::new(Algorithm::ES256), &claims, &p256).unwrap();
    for (public, good, bad) in [(ED25519.1, &eddsa, &es256), (P256.1, &es256, &eddsa)] {
        for pem in [public.to_owned(), public.replace('\n', "\\n")] {
            let running = service(&format!("--jwt-public-key={pem}")).await;
            // The known attack: a token signed with the public key as an HS256 secret.
            let forged = token(Algorithm::HS256, public, &claims);
            for (token, expected) in [(good, Some("u a@b.c")), (bad, None), (&forged, None)] {
                let bearer = format!("Bearer {token}");
                let user = identified(&running, &[("authorization", bearer.as_bytes())]).await;
                assert_eq!(user.as_deref(), expected, "{token}");
            }
        }
    }
}

#[test]
fn a_key_of_the_wrong_kind_is_refused_at_start() {
    for option in ["--jwt-key=", "--jwt-public-key=", "--jwt-public-key=secret"] {
        assert!(Keys::new(&config(&[option])).is_err(), "{option}");
    }
    for pem in [P384, SECP256K1, ED25519.0, P256.0] {
        assert!(Keys::new(&config(&[&format!("--jwt-public-key={pem}")])).is_err(), "{pem}");
    }
    assert!(Keys::new(&config(&[&format!("--jwt-key={}", P256.1)])).is_err());
}

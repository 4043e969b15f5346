use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

/// The id of a ticket or an order: 12 bytes, written as 24 lower-case hex digits.
///
/// Four bytes are Unix seconds, five are random per process, three are a counter. Ids of one process rise strictly, whatever
/// its clock does. Ids of several processes, or of one process before and after a restart, rise only as their clocks do: for
/// the order of creation, use the number that Postgres gives each row.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; 12]);

/// The text is not 24 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an id is 24 hex digits")]
pub struct MalformedId;

impl Id {
    /// A new id, greater than every id this process has made before.
    pub fn generate() -> Self {
        static PROCESS: LazyLock<[u8; 5]> = LazyLock::new(rand::random);
        // Seconds and counter are one number: after 2^24 ids in one second it overflows into the next second.
        static LAST: AtomicU64 = AtomicU64::new(0);

        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() << 24;
        let next = |last: u64| now.max(last + 1);
        let (Ok(last) | Err(last)) = LAST.fetch_update(Relaxed, Relaxed, |last| Some(next(last)));
        let moment = next(last).to_be_bytes();

        let mut id = [0; 12];
        id[..4].copy_from_slice(&moment[1..5]);
        id[4..9].copy_from_slice(&*PROCESS);
        id[9..].copy_from_slice(&moment[5..]);
        Self(id)
    }
}

impl FromStr for Id {
    type Err = MalformedId;

    /// Upper-case digits are read too; an id is always written in lower case.
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        if text.len() != 24 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(MalformedId);
        }
        let mut id = [0; 12];
        for (byte, at) in id.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| MalformedId)?;
        }
        Ok(Self(id))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 24];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_strictly_and_carry_the_time() {
        let ids: Vec<Id> = (0..10_000).map(|_| Id::generate()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));

        let seconds = u64::from_str_radix(&ids[0].to_string()[..8], 16).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now - seconds < 60);
    }

    #[test]
    fn an_id_is_read_in_any_case_and_written_in_lower_case() {
        let id: Id = "5F2B18A3E41D0C0012AbCdEf".parse().unwrap();
        assert_eq!(id.to_string(), "5f2b18a3e41d0c0012abcdef");
    }

    #[test]
    fn anything_but_24_hex_digits_is_malformed() {
        for text in ["", "abc", "5f2b18a3e41d0c0012abcde", "5f2b18a3e41d0c0012abcdefa", "5f2b18a3e41d0c0012abcdeg"] {
            assert_eq!(text.parse::<Id>(), Err(MalformedId), "{text:?}");
        }
        assert_eq!("é".repeat(12).parse::<Id>(), Err(MalformedId));
        assert_eq!("+f2b18a3e41d0c0012abcdef".parse::<Id>(), Err(MalformedId));
    }
}

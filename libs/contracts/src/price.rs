use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// An exact amount of money: more than 0, less than 10^10, at most four decimals. A JSON number on the wire.
///
/// Its fourteen digits survive the conversion to a double-precision number and back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Price(Decimal);

/// Not a price: not a number, not more than 0, too large, or with more than four decimals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a price is more than 0, less than 10000000000 and has at most 4 decimals")]
pub struct InvalidPrice;

const DECIMALS: i64 = 4;
const INTEGER_DIGITS: i64 = 10;
/// 10 to the power of [`INTEGER_DIGITS`].
const LIMIT: Decimal = Decimal::from_parts(1_410_065_408, 2, 0, false, 0);

impl Price {
    /// The amount, without trailing zeros.
    pub fn amount(self) -> Decimal {
        self.0
    }
}

impl TryFrom<Decimal> for Price {
    type Error = InvalidPrice;

    fn try_from(amount: Decimal) -> Result<Self, InvalidPrice> {
        let amount = amount.normalize();
        let is_price = amount > Decimal::ZERO && amount < LIMIT && i64::from(amount.scale()) <= DECIMALS;
        if is_price { Ok(Self(amount)) } else { Err(InvalidPrice) }
    }
}

impl FromStr for Price {
    type Err = InvalidPrice;

    /// Parses a JSON number or the text of a form field: `20`, `20.00`, `1e3`, `+5.`, `.5`.
    ///
    /// The arithmetic is on digits, so nothing is rounded, and `1e999999999` is cheap.
    fn from_str(text: &str) -> Result<Self, InvalidPrice> {
        let (mantissa, exponent) = match text.find(['e', 'E']) {
            Some(at) => (&text[..at], Some(&text[at + 1..])),
            None => (text, None),
        };
        let exponent = exponent.map_or(Ok(0), exponent_of)?;
        let mantissa = mantissa.strip_prefix('+').unwrap_or(mantissa);
        let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));

        let mut digits = String::with_capacity(integer.len() + fraction.len());
        digits.extend([integer, fraction]);
        if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(InvalidPrice);
        }
        // value = significant × 10^power, with no zero at either end of `significant`; nothing is left of a zero.
        let trailing = digits.len() - digits.trim_end_matches('0').len();
        let significant = digits.trim_matches('0');
        let power = exponent + length(trailing) - length(fraction.len());
        if significant.is_empty() || power < -DECIMALS || length(significant.len()) + power > INTEGER_DIGITS {
            return Err(InvalidPrice);
        }
        let units: i64 = significant.parse().map_err(|_| InvalidPrice)?;
        let scale = u32::try_from(power + DECIMALS).map_err(|_| InvalidPrice)?;
        Ok(Self(Decimal::new(units * 10_i64.pow(scale), 4).normalize()))
    }
}

/// Bounded far beyond any price, so that sums with it cannot overflow.
fn exponent_of(text: &str) -> Result<i64, InvalidPrice> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(InvalidPrice);
    }
    let size = digits.parse().unwrap_or(i64::MAX).min(1 << 40);
    Ok(if text.starts_with('-') { -size } else { size })
}

fn length(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(1 << 40)
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Serialize for Price {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.is_integer().then(|| self.0.to_u64()).flatten() {
            Some(whole) => serializer.serialize_u64(whole),
            // The shortest text of this double is the decimal itself: it has at most 14 digits, a double holds 15.
            None => serializer.serialize_f64(self.0.to_string().parse().map_err(serde::ser::Error::custom)?),
        }
    }
}

impl<'de> Deserialize<'de> for Price {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A double's text is its shortest decimal, never with an exponent.
        f64::deserialize(deserializer)?.to_string().parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> String {
        serde_json::to_string(&text.parse::<Price>().unwrap()).unwrap()
    }

    #[test]
    fn numbers_and_numeric_texts_are_read_exactly() {
        for (text, expected) in [
            ("20", "20"),
            ("20.00", "20"),
            ("20.5", "20.5"),
            ("0.001", "0.001"),
            ("0.0001", "0.0001"),
            ("1e3", "1000"),
            ("1E+3", "1000"),
            ("12.5e-1", "1.25"),
            ("+5.", "5"),
            (".5", "0.5"),
            ("0020", "20"),
            ("100000e-5", "1"),
            ("0.1", "0.1"),
            ("9999999999.9999", "9999999999.9999"),
            ("0.00000000000000000001e20", "1"),
        ] {
            assert_eq!(json(text), expected, "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            " ",
            "0",
            "0.0",
            "-1",
            "-0",
            " 20 ",
            "1,5",
            "abc",
            "NaN",
            "Infinity",
            "1e999",
            "1e99999999999999999999",
            "1e-99999999999999999999",
            "e5",
            ".",
            "+",
            "1e",
            "1e+",
            "++1",
            "+-1",
            "1.2.3",
            "0x10",
            "1_000",
            "0.00001",
            "10000000000",
            "1e10",
            "20.00001",
            "٣",
        ] {
            assert_eq!(text.parse::<Price>(), Err(InvalidPrice), "{text:?}");
        }
        assert_eq!("9".repeat(100_000).parse::<Price>(), Err(InvalidPrice));
    }

    #[test]
    fn a_decimal_is_a_price_where_its_text_is() {
        for text in [
            "20",
            "20.5000",
            "0.0001",
            "0.00010",
            "0.00001",
            "0.00000",
            "-1",
            "0",
            "9999999999.9999",
            "10000000000",
            "10000000000.0000",
            "9999999999.99990",
        ] {
            let decimal: Decimal = text.parse().unwrap();
            assert_eq!(Price::try_from(decimal), text.parse(), "{text}");
        }
    }

    #[test]
    fn every_price_survives_json() {
        for text in ["9999999999.9999", "1234567890.1234", "0.0001", "0.1", "0.3", "19.99", "4503599627.3705"] {
            let price: Price = text.parse().unwrap();
            assert_eq!(serde_json::from_str::<Price>(&json(text)).unwrap(), price, "{text}");
            assert_eq!(price.to_string(), text);
        }
    }
}

//! The id of an event: `<aggregate id>-<version>`.

/// The longest aggregate id, in bytes. It has to fit into an index and a header.
const LONGEST: usize = 200;

/// The aggregate and the version of an event id, or `None` if `id` has another form. See `Event::event_id`.
pub(crate) fn split(id: &str) -> Option<(&str, i64)> {
    let (aggregate_id, version) = id.rsplit_once('-')?;
    let is_id = (1..=LONGEST).contains(&aggregate_id.len()) && aggregate_id.bytes().all(|byte| byte.is_ascii_graphic());
    let is_version = !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit());
    if is_id && is_version { Some((aggregate_id, version.parse().ok()?)) } else { None }
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn an_event_id_is_an_aggregate_and_a_version() {
        let uuid = "0190a5f2-4f5c-7c3e-9b1a-2f3e4d5c6b7a";
        assert_eq!(split(&format!("{uuid}-12")), Some((uuid, 12)));
        assert_eq!(split("5f2b18a3e41d0c0012abcdef-0"), Some(("5f2b18a3e41d0c0012abcdef", 0)));
        assert_eq!(split("order-7-3"), Some(("order-7", 3)));
        let long = "x".repeat(201);
        for none in
            ["", "-", "-1", "a-", "a", "a--1x", "a-+1", "a-9223372036854775808", "a b-1", "é-1", &format!("{long}-1")]
        {
            assert_eq!(split(none), None, "{none:?}");
        }
    }
}

use clap::Parser;
use clap::error::ErrorKind;
use orders::Config;
use std::time::Duration;

fn parse(options: &[&str]) -> Result<Config, clap::Error> {
    let required = ["orders", "--database-url=postgres://127.0.0.1/orders", "--jwt-key=key"];
    Config::try_parse_from(required.iter().chain(options))
}

#[test]
fn the_time_to_pay_is_15_minutes_by_default_and_a_year_at_most() {
    assert_eq!(parse(&[]).unwrap().order_ttl, Duration::from_mins(15));
    for (text, expected) in [
        ("15m", Duration::from_mins(15)),
        ("90s", Duration::from_secs(90)),
        ("90", Duration::from_secs(90)),
        ("1h", Duration::from_hours(1)),
        ("500ms", Duration::from_millis(500)),
        ("1h 30m", Duration::from_mins(90)),
        ("2d", Duration::from_hours(48)),
        ("8784h", Duration::from_hours(366 * 24)),
    ] {
        assert_eq!(parse(&["--order-ttl", text]).unwrap().order_ttl, expected, "{text}");
    }
    for refused in [
        "",
        "soon",
        "367d",
        "8785h",
        "31622400001ms",
        "18446744073709551615ms",
        "18446744073709551615h",
        "99999999999999999999999h",
    ] {
        let error = parse(&["--order-ttl", refused]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ValueValidation, "{refused}: {error}");
        assert!(error.to_string().contains("--order-ttl"), "{error}");
    }
}

#[test]
fn help_lists_the_settings() {
    let help = parse(&["--help"]).unwrap_err();
    assert_eq!(help.kind(), ErrorKind::DisplayHelp);
    let help = help.to_string();
    for told in ["Time to pay an order", "--order-ttl", "ORDER_TTL", "15m", "DATABASE_URL", "NATS_URL", "JWT_KEY"] {
        assert!(help.contains(told), "{told} is missing: {help}");
    }
}

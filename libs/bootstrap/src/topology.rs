//! The built-in files of streams and consumers.
//!
//! The directory `jetstream` of this package is a link to `infra/jetstream`.

use event_bus::Topology;

macro_rules! files {
    ($($name:literal),* $(,)?) => { [$(($name, include_str!(concat!("../jetstream/", $name)))),*] };
}

const FILES: [(&str, &str); 8] = files![
    "TICKETS.stream.json",
    "TICKETS.orders.consumer.json",
    "ORDERS.stream.json",
    "ORDERS.tickets.consumer.json",
    "PAYMENTS.stream.json",
    "PAYMENTS.orders.consumer.json",
    "EXPIRATION.stream.json",
    "EXPIRATION.orders.consumer.json",
];

/// The streams and consumers of tickets and orders, used if `TOPOLOGY` names no directory.
///
/// # Panics
/// Never: a test parses the files.
pub fn built_in() -> Topology {
    Topology::parse(FILES).expect("the built-in files are valid")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use std::path::Path;

    #[test]
    fn every_file_of_the_directory_is_built_in_and_valid() {
        let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/jetstream"));
        assert_eq!(built_in(), Topology::read(directory).unwrap());
        let files = std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().file_name());
        let mut files: Vec<_> = files.map(|name| name.into_string().unwrap()).collect();
        files.sort();
        let mut built_in = FILES.map(|(name, _)| name);
        built_in.sort_unstable();
        assert_eq!(files, built_in);
    }
}

//! Streams and durable consumers, in NATS' own JSON format.
//!
//! A file is named after what it describes: `INVOICES.stream.json` is the stream `INVOICES`, and
//! `INVOICES.ledger.consumer.json` is the durable consumer `ledger` of that stream. All options are sent to the server
//! unchanged, also those that this library does not know. `rules` lists the options that break a guarantee of the bus;
//! `provision` creates and changes what is on the server.

mod provision;
mod rules;

pub use provision::provision;
pub(crate) use provision::{Drift, PROVISIONING, Provisioner, ask};

use rules::Rule;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

/// The options of a stream or a consumer.
type Options = Map<String, Value>;

/// A set of streams and durable consumers.
///
/// A file with an option that breaks a guarantee of the bus is refused when it is parsed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Topology {
    streams: BTreeMap<String, Options>,
    /// By stream and name.
    consumers: BTreeMap<(String, String), Options>,
}

/// Why files are refused as a topology.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// A file or the directory cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// What cannot be read.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The directory holds no file of a stream or a consumer.
    #[error("{} holds no file <STREAM>.stream.json or <STREAM>.<CONSUMER>.consumer.json", .0.display())]
    Empty(PathBuf),
    /// The name of the file has another form.
    #[error("{file}: name it <STREAM>.stream.json or <STREAM>.<CONSUMER>.consumer.json")]
    Name {
        /// The name of the file.
        file: String,
    },
    /// Two files have the same name.
    #[error("{file}: there are two files of this name")]
    Twice {
        /// The name of the file.
        file: String,
    },
    /// The file is not a JSON object.
    #[error("{file}: not a JSON object: {error}")]
    Json {
        /// The name of the file.
        file: String,
        /// What is wrong with it.
        error: serde_json::Error,
    },
    /// The bus cannot work with this value of an option.
    #[error("{file}: {option} is {}: {reason}", shown(value))]
    Option {
        /// The name of the file.
        file: String,
        /// The option.
        option: &'static str,
        /// Its value; null if it is absent.
        value: Value,
        /// What it breaks, or what to do.
        reason: String,
    },
}

impl Topology {
    /// Parses files, given by name and content.
    ///
    /// # Errors
    /// A file is refused. The error describes the first one.
    pub fn parse<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, TopologyError> {
        let mut topology = Self::default();
        for (file, content) in files {
            topology.add(file, content)?;
        }
        Ok(topology)
    }

    /// Reads the files of a directory whose names end in `.json`. Hidden files are skipped.
    ///
    /// # Errors
    /// A file cannot be read or is refused, or there is none.
    pub fn read(directory: &Path) -> Result<Self, TopologyError> {
        let error = |path: &Path| {
            let path = path.to_owned();
            |error| TopologyError::Read { path, error }
        };
        let mut topology = Self::default();
        for entry in fs::read_dir(directory).map_err(error(directory))? {
            let name = entry.map_err(error(directory))?.file_name();
            let name = name.to_string_lossy();
            if name.ends_with(".json") && !name.starts_with('.') {
                let path = directory.join(&*name);
                topology.add(&name, &fs::read_to_string(&path).map_err(error(&path))?)?;
            }
        }
        if topology.streams.is_empty() && topology.consumers.is_empty() {
            return Err(TopologyError::Empty(directory.to_owned()));
        }
        Ok(topology)
    }

    fn add(&mut self, file: &str, content: &str) -> Result<(), TopologyError> {
        let options = serde_json::from_str(content);
        let options: Options = options.map_err(|error| TopologyError::Json { file: file.to_owned(), error })?;
        let replaced = if let Some(stream) = file.strip_suffix(".stream.json").filter(|name| is_name(name)) {
            check(file, &options, rules::STREAM)?;
            let options = named(file, options, "name", stream)?;
            self.streams.insert(stream.to_owned(), options)
        } else if let Some((stream, consumer)) = consumer_of(file) {
            check(file, &options, rules::CONSUMER)?;
            let options = named(file, options, "durable_name", consumer)?;
            self.consumers.insert((stream.to_owned(), consumer.to_owned()), options)
        } else {
            return Err(TopologyError::Name { file: file.to_owned() });
        };
        if replaced.is_some() {
            return Err(TopologyError::Twice { file: file.to_owned() });
        }
        Ok(())
    }
}

/// Prints names only, because the options are long.
impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let consumers = self.consumers.keys().map(|(stream, name)| format!("{stream}.{name}"));
        f.debug_list().entries(self.streams.keys()).entries(consumers).finish()
    }
}

/// The stream and the consumer that a file is named after.
fn consumer_of(file: &str) -> Option<(&str, &str)> {
    let (stream, consumer) = file.strip_suffix(".consumer.json")?.split_once('.')?;
    (is_name(stream) && is_name(consumer)).then_some((stream, consumer))
}

/// Whether `name` is one token of a subject.
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || ".*>/\\".contains(c))
}

/// Sets the option that repeats the name of the file. Refuses another value of this option.
fn named(file: &str, mut options: Options, option: &'static str, name: &str) -> Result<Options, TopologyError> {
    match options.insert(option.to_owned(), name.into()) {
        Some(value) if value != name => {
            let reason = format!("the file is that of {name}");
            Err(TopologyError::Option { file: file.to_owned(), option, value, reason })
        }
        _ => Ok(options),
    }
}

fn check(file: &str, options: &Options, rules: &[Rule]) -> Result<(), TopologyError> {
    for Rule { option, allows, reason } in rules {
        let value = options.get(*option).unwrap_or(&Value::Null);
        if !allows(value) {
            let (file, reason) = (file.to_owned(), (*reason).to_owned());
            return Err(TopologyError::Option { file, option, value: value.clone(), reason });
        }
    }
    Ok(())
}

/// Whether the server treats this value as absent.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// A value as text for errors and logs.
fn shown(value: &Value) -> String {
    if value.is_null() { "absent".to_owned() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn error(file: &str, content: &str) -> String {
        Topology::parse([(file, content)]).unwrap_err().to_string()
    }

    #[test]
    fn a_file_is_named_after_its_stream_or_consumer() {
        let topology = Topology::parse([
            ("INVOICES.stream.json", r#"{"discard": "new"}"#),
            ("INVOICES.ledger.consumer.json", r#"{"ack_policy": "explicit", "durable_name": "ledger"}"#),
        ]);
        let topology = topology.unwrap();
        assert_eq!(topology.streams["INVOICES"]["name"], "INVOICES");
        assert_eq!(topology.consumers[&("INVOICES".to_owned(), "ledger".to_owned())]["durable_name"], "ledger");
        assert_eq!(format!("{topology:?}"), r#"["INVOICES", "INVOICES.ledger"]"#);
    }

    #[test]
    fn a_file_that_contradicts_its_name_is_refused() {
        for file in
            ["a.json", ".stream.json", "A.B.stream.json", "A.consumer.json", "A.b.c.consumer.json", "A.*.consumer.json"]
        {
            assert!(error(file, "{}").contains("name it"), "{file}");
        }
        let wrong = error("INVOICES.stream.json", r#"{"discard": "new", "name": "OTHER"}"#);
        assert_eq!(wrong, r#"INVOICES.stream.json: name is "OTHER": the file is that of INVOICES"#);
        let wrong = error("INVOICES.ledger.consumer.json", r#"{"ack_policy": "explicit", "durable_name": "l"}"#);
        assert!(wrong.contains("durable_name is \"l\""), "{wrong}");
    }

    #[test]
    fn a_file_that_is_no_json_object_is_refused() {
        for content in ["", "[]", "{", "{} {}"] {
            assert!(error("A.stream.json", content).starts_with("A.stream.json: not a JSON object"), "{content}");
        }
    }

    #[test]
    fn the_same_file_twice_is_refused() {
        let file = ("A.stream.json", r#"{"discard": "new"}"#);
        assert!(Topology::parse([file, file]).unwrap_err().to_string().contains("two files"));
    }

    #[test]
    fn a_directory_without_files_or_that_is_missing_is_refused() {
        let missing = Topology::read(Path::new("/none")).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read /none: "), "{missing}");
        let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
        assert!(Topology::read(source).unwrap_err().to_string().contains("holds no file"));
    }
}

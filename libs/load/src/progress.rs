use std::io::{Write, stdout};

/// Prints a result as soon as it is known.
pub(crate) fn print(line: &str) {
    // A closed terminal is no reason to stop.
    let _ = writeln!(stdout(), "{line}");
}

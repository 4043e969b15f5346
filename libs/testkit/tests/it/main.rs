//! The servers for tests, and their faults.

mod containers;

//! The servers that tests start, and the faults they can suffer.

mod containers;

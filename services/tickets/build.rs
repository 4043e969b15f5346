//! Cargo does not know by itself that a new migration changes what `migrate!` builds in.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}

//! What README.md repeats from the code: output, code and names of tests.

use crate::blocks::block;
use crate::overlay::ROOT;
use anyhow::{Context, Result, ensure};
use stack::services::SERVICES;

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(format!("{ROOT}/{path}")).with_context(|| path.to_owned())
}

#[test]
fn the_output_of_cargo_up_is_what_it_prints() -> Result<()> {
    let welcome = read("libs/stack/src/welcome.rs")?;
    let block = block("Ready. Ctrl-C ends it.")?;
    let (first, addresses) = block.split_once("\n\n").context("a line, and addresses")?;
    ensure!(welcome.contains(&format!("\n{first}\n")), "`cargo up` does not print {first:?}");
    let printed = SERVICES.map(|service| format!("  {:<11} http://127.0.0.1:{}", service.name, service.port));
    ensure!(addresses == printed.join("\n"), "`cargo up` prints other addresses than:\n{addresses}");
    Ok(())
}

#[test]
fn the_code_of_a_service_is_in_the_service() -> Result<()> {
    let code = ["lib.rs", "ticket_events.rs"].map(|file| read(&format!("services/orders/src/{file}")));
    let code = code.into_iter().collect::<Result<String>>()?;
    // A blank line and a closing brace separate the items, as rustfmt writes them.
    for item in block("pub async fn start(")?.split("\n}\n\n") {
        ensure!(code.contains(item), "services/orders has no such code:\n{item}");
    }
    Ok(())
}

/// A row of the table ends with a filter for `cargo test`: a module of `tests/it`, or the beginning of one of its tests.
#[test]
fn each_fault_in_the_readme_has_one_test_module_or_test() -> Result<()> {
    let readme = read("README.md")?;
    let rows = readme.lines().skip_while(|line| *line != "| fault | result | test |").skip(2);
    let filters: Vec<_> = rows.map_while(|row| row.strip_suffix("` |")?.rsplit('`').next()).collect();
    ensure!(filters.len() > 10, "the table of faults has only the tests {filters:?}");
    for filter in filters {
        let (module, test) = filter.split_once("::").unwrap_or((filter, ""));
        let tests = read(&format!("libs/stack/tests/it/{module}.rs"))?;
        let tests: Vec<_> = tests
            .split("#[tokio::test]\nasync fn ")
            .skip(1)
            .filter(|function| function.starts_with(test))
            .filter_map(|function| function.split('(').next())
            .collect();
        ensure!(tests.len() == 1, "the tests of {filter} are {tests:?}");
    }
    Ok(())
}

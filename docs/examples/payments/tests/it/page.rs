//! The code in `docs/a-service-of-your-own.md` is that of the files.

macro_rules! files {
    ($($name:literal),* $(,)?) => { [$(include_str!(concat!("../../", $name))),*] };
}

const PAGE: &str = include_str!("../../../../a-service-of-your-own.md");

const FILES: [&str; 13] = files![
    "build.rs",
    "tests/it/shop.rs",
    "tests/it/killing.rs",
    "src/main.rs",
    "src/api.rs",
    "src/charge.rs",
    "src/orders.rs",
    "migrations/0001_payments.sql",
    "grants.sql",
    "roles.sql",
    "jetstream/ORDERS.payments.consumer.json",
    "../../../libs/contracts/src/neighbours.rs",
    "../../../infra/nats/users.conf",
];

#[test]
fn the_code_of_the_page_is_that_of_the_files() {
    let mut checked = 0;
    // Every second part is inside of a pair of fences, and begins with its language.
    for block in PAGE.split("```").skip(1).step_by(2) {
        let (language, code) = block.split_once('\n').unwrap();
        if language == "toml" {
            continue; // for another repository
        }
        // Statements that the file has with others between them.
        for part in code.split_terminator("\n\n") {
            let part = part.trim_end();
            assert!(FILES.iter().any(|file| file.contains(part)), "no file has this {language}:\n{part}");
        }
        checked += 1;
    }
    assert!(checked > 10, "{checked} blocks");
}

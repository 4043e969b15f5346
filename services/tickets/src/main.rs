fn main() -> std::process::ExitCode {
    tickets::main(std::env::args_os())
}

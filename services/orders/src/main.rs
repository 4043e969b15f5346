fn main() -> std::process::ExitCode {
    orders::main(std::env::args_os())
}

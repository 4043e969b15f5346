use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Below the range of the kernel for outgoing connections (32768…).
///
/// A client could take a port of that range while its owner restarts. A client that reconnects to a dead port of that range
/// can even connect to itself.
const PORTS: std::ops::Range<u16> = 15_000..30_000;

static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(RandomState::new().hash_one(())));

/// A free port on 127.0.0.1, not returned lately by this process, that stays free while its owner restarts.
pub fn free_port() -> u16 {
    loop {
        let turn = NEXT.fetch_add(1, Ordering::Relaxed) % PORTS.len() as u64;
        let port = PORTS.start + u16::try_from(turn).expect("less than the number of ports");
        if is_free(port) {
            return port;
        }
    }
}

/// The first free port from `start` upwards.
pub fn free_port_from(start: u16) -> u16 {
    (start..=u16::MAX).find(|&port| is_free(port)).unwrap_or_else(free_port)
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

//! A bounded number of open connections: an idle connection never blocks a new one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Connections beyond the limit while all others are busy, for health checks and 503 responses.
const SPARE: usize = 64;

/// At most `limit` connections, and [`SPARE`] more while all are busy.
///
/// At the limit, a new connection closes the one that has been idle longest, or, if none is idle, the one that has been
/// sending a body longest. A connection whose request is in its handler is never closed.
pub(crate) struct Connections {
    limit: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, Arc<Connection>>,
}

/// The phase of a connection, and the token that closes it.
pub(crate) struct Connection {
    phase: Mutex<Phase>,
    close: CancellationToken,
}

/// The phases, in the order in which connections are closed for new ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Since then before a request, between two, or within the head of one.
    Idle(Instant),
    /// Since then within the body of a request.
    Receiving(Instant),
    /// In the handler, or in the response.
    Busy,
    /// No new request is accepted.
    Closed,
}

/// An entry among the open connections, until it is dropped.
pub(crate) struct Entry {
    connections: Arc<Connections>,
    number: u64,
    pub(crate) connection: Arc<Connection>,
}

/// A request on a connection; dropped when its response has ended.
pub(crate) struct Busy(Arc<Connection>);

impl Connections {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, open: Mutex::default() })
    }

    /// Registers a new connection. Beyond the limit it closes another one.
    ///
    /// If all others are busy, and [`SPARE`] is used up too, the new connection itself is closed.
    pub(crate) fn open(self: &Arc<Self>) -> Entry {
        let connection =
            Arc::new(Connection { phase: Mutex::new(Phase::Idle(Instant::now())), close: CancellationToken::new() });
        let mut open = self.lock();
        let number = open.next;
        open.next += 1;
        open.connections.insert(number, connection.clone());
        let count = open.connections.len();
        if count > self.limit && !open.close_one(Some(number)) && count > self.limit + SPARE {
            open.close_one(None);
        }
        Entry { connections: self.clone(), number, connection }
    }

    /// Closes a connection, unless all are busy.
    pub(crate) fn close_one(&self) {
        self.lock().close_one(None);
    }

    /// Closes all connections, in any phase.
    pub(crate) fn close_all(&self) {
        for connection in self.lock().connections.values() {
            connection.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Closes the first connection in the order of phases, except `but`. Returns false if all are busy.
    fn close_one(&mut self, but: Option<u64>) -> bool {
        loop {
            let others = self.connections.iter().filter(|(number, _)| Some(**number) != but);
            let first = others.map(|(number, connection)| (*connection.phase(), *number)).min();
            let Some((phase @ (Phase::Idle(_) | Phase::Receiving(_)), number)) = first else { return false };
            // Unless a request began in between.
            if self.connections.get(&number).is_some_and(|connection| connection.close_if(phase)) {
                self.connections.remove(&number);
                return true;
            }
        }
    }
}

impl Connection {
    /// Closes the connection, in any phase.
    pub(crate) fn close(&self) {
        *self.phase() = Phase::Closed;
        self.close.cancel();
    }

    pub(crate) async fn closed(&self) {
        self.close.cancelled().await;
    }

    /// A request begins. Returns `None` if the connection is closed.
    pub(crate) fn begin(self: &Arc<Self>) -> Option<Busy> {
        let mut phase = self.phase();
        if *phase == Phase::Closed {
            return None;
        }
        *phase = Phase::Busy;
        Some(Busy(self.clone()))
    }

    /// The body of its request is being received.
    pub(crate) fn receiving(&self) {
        self.change(Phase::Busy, Phase::Receiving(Instant::now()));
    }

    /// The body of its request was received.
    pub(crate) fn received(&self) {
        let mut phase = self.phase();
        if matches!(*phase, Phase::Receiving(_)) {
            *phase = Phase::Busy;
        }
    }

    fn close_if(&self, expected: Phase) -> bool {
        let closed = self.change(expected, Phase::Closed);
        if closed {
            debug!("too many connections are open, the one that has done nothing for longest is closed");
            self.close.cancel();
        }
        closed
    }

    fn change(&self, expected: Phase, to: Phase) -> bool {
        let mut phase = self.phase();
        let matches = *phase == expected;
        if matches {
            *phase = to;
        }
        matches
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut phase = self.0.phase();
        if *phase != Phase::Closed {
            *phase = Phase::Idle(Instant::now());
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connections.lock().connections.remove(&self.number);
    }
}

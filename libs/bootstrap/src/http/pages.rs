//! A bounded number of pages of lists in memory, over all connections.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::connections::Connection;

/// Pages in memory at once. A page is at most 64 kB and one item, so all are at most 10 MB.
const AT_ONCE: usize = 64;

/// Concurrent reads of later pages. Most connections to Postgres are for new requests.
const READING: usize = 4;

/// The time in which a client must read a page while other lists wait for room.
const PATIENCE: Duration = Duration::from_millis(100);

/// Room for [`AT_ONCE`] pages.
///
/// When it is full, the connection with the page that is unread for longest is closed, so that slow clients do not block
/// others.
pub(crate) struct Pages {
    /// A permit is held while a page that is not the first of its list is read.
    pub(crate) reading: Semaphore,
    room: Arc<Semaphore>,
    sending: Mutex<Sending>,
}

#[derive(Default)]
struct Sending {
    next: u64,
    /// The pages that are being sent, oldest first.
    pages: BTreeMap<u64, (Instant, Arc<Connection>)>,
}

/// Room for one page, until it is dropped.
pub(crate) struct Room {
    pages: Arc<Pages>,
    /// Its number among the pages that are being sent.
    number: Option<u64>,
    _permit: OwnedSemaphorePermit,
}

impl Pages {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            reading: Semaphore::new(READING),
            room: Arc::new(Semaphore::new(AT_ONCE)),
            sending: Mutex::default(),
        })
    }

    /// Waits for room for one page.
    pub(crate) async fn room(self: &Arc<Self>) -> Room {
        let mut permit = std::pin::pin!(self.room.clone().acquire_owned());
        let mut pause = Duration::ZERO;
        let permit = loop {
            tokio::select! {
                biased;
                permit = permit.as_mut() => break permit.expect("it is never closed"),
                () = sleep(pause) => {
                    self.give_up_one(PATIENCE);
                    pause = PATIENCE;
                }
            }
        };
        Room { pages: self.clone(), number: None, _permit: permit }
    }

    /// Closes the connection with the page that is unread for longest, if that is longer than `patience`.
    pub(crate) fn give_up_one(&self, patience: Duration) -> bool {
        let mut sending = self.sending();
        let Some(oldest) = sending.pages.first_entry() else { return false };
        if oldest.get().0.elapsed() < patience {
            return false;
        }
        let (_, connection) = oldest.remove();
        connection.close();
        debug!("a client that does not take its page of a list is given up");
        true
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Room {
    /// Registers a page that is sent over `connection`. Its room is free again when the page is written or dropped.
    pub(crate) fn send(mut self, page: Vec<u8>, connection: Arc<Connection>) -> Bytes {
        let mut sending = self.pages.sending();
        let number = sending.next;
        sending.next += 1;
        sending.pages.insert(number, (Instant::now(), connection));
        drop(sending);
        self.number = Some(number);
        Bytes::from_owner(Page { bytes: page, _room: self })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.pages.sending().pages.remove(&number);
        }
    }
}

struct Page {
    bytes: Vec<u8>,
    _room: Room,
}

impl AsRef<[u8]> for Page {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

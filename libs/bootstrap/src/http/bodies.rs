//! The bytes of request bodies, bounded over all connections.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tracing::debug;

use crate::error::ApiError;

/// Limits the bytes of all bodies together.
///
/// When a body needs more bytes than are free, the oldest unfinished body is dropped ([`ApiError::TooSlow`]): among many
/// slow clients, that is never the body of a client that sends at normal speed.
pub(crate) struct Bodies {
    limit: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// The bytes of unfinished bodies, and of bodies whose handler has not ended.
    bytes: usize,
    next: u64,
    /// Ordered by age, oldest first. The bytes are here, so that dropping a body frees them at once.
    unfinished: BTreeMap<u64, Unfinished>,
    /// Segments of finished bodies, reused until no body is unfinished.
    ///
    /// The allocator would return them to the arena of another thread and take new ones. Under 1,300 slow bodies, this took
    /// a quarter more memory.
    free: Vec<Vec<u8>>,
}

struct Unfinished {
    /// All are full except the last.
    ///
    /// One growing vector would leave gaps of all sizes between those of other bodies. Under 1,300 slow bodies, this took a
    /// sixth more memory.
    segments: Vec<Vec<u8>>,
    given_up: Arc<Notify>,
}

/// Bytes of a segment. Memory is counted in segments.
const SEGMENT: usize = 4096;

/// A body that is being received. Dropping it frees its bytes.
pub(crate) struct Receiving {
    bodies: Arc<Bodies>,
    number: u64,
    given_up: Arc<Notify>,
}

/// The bytes of a received body count until this is dropped.
pub(crate) struct Charge {
    bodies: Arc<Bodies>,
    bytes: usize,
}

impl Bodies {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, held: Mutex::default() })
    }

    pub(crate) fn begin(self: &Arc<Self>) -> Receiving {
        let given_up = Arc::<Notify>::default();
        let mut held = self.held();
        let number = held.next;
        held.next += 1;
        held.unfinished.insert(number, Unfinished { segments: Vec::new(), given_up: given_up.clone() });
        Receiving { bodies: self.clone(), number, given_up }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Drops the oldest unfinished body. Returns false if no unfinished body holds any bytes.
    fn give_up_oldest(&mut self) -> bool {
        let oldest = self.unfinished.iter().find(|(_, body)| !body.segments.is_empty()).map(|(number, _)| *number);
        let Some(body) = oldest.and_then(|number| self.unfinished.remove(&number)) else { return false };
        body.given_up.notify_one();
        debug!(bytes = body.size(), "MAX_BODY_BYTES are used up, the oldest unfinished request body is given up");
        self.free(body);
        true
    }

    fn free(&mut self, body: Unfinished) {
        self.bytes -= body.size();
        if self.unfinished.is_empty() {
            self.free.clear();
        } else {
            self.free.extend(body.segments.into_iter().map(|mut segment| {
                segment.clear();
                segment
            }));
        }
    }
}

impl Receiving {
    /// # Errors
    /// `TooSlow`: the body was dropped. `Unavailable`: handlers hold all bytes of the limit.
    pub(crate) fn append(&self, mut chunk: &[u8]) -> Result<(), ApiError> {
        let mut held = self.bodies.held();
        let held = &mut *held;
        while !chunk.is_empty() {
            let body = held.unfinished.get_mut(&self.number).ok_or(ApiError::TooSlow)?;
            let last = body.segments.last_mut().filter(|last| last.len() < SEGMENT);
            if let Some(last) = last {
                let (now, rest) = chunk.split_at(chunk.len().min(SEGMENT - last.len()));
                last.extend_from_slice(now);
                chunk = rest;
            } else if held.bytes + SEGMENT <= self.bodies.limit {
                body.segments.push(held.free.pop().unwrap_or_else(|| Vec::with_capacity(SEGMENT)));
                held.bytes += SEGMENT;
            } else if !held.give_up_oldest() {
                return Err(ApiError::Unavailable);
            }
        }
        Ok(())
    }

    /// Waits until the body is dropped.
    pub(crate) async fn given_up(&self) {
        self.given_up.notified().await;
    }

    /// The whole body.
    pub(crate) fn finish(self) -> Result<(Vec<u8>, Charge), ApiError> {
        let mut held = self.bodies.held();
        let body = held.unfinished.remove(&self.number).ok_or(ApiError::TooSlow)?;
        let bytes = body.segments.concat();
        held.free(body);
        held.bytes += bytes.len();
        drop(held);
        let charge = Charge { bodies: self.bodies.clone(), bytes: bytes.len() };
        Ok((bytes, charge))
    }
}

impl Unfinished {
    fn size(&self) -> usize {
        self.segments.len() * SEGMENT
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let mut held = self.bodies.held();
        if let Some(body) = held.unfinished.remove(&self.number) {
            held.free(body);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.bodies.held().bytes -= self.bytes;
    }
}

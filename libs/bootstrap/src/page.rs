//! Which part of a list a client wants.

use contracts::Id;
use serde::Deserialize;
use std::num::NonZeroU32;

/// The query of a list, `?limit=<number>&after=<id>`. Without it, a list is whole. Anything malformed is a bad request.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Page {
    /// Items at most.
    pub limit: Option<NonZeroU32>,
    /// The last item of the page before.
    pub after: Option<Id>,
}

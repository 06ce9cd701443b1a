//! The names two hosts share, as `migration` defines them: checked wherever they come from.

pub use crate::migration::{ContainerId, JournalId, MigrationId};

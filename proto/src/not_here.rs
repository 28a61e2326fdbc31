//! How a host says over gRPC that it does not have a sprite, so that it cannot be mixed up with "no such checkpoint" or any other absence.

use tonic::{Status, metadata::MetadataValue};

use crate::{
    id::SpriteId,
    paths::{NOT_HERE, SPRITE_ERROR_HEADER},
};

/// The host's answer.
pub fn not_here(id: SpriteId) -> Status {
    let mut status = Status::not_found(format!("sprite {id} is not on this host"));
    status.metadata_mut().insert(SPRITE_ERROR_HEADER, MetadataValue::from_static(NOT_HERE));
    status
}

/// Whether a host answered [`not_here`].
pub fn is_not_here(status: &Status) -> bool {
    status.metadata().get(SPRITE_ERROR_HEADER).is_some_and(|code| code.as_bytes() == NOT_HERE.as_bytes())
}

//! Headers that our own processes add to a request on its way to a sprite. The edge strips all of them from outside requests.

/// The sprite a data-plane request is for, a bare uuid.
pub const SPRITE_ID_HEADER: &str = "x-sprite-id";

/// Set by the edge on a request for the sprite's own URL: forward to this guest port.
pub const SPRITE_PORT_HEADER: &str = "x-sprite-port";

/// What a wake cost this request: `none`, `paused`, `memory`, `disk`.
pub const SPRITE_WAKE_HEADER: &str = "x-sprite-wake";

/// Machine-readable error code of the edge and the node, as in `docs/errors.md`.
pub const SPRITE_ERROR_HEADER: &str = "x-sprite-error";

/// The port of a sprite that its URL reaches.
pub const DEFAULT_HTTP_PORT: u16 = 8080;

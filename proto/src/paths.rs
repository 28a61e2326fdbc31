//! Words on the wire that several of our processes must spell alike. The edge strips the `x-sprite-*` headers from outside requests.

/// The sprite a data-plane request is for, a bare uuid.
pub const SPRITE_ID_HEADER: &str = "x-sprite-id";

/// Set by the edge on a request for the sprite's own URL: forward to this guest port.
pub const SPRITE_PORT_HEADER: &str = "x-sprite-port";

/// What a wake cost this request: `none`, `paused`, `memory`, `disk`.
pub const SPRITE_WAKE_HEADER: &str = "x-sprite-wake";

/// Machine-readable error code of the edge and the node, as in `docs/errors.md`.
pub const SPRITE_ERROR_HEADER: &str = "x-sprite-error";

/// The code in [`SPRITE_ERROR_HEADER`] of a host that does not have the sprite it was asked for: the route was stale.
pub const NOT_HERE: &str = "SPR-N01";

/// Which version of the Sprites dialect we speak, in `sprite-version`: clients attach to sessions by path from `0.0.1-rc30` on, and take what is
/// older for another dialect.
pub const DIALECT_VERSION: &str = "0.1.0";

/// The entry of a list of checkpoints that stands for the live state.
pub const CURRENT_CHECKPOINT: &str = "Current";

/// The port of a sprite that its URL reaches.
pub const DEFAULT_HTTP_PORT: u16 = 8080;

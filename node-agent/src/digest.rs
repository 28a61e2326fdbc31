//! Digests of files and texts that name cached things.

use std::{fs::File, io, path::Path};

/// 24 hex characters of BLAKE3: enough to name a cache entry, short enough for a path.
pub(crate) fn short(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..24].to_owned()
}

/// Digest of the content of several files, in order.
pub(crate) fn of_files(paths: &[&Path]) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        hasher.update_reader(File::open(path)?)?;
    }
    Ok(hasher.finalize().to_hex()[..24].to_owned())
}

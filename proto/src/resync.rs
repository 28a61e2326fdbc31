//! The resync marker that begins every session on the control channel (ruling 18).
//!
//! A virtio-serial port is a byte stream without connections: after a restore, or when the node agent was restarted, both ends may still
//! hold half a conversation in their buffers, and half-consumed buffers are part of a saved VM. So a session begins like this:
//!
//! ```text
//!  host                                     guest
//!   │ MAGIC_HOST ‖ 16 random bytes  ────────▶ │  discards everything until MAGIC_HOST, at any time: a new marker ends the session before
//!   │ ◀──────── MAGIC_GUEST ‖ the same bytes  │
//!   │ discards until exactly that             │
//!   └───────────── HTTP/2 ────────────────────┘
//! ```
//!
//! The marker is [`MARKER_LEN`] bytes. The guest sees the host leave as end-of-file on the port and then waits for the next marker. The random
//! half is chosen by the host for each session, so that an old answer in a buffer cannot be taken for the new one.

use std::io;

use tokio_io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use tokio::io as tokio_io;

/// Length of a marker: magic and nonce.
pub const MARKER_LEN: usize = 32;
const MAGIC_LEN: usize = 16;
const MAGIC_HOST: [u8; MAGIC_LEN] = *b"\xf5sprite-host\x00\x01\xfe\xf6";
const MAGIC_GUEST: [u8; MAGIC_LEN] = *b"\xf5sprite-guest\x01\xfe\xf6";

/// Bytes the other side may send before its marker; more means that it does not speak our protocol.
const GARBAGE_BYTES_MAX: usize = 64 << 20;

/// The marker a host sends to begin the session `nonce`.
pub fn host_marker(nonce: [u8; 16]) -> [u8; MARKER_LEN] {
    join(MAGIC_HOST, nonce)
}

/// The guest's answer to [`host_marker`].
pub fn guest_marker(nonce: [u8; 16]) -> [u8; MARKER_LEN] {
    join(MAGIC_GUEST, nonce)
}

fn join(magic: [u8; MAGIC_LEN], nonce: [u8; 16]) -> [u8; MARKER_LEN] {
    let mut marker = [0; MARKER_LEN];
    marker[..MAGIC_LEN].copy_from_slice(&magic);
    marker[MAGIC_LEN..].copy_from_slice(&nonce);
    marker
}

/// Host side: sends the marker and discards input until the guest's answer. The caller sets the deadline.
///
/// Not cancel safe: after a cancelled call begin again with a new nonce.
///
/// # Errors
///
/// End-of-file, an I/O error, or `InvalidData` when [`GARBAGE_BYTES_MAX`] came without the answer.
pub async fn host_handshake<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, nonce: [u8; 16]) -> io::Result<()> {
    stream.write_all(&host_marker(nonce)).await?;
    stream.flush().await?;
    read_until(stream, &guest_marker(nonce)).await
}

/// Guest side: discards input until a host's marker and returns its nonce. The caller then writes [`guest_marker`].
///
/// # Errors
///
/// As [`host_handshake`].
pub async fn guest_accept<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<[u8; 16]> {
    read_until(stream, &MAGIC_HOST).await?;
    let mut nonce = [0; 16];
    stream.read_exact(&mut nonce).await?;
    Ok(nonce)
}

/// Reads byte by byte, so that nothing behind `wanted` is consumed. Only used for a few hundred bytes, once a session.
async fn read_until<S: AsyncRead + Unpin>(stream: &mut S, wanted: &[u8]) -> io::Result<()> {
    let mut window = Vec::with_capacity(wanted.len());
    for _ in 0..GARBAGE_BYTES_MAX {
        if window.len() == wanted.len() {
            window.remove(0);
        }
        window.push(stream.read_u8().await?);
        if window == wanted {
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "no marker from the other side of the control channel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_sides_meet_behind_garbage() {
        let (mut host, mut guest) = tokio_io::duplex(4096);
        guest.write_all(b"PRI * HTTP/2.0 half a frame \xf5sprite-guest").await.unwrap();
        host.write_all(b"\xf5sprite-hos stale").await.unwrap();
        let guest_side = tokio::spawn(async move {
            let nonce = guest_accept(&mut guest).await.unwrap();
            guest.write_all(&guest_marker(nonce)).await.unwrap();
            guest.write_all(b"first").await.unwrap();
            let mut next = [0; 5];
            guest.read_exact(&mut next).await.unwrap();
            assert_eq!(&next, b"hello");
        });
        host_handshake(&mut host, [7; 16]).await.unwrap();
        host.write_all(b"hello").await.unwrap();
        let mut first = [0; 5];
        host.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"first");
        guest_side.await.unwrap();
    }

    #[tokio::test]
    async fn an_answer_to_an_older_session_is_discarded() {
        let (mut host, mut guest) = tokio_io::duplex(4096);
        guest.write_all(&guest_marker([1; 16])).await.unwrap();
        guest.write_all(&guest_marker([2; 16])).await.unwrap();
        host_handshake(&mut host, [2; 16]).await.unwrap();
    }
}

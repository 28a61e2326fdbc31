//! WebSockets of the API: a handshake whose refusal can be read, and the bounds for what follows.

use std::time::Duration;

use http::{StatusCode, header};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message, Utf8Bytes,
        handshake::{client::generate_key, derive_accept_key},
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    api::{Api, Call, CallError, LONG_LIMIT},
    failure::Failure,
    output,
    target::Target,
};

pub(crate) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Servers keep to 1 MiB; more is a mistake.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// For what lies in between, and so that a server notices us going.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(15);
/// Without any frame for this long the other side is dead: it answers our pings and sends its own.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(45);
/// A sprite on the move is worth waiting for; the request was not carried out.
const RETRIES_MAX: u32 = 4;
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);

/// The regular end, with a status: some servers take none for a failure.
pub(crate) fn goodbye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() }))
}

impl Api {
    /// Opens a WebSocket. A 503 with `Retry-After` is tried again for a while.
    pub(crate) async fn websocket(&self, target: &Target) -> Result<Socket, CallError> {
        for _ in 0..RETRIES_MAX {
            match self.handshake(target).await {
                Err(CallError::Refused(refused))
                    if refused.status == StatusCode::SERVICE_UNAVAILABLE && refused.retry_after.is_some() =>
                {
                    let pause =
                        refused.retry_after.unwrap_or_default().clamp(Duration::from_millis(100), RETRY_AFTER_MAX);
                    output::with_spinner(&refused.error, tokio::time::sleep(pause)).await;
                }
                done => return done,
            }
        }
        self.handshake(target).await
    }

    async fn handshake(&self, target: &Target) -> Result<Socket, CallError> {
        let key = generate_key();
        let mut call = Call::get(target.clone())
            .within(LONG_LIMIT)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13");
        let value =
            header::HeaderValue::from_str(&key).map_err(|error| Failure::new(format!("a WebSocket key: {error}")))?;
        call.headers.insert(header::SEC_WEBSOCKET_KEY, value);
        let answer = self.send(&call).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(CallError::Refused(self.refusal(answer, call.limit).await?));
        }
        let accepted = answer.headers().get(header::SEC_WEBSOCKET_ACCEPT).map(header::HeaderValue::as_bytes);
        if accepted != Some(derive_accept_key(key.as_bytes()).as_bytes()) {
            return Err(Failure::new(format!("{} does not speak WebSocket", self.dialer.origin.url)).into());
        }
        let upgraded = hyper::upgrade::on(answer).await.map_err(|error| self.broken(&error))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await)
    }
}

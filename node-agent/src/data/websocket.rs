//! WebSockets: the handshake and sending.

use axum::{
    extract::{
        FromRequestParts as _,
        ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade},
    },
    http::StatusCode,
};
use bytes::Bytes;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use serde_json::Value;
use tokio::time::{Duration, Instant};

use super::{Call, refusal::Refusal};

/// Some clients send whatever their user writes in one message.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// One client takes a socket for dead when it hears nothing for 45 s, and does not count pings.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// After our Close the client's is awaited this long, so that nothing still on its way resets the connection and takes our last frames with it.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Close codes.
pub(super) const NORMAL: u16 = 1000;
pub(super) const RESTARTED: u16 = 1012;
/// A command in a terminal ended with another code than 0; one client knows no other way to learn it.
pub(super) const FAILED: u16 = 4001;

/// The client is gone.
#[derive(Debug)]
pub(super) struct Gone;

/// Checks the handshake; the caller answers it when it is ready.
pub(super) async fn handshake(call: &mut Call) -> Result<WebSocketUpgrade, Refusal> {
    match WebSocketUpgrade::from_request_parts(&mut call.parts, &()).await {
        Ok(upgrade) => Ok(upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX)),
        Err(rejection) => Err(Refusal::new(
            StatusCode::UPGRADE_REQUIRED,
            "websocket required",
            format!("connect with a WebSocket over HTTP/1.1: {rejection}"),
        )),
    }
}

/// The reading half.
pub(super) type Input = SplitStream<WebSocket>;

/// The writing half, which knows how long it has been silent.
#[derive(Debug)]
pub(super) struct Output {
    sink: SplitSink<WebSocket, Message>,
    last_message: Instant,
}

pub(super) fn split(socket: WebSocket) -> (Output, Input) {
    let (sink, stream) = socket.split();
    (Output { sink, last_message: Instant::now() }, stream)
}

impl Output {
    pub(super) async fn binary(&mut self, data: Bytes) -> Result<(), Gone> {
        self.send(Message::Binary(data)).await
    }

    pub(super) async fn json(&mut self, value: &Value) -> Result<(), Gone> {
        self.send(Message::Text(value.to_string().into())).await
    }

    pub(super) async fn text(&mut self, text: String) -> Result<(), Gone> {
        self.send(Message::Text(text.into())).await
    }

    /// For the way in between; does not count as a message.
    pub(super) async fn ping(&mut self) -> Result<(), Gone> {
        self.sink.send(Message::Ping(Bytes::new())).await.map_err(|_broken| Gone)
    }

    async fn send(&mut self, message: Message) -> Result<(), Gone> {
        self.sink.send(message).await.map_err(|_broken| Gone)?;
        self.last_message = Instant::now();
        Ok(())
    }

    /// A ping is enough where messages are not expected.
    pub(super) fn reset_silence(&mut self) {
        self.last_message = Instant::now();
    }

    /// When something has to be said to keep the client.
    pub(super) fn keepalive_due(&self) -> Instant {
        self.last_message + SILENCE_MAX
    }
}

/// Says goodbye and waits shortly for the answer.
pub(super) async fn close(mut output: Output, mut input: Input, code: u16, reason: &str) {
    let frame = CloseFrame { code, reason: Utf8Bytes::from(reason) };
    if output.sink.send(Message::Close(Some(frame))).await.is_ok() {
        let drained = async { while let Some(Ok(_discarded)) = input.next().await {} };
        // A client that does not answer is left.
        drop(tokio::time::timeout(CLOSE_LIMIT, drained).await);
    } else {
        // The client was first, or is gone: its Close has an answer that has not been sent yet.
        drop(tokio::time::timeout(CLOSE_LIMIT, output.sink.close()).await);
    }
}

//! `proxy`: one TCP connection into the sprite over one WebSocket.

use std::net::IpAddr;

use axum::{extract::ws::Message, response::Response};
use futures_util::StreamExt as _;
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::Duration,
};

use super::{
    Awake, Call,
    exec::close_reason,
    guest_stream::{self, GuestStream, Way},
    refusal::Refusal,
    say_wake,
    websocket::{self, Gone, Input, NORMAL, Output, RESTARTED},
};
use crate::net;

/// A client that has connected says at once where it wants to go.
const TARGET_LIMIT: Duration = Duration::from_secs(10);
const PIECE_BYTES: usize = 64 << 10;
/// The connection could not be made.
const UNREACHABLE: u16 = 4004;

#[derive(Debug, Deserialize)]
struct Target {
    #[serde(default = "localhost")]
    host: String,
    port: u16,
}

fn localhost() -> String {
    "localhost".into()
}

impl Target {
    /// Only the sprite's own addresses: its data plane is no way out of it.
    fn way(&self) -> Result<Way, String> {
        if self.port == 0 {
            return Err("port 0 is no port".into());
        }
        if self.host.is_empty() || self.host.eq_ignore_ascii_case("localhost") {
            return Ok(Way::Any);
        }
        let address: Option<IpAddr> = self.host.trim_matches(['[', ']']).parse().ok();
        match address {
            Some(address) if address.is_loopback() => Ok(Way::Loopback),
            Some(address) if net::is_guest_address(address) => Ok(Way::Any),
            _ => Err(format!("{} is not an address of the sprite; use localhost", self.host)),
        }
    }
}

pub(super) async fn open(mut call: Call) -> Result<Response, Refusal> {
    let upgrade = websocket::handshake(&mut call).await?;
    let awake = call.wake().await?;
    let was = awake.was;
    let mut response = upgrade.on_upgrade(move |socket| async move {
        let (mut output, mut input) = websocket::split(socket);
        let (code, reason) = match connect(&awake, &mut output, &mut input).await {
            Ok(guest) => {
                splice(guest, &mut output, &mut input).await;
                if awake.is_gone() { (RESTARTED, "the sprite was stopped".to_owned()) } else { (NORMAL, String::new()) }
            }
            Err(reason) => (UNREACHABLE, close_reason(&reason)),
        };
        websocket::close(output, input, code, &reason).await;
        drop(awake);
    });
    say_wake(response.headers_mut(), was);
    Ok(response)
}

/// Reads the target, connects and answers. The one text frame of this socket.
async fn connect(awake: &Awake, output: &mut Output, input: &mut Input) -> Result<Box<dyn GuestStream>, String> {
    let dialed = match tokio::time::timeout(TARGET_LIMIT, first_text(input)).await {
        Ok(Some(text)) => dial(awake, &text).await,
        Ok(None) => return Err("the client left".into()),
        Err(_elapsed) => Err("the first message has to say {\"host\":…,\"port\":…}".into()),
    };
    let answer = match &dialed {
        Ok((_, port)) => json!({ "status": "connected", "target": format!("{}:{port}", net::GUEST_V4) }),
        Err(reason) => json!({ "status": "error", "error": reason }),
    };
    output.json(&answer).await.map_err(|Gone| "the client left".to_owned())?;
    dialed.map(|(stream, _)| stream)
}

async fn first_text(input: &mut Input) -> Option<String> {
    while let Some(Ok(message)) = input.next().await {
        match message {
            Message::Text(text) => return Some(text.to_string()),
            Message::Close(_) => return None,
            Message::Binary(_) | Message::Ping(_) | Message::Pong(_) => {}
        }
    }
    None
}

async fn dial(awake: &Awake, text: &str) -> Result<(Box<dyn GuestStream>, u16), String> {
    let target: Target = serde_json::from_str(text)
        .map_err(|error| format!("the first message is not {{\"host\":…,\"port\":…}}: {error}"))?;
    let way = target.way()?;
    let stream = guest_stream::dial(awake, target.port, way).await.map_err(|error| error.to_string())?;
    Ok((stream, target.port))
}

/// Moves bytes until the guest has said everything or the client leaves.
async fn splice(guest: Box<dyn GuestStream>, output: &mut Output, input: &mut Input) {
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    let inward = async {
        while let Some(Ok(message)) = input.next().await {
            match message {
                Message::Binary(data) if to_guest.write_all(&data).await.is_err() => std::future::pending().await,
                Message::Close(_) => return,
                Message::Binary(_) | Message::Text(_) | Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    };
    let outward = async {
        loop {
            let mut data = bytes::BytesMut::with_capacity(PIECE_BYTES);
            tokio::select! {
                read = from_guest.read_buf(&mut data) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(_) => if output.binary(data.freeze()).await.is_err() { return },
                },
                // No text frame on this socket, ever; a ping keeps what is between us from forgetting the connection.
                () = tokio::time::sleep_until(output.keepalive_due()) => {
                    if output.ping().await.is_err() { return }
                    output.reset_silence();
                }
            }
        }
    };
    tokio::select! {
        () = inward => {}
        () = outward => {}
    }
}

//! `ports/watch`: which ports the sprite's programs listen on.

use axum::{extract::ws::Message, response::Response};
use futures_util::StreamExt as _;
use proto::agent::PortEvent;
use serde_json::json;
use tokio::time::Duration;
use tonic::Streaming;

use super::{
    Call, answer, frames,
    refusal::Refusal,
    say_wake,
    websocket::{self, Gone, Input, NORMAL, Output, RESTARTED},
};

/// The guest sends the present ports in one burst and does not mark its end: a pause this long is the end.
const BURST_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn watch(mut call: Call) -> Result<Response, Refusal> {
    let upgrade = websocket::handshake(&mut call).await?;
    let awake = call.wake().await?;
    let mut events = answer(awake.agent.watch_ports(), None).await?;
    let was = awake.was;
    let mut response = upgrade.on_upgrade(move |socket| async move {
        let (mut output, mut input) = websocket::split(socket);
        let code = tokio::select! {
            code = tell(&mut events, &mut output) => code,
            () = left(&mut input) => NORMAL,
        };
        websocket::close(output, input, code, "").await;
        drop(awake);
    });
    say_wake(response.headers_mut(), was);
    Ok(response)
}

async fn left(input: &mut Input) {
    while let Some(Ok(message)) = input.next().await {
        if matches!(message, Message::Close(_)) {
            return;
        }
    }
}

async fn tell(events: &mut Streaming<PortEvent>, output: &mut Output) -> u16 {
    let mut present = Vec::new();
    while let Ok(Ok(Some(event))) = tokio::time::timeout(BURST_PAUSE, events.message()).await {
        if event.open {
            present
                .push(json!({ "type": "port_opened", "port": event.port, "address": event.address, "pid": event.pid }));
        }
    }
    if let Err(Gone) = output.json(&json!({ "type": "port_list", "ports": present })).await {
        return NORMAL;
    }
    loop {
        let told = tokio::select! {
            event = events.message() => match event {
                Ok(Some(event)) => output.json(&frames::port(&event)).await,
                Ok(None) | Err(_) => return RESTARTED,
            },
            () = tokio::time::sleep_until(output.keepalive_due()) => output.json(&frames::keepalive()).await,
        };
        if let Err(Gone) = told {
            return NORMAL;
        }
    }
}

//! `sprite proxy`: ports of a sprite on this machine, one WebSocket per connection.

use std::{net::Ipv4Addr, net::Ipv6Addr, sync::Arc, time::Duration};

use clap::Args;
use futures_util::{Sink, SinkExt as _, StreamExt as _, stream::SplitStream};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
    time::Instant,
};
use tokio_tungstenite::tungstenite::Message;

use super::Done;
use crate::{
    api::Api,
    context::Context,
    failure::{Failure, chain},
    output,
    sprite::{self, about},
    target::Target,
    websocket::{PING_EVERY, SILENCE_MAX, Socket, goodbye},
};

/// Connections at once; more wait until one ends.
const CONNECTIONS_MAX: usize = 256;
const PIECE_BYTES: usize = 64 << 10;
/// For the server to say whether the port answers.
const STATUS_LIMIT: Duration = Duration::from_secs(30);
/// The protocol cannot say that one direction has ended. After our side's end the other may go on as long as it is never silent for this long.
const HALF_CLOSED_MAX: Duration = Duration::from_secs(10);
/// After an accept that failed, mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite proxy 5432 -s demo                  localhost:5432 here is port 5432 there
  sprite proxy 8000:80 5432 -s demo
  sprite proxy 0:80 -s demo                  any free port here; it says which
  ssh -o ProxyCommand='sprite proxy -W :22 -s demo' sprite@demo")]
pub(crate) struct Arguments {
    /// PORT, or PORT HERE:PORT THERE
    #[arg(required_unless_present = "stdio", value_name = "PORT|HERE:THERE", value_parser = ports)]
    ports: Vec<(u16, u16)>,
    /// Connect stdin and stdout to HOST:PORT instead; without HOST, to the port on localhost
    #[arg(short = 'W', value_name = "[HOST]:PORT", conflicts_with = "ports", value_parser = host_and_port)]
    stdio: Option<(String, u16)>,
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let bad = || format!("{text:?} is neither PORT nor HERE:THERE");
    let number = |text: &str| text.parse::<u16>().map_err(|_not_a_port| bad());
    let (here, there) = match text.split_once(':') {
        Some((here, there)) => (number(here)?, number(there)?),
        None => (number(text)?, number(text)?),
    };
    if there == 0 { Err(bad()) } else { Ok((here, there)) }
}

fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let bad = || format!("{text:?} is not [HOST]:PORT");
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(bad)?;
    let host = host.trim_matches(['[', ']']);
    Ok((if host.is_empty() { "localhost" } else { host }.to_owned(), port))
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Done {
    let sprite = context.sprite(None)?;
    let api = context.api()?;
    if let Some((host, port)) = arguments.stdio {
        let socket = open(&api, &sprite, &host, port).await?;
        splice(socket, tokio::io::stdin(), tokio::io::stdout()).await?;
        return Ok(0);
    }
    // An unknown sprite is said now, not at the first connection.
    sprite::get(&api, &sprite).await?;
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut serving = tokio::task::JoinSet::new();
    for (here, there) in arguments.ports {
        for listener in listen(here).await? {
            let (api, sprite, places) = (api.clone(), sprite.clone(), Arc::clone(&places));
            if let Ok(address) = listener.local_addr() {
                output::note(format!("{address} → {sprite}:{there}"));
            }
            serving.spawn(async move { serve(&listener, &api, &sprite, there, &places).await });
        }
    }
    // Until Ctrl-C: accepting does not end by itself.
    while serving.join_next().await.is_some() {}
    Ok(0)
}

/// Loopback only: whoever reaches the socket reaches the sprite.
async fn listen(port: u16) -> Result<Vec<TcpListener>, Failure> {
    let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(|error| {
        Failure::new(format!("cannot listen on localhost:{port}: {error}"))
            .advise(format!("another port: `sprite proxy 0:{port}` takes a free one"))
    })?;
    // The same port, also when it was chosen just now. A machine without IPv6 has none.
    let port = v4.local_addr().map_or(port, |address| address.port());
    let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).await.ok();
    Ok(std::iter::once(v4).chain(v6).collect())
}

async fn serve(listener: &TcpListener, api: &Api, sprite: &str, port: u16, places: &Arc<Semaphore>) {
    loop {
        let Ok(place) = Arc::clone(places).acquire_owned().await else { return };
        let local = match listener.accept().await {
            Ok((local, _)) => local,
            Err(error) => {
                output::note(format!("✗ a connection was not accepted: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (api, sprite) = (api.clone(), sprite.to_owned());
        tokio::spawn(async move {
            if let Err(failure) = forward(local, &api, &sprite, port).await {
                output::note(failure);
            }
            drop(place);
        });
    }
}

async fn forward(local: TcpStream, api: &Api, sprite: &str, port: u16) -> Result<(), Failure> {
    // The program that connected waits for its bytes; if it cannot be set it is only slower.
    drop(local.set_nodelay(true));
    let socket = open(api, sprite, "localhost", port).await?;
    let (reader, writer) = local.into_split();
    splice(socket, reader, writer).await
}

async fn open(api: &Api, sprite: &str, host: &str, port: u16) -> Result<Socket, Failure> {
    let mut socket = api.websocket(&Target::sprite(sprite).then("proxy")).await.map_err(about(sprite))?;
    let lost =
        |error: &dyn std::error::Error| Failure::new(format!("the connection to {sprite} broke: {}", chain(error)));
    let wanted = json!({ "host": host, "port": port }).to_string();
    socket.send(Message::text(wanted)).await.map_err(|error| lost(&error))?;
    let status = async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str::<Value>(&text).unwrap_or_default()),
                Some(Ok(Message::Close(frame))) => {
                    return Ok(json!({ "error": frame.map(|frame| frame.reason.to_string()) }));
                }
                Some(Ok(Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(error)) => return Err(lost(&error)),
                None => return Ok(Value::Null),
            }
        }
    };
    let status = match tokio::time::timeout(STATUS_LIMIT, status).await {
        Ok(status) => status?,
        Err(_elapsed) => json!({ "error": format!("no answer within {} s", STATUS_LIMIT.as_secs()) }),
    };
    if status["status"] == "connected" {
        return Ok(socket);
    }
    let why = status["error"]
        .as_str()
        .or_else(|| status["message"].as_str())
        .filter(|why| !why.is_empty())
        .unwrap_or("the server refused");
    Err(Failure::new(format!("{host}:{port} in {sprite} is not reachable: {why}")))
}

/// Moves bytes until the sprite's side ends.
async fn splice(
    socket: Socket,
    local_in: impl AsyncRead + Unpin,
    local_out: impl AsyncWrite + Unpin,
) -> Result<(), Failure> {
    let (mut sink, stream) = socket.split();
    let local_ended = Notify::new();
    let done = tokio::select! {
        done = download(stream, local_out, &local_ended) => done,
        () = upload(local_in, &mut sink, &local_ended) => Ok(()),
    };
    drop(tokio::time::timeout(Duration::from_secs(1), sink.send(goodbye())).await);
    done
}

/// Sends what comes from here, and pings. Never ends: when a connection is over, the reading half says.
async fn upload(mut local_in: impl AsyncRead + Unpin, sink: &mut (impl Sink<Message> + Unpin), local_ended: &Notify) {
    let mut ping = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    let mut piece = vec![0; PIECE_BYTES];
    let mut open = true;
    loop {
        let message = tokio::select! {
            read = local_in.read(&mut piece), if open => match read {
                Ok(len) if len > 0 => Message::Binary(bytes::Bytes::copy_from_slice(&piece[..len])),
                Ok(_) | Err(_) => {
                    open = false;
                    local_ended.notify_one();
                    continue;
                }
            },
            _ = ping.tick() => Message::Ping(bytes::Bytes::new()),
        };
        if sink.send(message).await.is_err() {
            return std::future::pending::<()>().await;
        }
    }
}

/// Writes out what the sprite sends, until its end, or until one side was silent for too long.
async fn download(
    mut stream: SplitStream<Socket>,
    mut local_out: impl AsyncWrite + Unpin,
    local_ended: &Notify,
) -> Result<(), Failure> {
    let (mut last_frame, mut last_data, mut half_closed) = (Instant::now(), Instant::now(), false);
    loop {
        let limit = if half_closed { last_data + HALF_CLOSED_MAX } else { last_frame + SILENCE_MAX };
        let message = tokio::select! {
            () = local_ended.notified() => {
                (half_closed, last_data) = (true, Instant::now());
                continue;
            }
            message = tokio::time::timeout_at(limit, stream.next()) => message,
        };
        last_frame = Instant::now();
        match message {
            Ok(Some(Ok(Message::Binary(data)))) => {
                last_data = last_frame;
                if local_out.write_all(&data).await.is_err() || local_out.flush().await.is_err() {
                    return Ok(());
                }
            }
            Ok(Some(Ok(Message::Close(_))) | None) => {
                // Whoever has left needs no end.
                drop(local_out.shutdown().await);
                return Ok(());
            }
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(error))) => {
                return Err(Failure::new(format!("a proxied connection broke: {}", chain(&error))));
            }
            Err(_elapsed) if half_closed => return Ok(()),
            Err(_elapsed) => {
                let silent_s = SILENCE_MAX.as_secs();
                return Err(Failure::new(format!("a proxied connection was silent for {silent_s} s")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_apart() {
        assert_eq!(ports("5432"), Ok((5432, 5432)));
        assert_eq!(ports("8000:80"), Ok((8000, 80)));
        assert_eq!(ports("0:80"), Ok((0, 80)));
        for bad in ["", "0", "80:0", "a", "1:2:3", "65536", ":80"] {
            assert!(ports(bad).is_err(), "{bad:?}");
        }
        assert_eq!(host_and_port(":22"), Ok(("localhost".into(), 22)));
        assert_eq!(host_and_port("10.0.0.1:22"), Ok(("10.0.0.1".into(), 22)));
        assert_eq!(host_and_port("[fdf::1]:22"), Ok(("fdf::1".into(), 22)));
        assert!(host_and_port("host").is_err() && host_and_port("host:0").is_err());
    }
}

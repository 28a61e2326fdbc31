//! `sprite exec --http-post`: a command over one HTTP request.
//!
//! Each chunk of the answer is one frame, and frames have no length of their own. HTTP libraries do not keep the borders of chunks, hence the chunks are
//! read here, by hand.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};

use super::Done;
use crate::{
    api::{Api, Call, CallError, LONG_LIMIT, Refused},
    failure::Failure,
    frames::{self, Said},
    output,
    sprite::about,
    target::Target,
};

const PIECE_BYTES: usize = 64 << 10;
const CHUNK_BYTES_MAX: u64 = 16 << 20;
const HEAD_BYTES_MAX: u64 = 64 << 10;
const REFUSAL_BYTES_MAX: u64 = 1 << 20;
const REFUSAL_LIMIT: Duration = Duration::from_secs(10);

pub(super) async fn run(api: &Api, sprite: &str, target: Target) -> Done {
    let call = Call::new(Method::POST, target)
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::TRANSFER_ENCODING, "chunked")
        .header(header::CONNECTION, "close");
    let head = head_of(&api.request(&call, ())?);
    let stream = api.dialer.dial().await?;
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::with_capacity(PIECE_BYTES, reader);
    writer.write_all(&head).await.map_err(|error| api.broken(&error))?;
    let answer = async {
        let head =
            output::with_spinner(format!("waking {sprite}"), tokio::time::timeout(LONG_LIMIT, read_head(&mut reader)))
                .await;
        let head = head
            .map_err(|_elapsed| Failure::new(format!("{sprite} did not answer within {} s", LONG_LIMIT.as_secs())))?;
        let (status, headers) = head.map_err(|error| api.broken(&error))?;
        let is_chunked = headers
            .get(header::TRANSFER_ENCODING)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if status != StatusCode::OK || !is_chunked {
            let mut body = Vec::new();
            // What came in time is enough to say why.
            drop(tokio::time::timeout(REFUSAL_LIMIT, read_rest(&mut reader, is_chunked, &mut body)).await);
            return Err(about(sprite)(CallError::Refused(Refused::new(status, &headers, &body))));
        }
        frames_to_output(api, &mut reader).await
    };
    // The answer first: an exit counts whatever happens to the input.
    tokio::select! {
        biased;
        done = answer => done,
        () = send_stdin(&mut writer) => Ok(1),
    }
}

fn head_of(request: &Request<()>) -> Vec<u8> {
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method(), request.uri()).into_bytes();
    for (name, value) in request.headers() {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Never ends: what the command takes of its input is its business, its exit ends everything.
async fn send_stdin(writer: &mut (impl AsyncWrite + Unpin)) {
    let sent = async {
        let mut stdin = tokio::io::stdin();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let len = stdin.read(&mut piece).await?;
            if len == 0 {
                writer.write_all(b"0\r\n\r\n").await?;
                return writer.flush().await;
            }
            writer.write_all(format!("{len:x}\r\n").as_bytes()).await?;
            writer.write_all(&piece[..len]).await?;
            writer.write_all(b"\r\n").await?;
            writer.flush().await?;
        }
    };
    // A server that has heard enough closes its ear; the answer says why.
    let _done: io::Result<()> = sent.await;
    std::future::pending().await
}

async fn frames_to_output(api: &Api, reader: &mut (impl AsyncBufRead + Unpin)) -> Done {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let lost = || Failure::new("the answer ended before the command").advise("how far the command got is unknown");
    loop {
        let chunk = read_chunk(reader).await.map_err(|error| api.broken(&error))?.ok_or_else(lost)?;
        let written = match frames::frame(chunk) {
            Said::Stdout(data) => write_out(&mut stdout, &data).await,
            Said::Stderr(data) => write_out(&mut stderr, &data).await,
            Said::Exit(code) => return Ok(code),
            Said::Info(_) | Said::Closed(_) | Said::Nothing => Ok(()),
        };
        written.map_err(|error| Failure::of_output(&error))?;
    }
}

async fn write_out(stream: &mut (impl AsyncWrite + Unpin), data: &[u8]) -> io::Result<()> {
    stream.write_all(data).await?;
    stream.flush().await
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<String> {
    let mut line = Vec::new();
    if (&mut *reader).take(HEAD_BYTES_MAX).read_until(b'\n', &mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let text = String::from_utf8(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(text.trim_end().to_owned())
}

async fn read_head(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<(StatusCode, HeaderMap)> {
    loop {
        let first = read_line(reader).await?;
        let mut words = first.split(' ');
        let is_http = words.next().is_some_and(|version| version.starts_with("HTTP/1."));
        let status = words
            .next()
            .and_then(|status| status.parse::<u16>().ok())
            .and_then(|status| StatusCode::from_u16(status).ok());
        let (true, Some(status)) = (is_http, status) else { return Err(invalid("the server does not speak HTTP/1.1")) };
        let mut headers = HeaderMap::new();
        let mut bytes = 0;
        loop {
            let line = read_line(reader).await?;
            bytes += line.len();
            if line.is_empty() {
                break;
            }
            if u64::try_from(bytes).is_ok_and(|bytes| bytes > HEAD_BYTES_MAX) {
                return Err(invalid("the head of the answer is too large"));
            }
            let Some((name, value)) = line.split_once(':') else { return Err(invalid("a header has no value")) };
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.trim().parse::<HeaderValue>()) {
                headers.append(name, value);
            }
        }
        // 100 Continue and its like announce the answer.
        if !status.is_informational() {
            return Ok((status, headers));
        }
    }
}

/// One chunk; `None` is the regular end.
async fn read_chunk(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Bytes>> {
    let line = read_line(reader).await?;
    let size = line.split(';').next().unwrap_or_default().trim();
    let len = u64::from_str_radix(size, 16).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if len == 0 {
        return Ok(None);
    }
    if len > CHUNK_BYTES_MAX {
        return Err(invalid("a chunk of the answer is too large"));
    }
    let mut data = Vec::new();
    let read = (&mut *reader).take(len).read_to_end(&mut data).await?;
    if u64::try_from(read).is_ok_and(|read| read < len) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if !read_line(reader).await?.is_empty() {
        return Err(invalid("a chunk is longer than it says"));
    }
    Ok(Some(data.into()))
}

async fn read_rest(reader: &mut (impl AsyncBufRead + Unpin), is_chunked: bool, body: &mut Vec<u8>) -> io::Result<()> {
    if !is_chunked {
        return reader.take(REFUSAL_BYTES_MAX).read_to_end(body).await.map(drop);
    }
    while let Some(chunk) = read_chunk(reader).await? {
        body.extend_from_slice(&chunk);
        if u64::try_from(body.len()).is_ok_and(|len| len > REFUSAL_BYTES_MAX) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn chunks_keep_their_borders() {
        let mut text: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n\x01hi\r\n2;ext=1\r\n\x03\x07\r\n0\r\n\r\n";
        let (status, headers) = read_head(&mut text).await.unwrap();
        assert_eq!((status, headers.len()), (StatusCode::OK, 1));
        assert_eq!(read_chunk(&mut text).await.unwrap().unwrap(), &b"\x01hi"[..]);
        assert_eq!(read_chunk(&mut text).await.unwrap().unwrap(), &b"\x03\x07"[..]);
        assert!(read_chunk(&mut text).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn nonsense_is_an_error() {
        for bad in [&b""[..], b"x\r\n", b"3\r\nab", b"3\r\nabcd\r\n", b"fffffffff\r\n", b"-1\r\n"] {
            assert!(read_chunk(&mut &bad[..]).await.is_err(), "{bad:?}");
        }
        for bad in [&b""[..], b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 999999\r\n\r\n", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"]
        {
            assert!(read_head(&mut &bad[..]).await.is_err(), "{bad:?}");
        }
    }
}

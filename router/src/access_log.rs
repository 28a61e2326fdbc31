//! One log line per request, written when its last byte has gone (or never will). Queries are left out: argv and environments stand in them.

use std::{
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use proto::{
    id::SpriteId,
    paths::{SPRITE_ERROR_HEADER, SPRITE_WAKE_HEADER},
};
use tokio::time::Instant;

use crate::{
    activity::InFlight,
    body::{Body, BoxError},
};

/// Paths are cut to this in the log.
const PATH_LEN_MAX: usize = 256;

/// What is known of a request so far. Dropping it writes the line.
pub(crate) struct Record {
    pub(crate) request_id: HeaderValue,
    pub(crate) sprite: Option<SpriteId>,
    request: String,
    host: String,
    ip: IpAddr,
    version: Version,
    began_at: Instant,
    status: Option<StatusCode>,
    head_ms: u128,
    code: String,
    wake: String,
    received_bytes: u64,
    sent_bytes: u64,
    end: End,
    _in_flight: InFlight,
}

/// How the exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client went away before everything was sent.
    Abandoned,
    Complete,
    /// The side behind us broke off.
    Broken,
}

impl Record {
    pub(crate) fn begin<B>(
        request: &http::Request<B>,
        host: &str,
        ip: IpAddr,
        request_id: HeaderValue,
        in_flight: InFlight,
    ) -> Self {
        let path: String = request.uri().path().chars().take(PATH_LEN_MAX).collect();
        Self {
            request_id,
            sprite: None,
            request: format!("{} {path}", request.method()),
            host: host.to_owned(),
            ip,
            version: request.version(),
            began_at: Instant::now(),
            status: None,
            head_ms: 0,
            code: String::new(),
            wake: String::new(),
            received_bytes: 0,
            sent_bytes: 0,
            end: End::Abandoned,
            _in_flight: in_flight,
        }
    }

    /// The head of the answer is decided.
    pub(crate) fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        self.status = Some(status);
        self.head_ms = self.began_at.elapsed().as_millis();
        self.code = text(SPRITE_ERROR_HEADER);
        self.wake = text(SPRITE_WAKE_HEADER);
    }

    /// A tunnel ended after that many bytes.
    pub(crate) fn tunnelled(&mut self, received_bytes: u64, sent_bytes: u64, complete: bool) {
        (self.received_bytes, self.sent_bytes) = (received_bytes, sent_bytes);
        self.end = if complete { End::Complete } else { End::Broken };
    }

    /// Ties the record to the answer's body.
    pub(crate) fn follow(self, response: Response<Body>) -> Response<Body> {
        response.map(|body| {
            let mut record = self;
            if body.is_end_stream() {
                record.end = End::Complete;
            }
            Logged { body, record }.boxed_unsync()
        })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        tracing::info!(
            target: "router::access",
            id = self.request_id.to_str().unwrap_or_default(),
            ip = %self.ip,
            host = self.host,
            request = self.request,
            version = ?self.version,
            sprite = self.sprite.map(tracing::field::debug),
            status = self.status.map_or(0, |status| status.as_u16()),
            code = self.code,
            wake = self.wake,
            head_ms = self.head_ms,
            ms = self.began_at.elapsed().as_millis(),
            received_bytes = self.received_bytes,
            sent_bytes = self.sent_bytes,
            end = ?self.end,
        );
    }
}

struct Logged {
    body: Body,
    record: Record,
}

impl http_body::Body for Logged {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                this.record.sent_bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                if this.body.is_end_stream() {
                    this.record.end = End::Complete;
                }
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!("an answer broke off: {error}");
                this.record.end = End::Broken;
            }
            Poll::Ready(None) => this.record.end = End::Complete,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

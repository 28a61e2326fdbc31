//! Answers of one JSON object a line, kept alive by blank lines.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::Response,
};
use futures_util::{Stream, StreamExt as _, stream};
use serde_json::Value;

/// Clients want one at least every 60 s.
const KEEPALIVE: Duration = Duration::from_secs(25);

/// `lines` until they end, each flushed at once.
pub(super) fn response(lines: impl Stream<Item = Value> + Send + 'static) -> Response {
    let mut response = Response::new(Body::from_stream(chunks(lines, KEEPALIVE)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn chunks(
    lines: impl Stream<Item = Value> + Send + 'static,
    silence_max: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream::unfold(Box::pin(lines), move |mut lines| async move {
        let chunk = match tokio::time::timeout(silence_max, lines.next()).await {
            Ok(line) => Bytes::from(format!("{}\n", line?)),
            Err(_elapsed) => Bytes::from_static(b"\n"),
        };
        Some((Ok(chunk), lines))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn silence_is_filled_with_blank_lines() {
        let (go_on, silence) = oneshot::channel();
        let last = stream::once(async {
            silence.await.unwrap();
            json!({ "last": 2 })
        });
        let mut chunks =
            Box::pin(chunks(stream::once(async { json!({ "first": 1 }) }).chain(last), Duration::from_millis(5)));
        assert_eq!(chunks.next().await.unwrap().unwrap(), "{\"first\":1}\n");
        assert_eq!(chunks.next().await.unwrap().unwrap(), "\n");
        go_on.send(()).unwrap();
        let rest: Vec<Bytes> =
            chunks.map(Result::unwrap).filter(|chunk| std::future::ready(*chunk != "\n")).collect().await;
        assert_eq!(rest, ["{\"last\":2}\n"]);
    }
}

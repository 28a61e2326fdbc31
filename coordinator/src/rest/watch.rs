//! `GET /v1/sprites` as an endless answer: first what is, then what changes, a heartbeat in between.

use std::{collections::VecDeque, time::Duration};

use axum::response::Response;
use futures_util::{Stream, stream};
use serde_json::{Value, json};

use super::{Call, ndjson};
use crate::{
    refusal::Refusal,
    view::time,
    watch::{Seen, Watch},
};

const HEARTBEAT: Duration = Duration::from_secs(15);

pub(super) async fn open(call: &Call) -> Result<Response, Refusal> {
    let watch = Watch::begin(&call.service, call.org(), &call.query("prefix").unwrap_or_default()).await?;
    Ok(ndjson::response(lines(watch)))
}

fn lines(watch: Watch) -> impl Stream<Item = Value> + Send {
    stream::unfold((watch, VecDeque::new()), |(mut watch, mut pending)| async move {
        while pending.is_empty() {
            let seen = watch.next(HEARTBEAT).await?;
            let org = watch.org_json();
            if seen.is_empty() {
                pending
                    .push_back(json!({ "type": "heartbeat", "timestamp": time(jiff::Timestamp::now()), "org": org }));
            }
            pending.extend(seen.into_iter().map(|seen| match seen {
                Seen::Sprite(view) => view.to_event(org.clone()),
                Seen::Gone(name) => json!({
                    "type": "deleted",
                    "name": name,
                    "status": "deleted",
                    "timestamp": time(jiff::Timestamp::now()),
                    "org": org,
                }),
            }));
        }
        pending.pop_front().map(|line| (line, (watch, pending)))
    })
}

//! Streams of progress: checkpoint and restore say what they do, then `complete` or `error`.

use serde_json::Value;

use crate::{
    api::{Api, Call, CallError},
    failure::Failure,
    output::Spinner,
};

/// Follows a stream to its end and returns the last event. `info` events are progress.
pub(crate) async fn follow(api: &Api, call: &Call, doing: &str, quiet: bool) -> Result<Value, CallError> {
    let spinner = Spinner::start(doing);
    let mut lines = api.lines(call).await?;
    while let Some(event) = lines.next().await? {
        let text = event["data"].as_str().or_else(|| event["message"].as_str()).unwrap_or_default().trim();
        match event["type"].as_str() {
            Some("complete") => return Ok(event),
            Some("error") => {
                let why = event["error"].as_str().filter(|error| !error.is_empty()).unwrap_or(text);
                return Err(Failure::new(if why.is_empty() {
                    "the server reports an error without saying which"
                } else {
                    why
                })
                .into());
            }
            Some("info") if !text.is_empty() && !quiet => spinner.say(text),
            Some(_) | None => {}
        }
    }
    Err(Failure::new(format!("the server broke off while {doing}"))
        .advise("it may go on by itself; look before you repeat it")
        .into())
}

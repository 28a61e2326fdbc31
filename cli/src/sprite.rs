//! The API's sprite object. Read leniently: what a server does not say is not shown.

use jiff::Timestamp;
use serde_json::Value;

use crate::{
    api::{Api, Call, CallError, Refused},
    failure::Failure,
    target::Target,
    units::{age, show_bytes},
};

/// Most sprites on one page; servers give fewer.
const PAGE: &str = "100";
/// A server that always says there is more must not keep us for ever.
const PAGES_MAX: usize = 10_000;

/// One sprite as the API shows it.
#[derive(Clone, Debug)]
pub(crate) struct Sprite(pub(crate) Value);

impl Sprite {
    pub(crate) fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.0[key].as_u64().filter(|number| *number > 0)
    }

    pub(crate) fn time(&self, key: &str) -> Option<Timestamp> {
        self.text(key).parse().ok()
    }

    /// `3h ago`
    fn ago(&self, key: &str, now: Timestamp) -> Option<String> {
        self.time(key).map(|time| format!("{} ago", age(time, now)))
    }

    pub(crate) fn is_public(&self) -> bool {
        self.0["url_settings"]["auth"] == "public"
    }

    /// `warm`, and how exactly if the server says it: `warm (suspended)`.
    pub(crate) fn status(&self) -> String {
        match (self.text("status"), self.text("state")) {
            (status, "") => status.to_owned(),
            (status, state) if status == state => status.to_owned(),
            (status, state) => format!("{status} ({state})"),
        }
    }

    /// `m` and what is written of the disk: `m, 1.4 of 100 GiB`.
    pub(crate) fn size(&self) -> String {
        let class = match self.text("size") {
            "" => None,
            class => Some(class.to_owned()),
        };
        let disk = self.number("disk_bytes").or_else(|| self.0["config"]["storage_gb"].as_u64().map(|gb| gb << 30));
        let disk = disk.map(|disk| match self.number("used_bytes") {
            Some(used) => format!("{} of {}", show_bytes(used), show_bytes(disk)),
            None => show_bytes(disk),
        });
        class.into_iter().chain(disk).collect::<Vec<_>>().join(", ")
    }

    /// Everything a person may want to know, as name and value.
    pub(crate) fn facts(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let auth =
            if self.is_public() { "public: anybody can open it" } else { "private: with a token of the organisation" };
        let machine = match (self.0["config"]["cpus"].as_u64(), self.0["config"]["ram_mb"].as_u64()) {
            (Some(cpus), Some(ram_mb)) => {
                format!("{} ({cpus} CPU, {} memory)", self.text("size"), show_bytes(ram_mb << 20))
            }
            _ => self.text("size").to_owned(),
        };
        let disk = self
            .number("disk_bytes")
            .map(|disk| format!("{}, {} used", show_bytes(disk), show_bytes(self.number("used_bytes").unwrap_or(0))));
        let since = self.ago("since", now).map(|ago| format!(", since {ago}")).unwrap_or_default();
        let reason = match self.text("reason") {
            "" => String::new(),
            reason => format!(": {reason}"),
        };
        let in_bucket = self.time("watermark_at").map(|_| match self.number("unpushed_bytes") {
            None => "everything".to_owned(),
            Some(bytes) => format!("all but {}", show_bytes(bytes)),
        });
        let list = |key: &str| {
            let items = self.0[key]
                .as_array()
                .map(|items| items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "));
            items.unwrap_or_default()
        };
        let from = match (self.0["from"]["sprite"].as_str(), self.0["from"]["checkpoint"].as_str()) {
            (Some(sprite), Some(checkpoint)) => format!("{sprite}@{checkpoint}"),
            _ => String::new(),
        };
        let always_on = if self.0["always_on"] == true { "yes" } else { "" };
        let facts = [
            ("name", self.text("name").to_owned()),
            ("id", self.text("id").to_owned()),
            ("organisation", self.text("organization").to_owned()),
            ("status", format!("{}{since}{reason}", self.status())),
            ("url", self.text("url").to_owned()),
            ("access", auth.to_owned()),
            ("size", machine),
            ("disk", disk.unwrap_or_default()),
            ("in the bucket", in_bucket.unwrap_or_default()),
            ("created", self.ago("created_at", now).unwrap_or_default()),
            ("forked from", from),
            ("last active", self.ago("last_active_at", now).unwrap_or_default()),
            ("sleeps after", self.text("idle_timeout").to_owned()),
            ("always on", always_on.to_owned()),
            ("wakes at", list("wake_at")),
            ("wakes every", self.text("wake_every").to_owned()),
            ("labels", list("labels")),
            ("last events", list("events")),
        ];
        facts.into_iter().filter(|(_, value)| !value.is_empty()).collect()
    }
}

/// A refusal about a sprite names it: servers say only `sprite not found`.
pub(crate) fn about(name: &str) -> impl Fn(CallError) -> Failure + '_ {
    move |error| match error {
        CallError::Refused(Refused { status, error, .. })
            if status == http::StatusCode::NOT_FOUND && error == "sprite not found" =>
        {
            Failure::new(format!("sprite {name:?} not found")).advise("`sprite list` shows yours")
        }
        other => other.into(),
    }
}

pub(crate) async fn get(api: &Api, name: &str) -> Result<Sprite, Failure> {
    api.json(&Call::get(Target::sprite(name))).await.map(Sprite).map_err(about(name))
}

pub(crate) async fn list(api: &Api, prefix: &str) -> Result<Vec<Sprite>, Failure> {
    let mut found = Vec::new();
    let mut token: Option<String> = None;
    for _ in 0..PAGES_MAX {
        let mut target = Target::sprites().with("max_results", PAGE);
        if !prefix.is_empty() {
            target = target.with("prefix", prefix);
        }
        if let Some(token) = &token {
            target = target.with("continuation_token", token);
        }
        let mut page = api.json(&Call::get(target)).await?;
        let serde_json::Value::Array(sprites) = page["sprites"].take() else {
            return Err(
                Failure::new("the server's list has no sprites in it").advise("is it the API? check SPRITES_API_URL")
            );
        };
        found.extend(sprites.into_iter().map(Sprite));
        token = page["next_continuation_token"].as_str().map(str::to_owned);
        if token.is_none() {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_unknown_is_not_shown() {
        let now: Timestamp = "2026-01-01T02:00:00Z".parse().unwrap();
        let sprite = Sprite(json!({
            "name": "demo", "status": "warm", "state": "suspended", "reason": "idle", "since": "2026-01-01T01:59:00.000Z",
            "size": "m", "disk_bytes": 100_u64 << 30, "used_bytes": 1 << 30, "labels": ["a", "b"], "url_settings": {"auth": "public"},
        }));
        assert_eq!(sprite.status(), "warm (suspended)");
        assert_eq!(sprite.size(), "m, 1 GiB of 100 GiB");
        let facts = sprite.facts(now);
        let fact = |name: &str| facts.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
        assert_eq!(fact("status"), Some("warm (suspended), since 60s ago: idle"));
        assert_eq!(fact("labels"), Some("a, b"));
        assert!(fact("access").unwrap().starts_with("public"));
        assert_eq!((fact("created"), fact("always on")), (None, None));
        assert_eq!(Sprite(json!({})).facts(now).iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["access"]);
        assert_eq!(Sprite(json!({"status": "running"})).status(), "running");
    }
}

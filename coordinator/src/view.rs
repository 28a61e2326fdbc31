//! A sprite as the API shows it: what its owner asked for, and how it is. The dialect's fields come first, ours after.

use std::sync::Arc;

use jiff::Timestamp;
use proto::{
    node::SpriteStatus,
    public,
    record::{SpriteRecord, UrlAuth},
};
use serde_json::{Map, Value, json};

use crate::{duration, index::Counts};

/// No more sprites than these can run or be warm, because an organisation cannot have more.
pub(crate) const SPRITES_PER_ORG_MAX: usize = 10_000;

/// Record and state of one sprite.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) record: Arc<SpriteRecord>,
    /// `None`: nobody knows at the moment.
    pub(crate) status: Option<SpriteStatus>,
}

/// The dialect's word for a state of ours.
pub(crate) fn status_word(status: Option<&SpriteStatus>) -> &'static str {
    match status.map(|status| status.state.as_str()) {
        Some("running" | "restoring") => "running",
        Some("paused" | "suspended") => "warm",
        _ => "cold",
    }
}

impl View {
    pub(crate) fn word(&self) -> &'static str {
        status_word(self.status.as_ref())
    }

    fn state(&self) -> &str {
        self.status.as_ref().map_or("unknown", |status| status.state.as_str())
    }

    fn reason(&self) -> &str {
        self.status.as_ref().map_or("its host does not answer", |status| status.reason.as_str())
    }

    /// The sprite object of the REST dialect.
    pub(crate) fn to_json(&self) -> Value {
        let record = &self.record;
        let mut url_settings = json!({ "auth": auth_word(record.url_settings.auth) });
        if let Some(access) = &record.url_settings.private_access {
            url_settings["private_access"] = access.as_str().into();
        }
        let of = |ms: fn(&SpriteStatus) -> u64| self.status.as_ref().and_then(|status| time_of_ms(ms(status)));
        let mut object = json!({
            "id": record.id.public(),
            "name": record.name,
            "organization": record.org,
            "org_slug": record.org,
            "status": self.word(),
            "url": record.url,
            "url_settings": url_settings,
            "config": {
                "ram_mb": record.size.memory_bytes() >> 20,
                "cpus": record.size.vcpus(),
                "storage_gb": record.disk_bytes >> 30,
            },
            "environment": record.environment,
            "labels": record.labels,
            "created_at": time(record.created_at),
            "updated_at": time(record.updated_at),
            "last_running_at": of(|status| status.last_running_unix_ms),
            "last_warming_at": of(|status| status.last_warming_unix_ms),
            "version": proto::VERSION,
        });
        if let Value::Object(object) = &mut object {
            object.extend(self.own_fields());
        }
        object
    }

    fn own_fields(&self) -> Map<String, Value> {
        let record = &self.record;
        let status = self.status.clone().unwrap_or_default();
        let fields = json!({
            "state": self.state(),
            "reason": self.reason(),
            "since": time_of_ms(status.since_unix_ms),
            "last_active_at": time_of_ms(status.last_active_unix_ms),
            "size": record.size.as_str(),
            "vcpus": record.size.vcpus(),
            "memory_bytes": record.size.memory_bytes(),
            "disk_bytes": status.disk_bytes.max(record.disk_bytes),
            "used_bytes": status.used_bytes,
            "unpushed_bytes": status.unpushed_bytes,
            "watermark_at": time_of_ms(status.watermark_unix_ms),
            "generation": status.generation,
            "epoch": status.epoch,
            "resumed": status.resumed,
            "events": status.events,
            "idle_timeout": idle_timeout(record),
            "always_on": record.always_on,
            "from": record.from.as_ref().map(|from| json!({ "sprite": from.name, "checkpoint": from.checkpoint })),
            "wake_at": record.wake_at.iter().copied().map(time).collect::<Vec<_>>(),
            "wake_every": record.wake_every_ms.map(duration::format_ms),
        });
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    pub(crate) fn to_proto(&self) -> public::Sprite {
        let record = &self.record;
        let status = self.status.clone().unwrap_or_default();
        public::Sprite {
            id: record.id.public(),
            name: record.name.to_string(),
            organization: record.org.clone(),
            status: self.word().to_owned(),
            state: self.state().to_owned(),
            reason: self.reason().to_owned(),
            url: record.url.clone(),
            public: record.url_settings.auth == UrlAuth::Public,
            labels: record.labels.clone(),
            created_at: time(record.created_at),
            last_active_at: time_of_ms(status.last_active_unix_ms).unwrap_or_default(),
            size: record.size.as_str().to_owned(),
            disk_bytes: status.disk_bytes.max(record.disk_bytes),
            used_bytes: status.used_bytes,
            generation: status.generation,
            from: record
                .from
                .as_ref()
                .map(|from| public::ForkSource { sprite: from.name.to_string(), checkpoint: from.checkpoint.clone() }),
        }
    }

    /// One line of the watch stream, with our state and reason.
    pub(crate) fn to_event(&self, org: Value) -> Value {
        let of = |ms: fn(&SpriteStatus) -> u64| self.status.as_ref().and_then(|status| time_of_ms(ms(status)));
        json!({
            "name": self.record.name,
            "id": self.record.id.public(),
            "status": self.word(),
            "state": self.state(),
            "reason": self.reason(),
            "url": self.record.url,
            "running_version": proto::VERSION,
            "last_running_at": of(|status| status.last_running_unix_ms),
            "last_warming_at": of(|status| status.last_warming_unix_ms),
            "timestamp": time(Timestamp::now()),
            "org": org,
        })
    }
}

/// The counters that a list carries twice.
pub(crate) fn org_json(org: &str, counts: Counts) -> Value {
    json!({
        "name": org,
        "running": counts.running,
        "warm": counts.warm,
        "cold": counts.cold,
        "running_limit": SPRITES_PER_ORG_MAX,
        "warm_limit": SPRITES_PER_ORG_MAX,
    })
}

fn auth_word(auth: UrlAuth) -> &'static str {
    match auth {
        UrlAuth::Sprite => "sprite",
        UrlAuth::Public => "public",
    }
}

pub(crate) fn idle_timeout(record: &SpriteRecord) -> String {
    record.idle.pause_after_ms.map_or_else(|| "never".to_owned(), duration::format_ms)
}

/// RFC 3339 in UTC with exactly three fractional digits: some clients read 0, 3 or 6 only.
pub(crate) fn time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// 0 means never.
pub(crate) fn time_of_ms(unix_ms: u64) -> Option<String> {
    let ms = i64::try_from(unix_ms).ok().filter(|ms| *ms > 0)?;
    Timestamp::from_millisecond(ms).ok().map(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits_and_never_are_empty() {
        let check = |ms: u64, text: Option<&str>| assert_eq!(time_of_ms(ms).as_deref(), text, "{ms}");
        check(0, None);
        check(1_700_000_000_000, Some("2023-11-14T22:13:20.000Z"));
        check(1_700_000_000_007, Some("2023-11-14T22:13:20.007Z"));
        check(u64::MAX, None);
    }

    #[test]
    fn states_have_the_dialects_words() {
        for (state, word) in [
            ("running", "running"),
            ("restoring", "running"),
            ("paused", "warm"),
            ("suspended", "warm"),
            ("cold", "cold"),
            ("failed", "cold"),
            ("creating", "cold"),
        ] {
            let status = SpriteStatus { state: state.into(), ..Default::default() };
            assert_eq!(status_word(Some(&status)), word, "{state}");
        }
        assert_eq!(status_word(None), "cold");
    }
}

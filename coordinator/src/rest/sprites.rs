//! Create, list, get, update, destroy.

use std::collections::BTreeMap;

use axum::{body::Body, http::StatusCode, response::Response};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use proto::{
    id::SpriteName,
    record::{DISK_BYTES_DEFAULT, SizeClass, UrlAuth, UrlSettings},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, json_response, no_content, read_json};
use crate::{
    refusal::Refusal,
    service::{ForkSource, IdleTimeout, NewSprite, PAGE_MAX, Update, WakeTimers, labels, request_id},
    view::{SPRITES_PER_ORG_MAX, View, org_json},
};

/// A thin disk costs what is written; this only keeps numbers sane (ext4 with 4 KiB blocks ends at 16 TiB).
const DISK_BYTES_MAX: u64 = 16 << 40;

#[derive(Deserialize, Default)]
struct UrlSettingsBody {
    auth: Option<String>,
    private_access: Option<String>,
}

#[derive(Deserialize)]
struct CreateBody {
    name: Option<String>,
    environment: Option<BTreeMap<String, String>>,
    url_settings: Option<UrlSettingsBody>,
    labels: Option<Vec<String>>,
    wait_for_capacity: Option<bool>,
    size: Option<String>,
    disk_bytes: Option<u64>,
    idle_timeout: Option<String>,
    always_on: Option<bool>,
    request_id: Option<String>,
    from: Option<Value>,
}

#[derive(Deserialize)]
struct UpdateBody {
    url_settings: Option<UrlSettingsBody>,
    labels: Option<Vec<String>>,
    clear_labels: Option<bool>,
    idle_timeout: Option<String>,
    always_on: Option<bool>,
    wake_at: Option<Vec<String>>,
    wake_every: Option<String>,
    size: Option<Value>,
    disk_bytes: Option<Value>,
}

pub(super) async fn create(call: &Call, body: Body) -> Result<Response, Refusal> {
    let body: CreateBody = read_json(body).await?;
    let url_settings = body.url_settings.unwrap_or_default();
    let new = NewSprite {
        name: body.name.unwrap_or_default().parse::<SpriteName>()?,
        size: body.size.as_deref().map(size).transpose()?,
        disk_bytes: body.disk_bytes.map(disk_bytes).transpose()?,
        from: body.from.as_ref().map(read_fork_source).transpose()?,
        labels: labels(body.labels.unwrap_or_default())?,
        environment: body.environment.unwrap_or_default(),
        url_settings: UrlSettings {
            auth: url_settings.auth.as_deref().map_or(Ok(UrlAuth::Sprite), url_auth)?,
            private_access: url_settings.private_access.as_deref().map(private_access).transpose()?,
        },
        idle_timeout: body.idle_timeout.as_deref().map(IdleTimeout::parse).transpose()?,
        always_on: body.always_on.unwrap_or_default(),
        wait_for_capacity: body.wait_for_capacity.unwrap_or_default(),
        request_id: request_id(body.request_id.unwrap_or_default())?,
    };
    let view = call.service.create(call.org(), new).await?;
    Ok(json_response(StatusCode::CREATED, &view.to_json()))
}

pub(super) async fn get(call: &Call, name: &str) -> Result<Response, Refusal> {
    let view = call.service.get(call.org(), name).await?;
    Ok(json_response(StatusCode::OK, &view.to_json()))
}

pub(super) async fn update(call: &Call, body: Body, name: &str) -> Result<Response, Refusal> {
    let body: UpdateBody = read_json(body).await?;
    if body.size.is_some() {
        return Err(Refusal::Invalid("the size is chosen at create and cannot be changed".to_owned()));
    }
    if body.disk_bytes.is_some() {
        return Err(Refusal::Invalid("the disk grows by POST …/resize (`sprite resize`)".to_owned()));
    }
    let url_settings = body.url_settings.unwrap_or_default();
    let cleared = body.clear_labels.unwrap_or_default().then(Vec::new);
    let wake = WakeTimers::parse(body.wake_at.as_deref(), body.wake_every.as_deref(), Timestamp::now())?;
    let update = Update {
        url_auth: url_settings.auth.as_deref().map(url_auth).transpose()?,
        private_access: url_settings.private_access.as_deref().map(private_access).transpose()?,
        labels: body.labels.map(labels).transpose()?.or(cleared),
        idle_timeout: body.idle_timeout.as_deref().map(IdleTimeout::parse).transpose()?,
        always_on: body.always_on,
        wake,
    };
    let view = call.service.update(call.org(), name, update).await?;
    Ok(json_response(StatusCode::OK, &view.to_json()))
}

pub(super) async fn destroy(call: &Call, name: &str) -> Result<Response, Refusal> {
    call.service.destroy(call.org(), name).await?;
    Ok(no_content())
}

pub(super) async fn list(call: &Call) -> Result<Response, Refusal> {
    let prefix = call.query("prefix").unwrap_or_default();
    // Anything that is not a number is taken as none: the dialect clamps, it does not refuse.
    let limit = call.query("max_results").and_then(|text| text.parse().ok()).unwrap_or(PAGE_MAX);
    let after = call
        .query("continuation_token")
        .filter(|token| !token.is_empty())
        .map(|token| read_token(&token))
        .transpose()?;
    let listed = call.service.list(call.org(), &prefix, after.as_deref(), limit).await?;
    let org = org_json(call.org(), listed.counts);
    let mut body = json!({
        "sprites": listed.sprites.iter().map(View::to_json).collect::<Vec<_>>(),
        "has_more": listed.next.is_some(),
        "next_continuation_token": listed.next.as_ref().map(token_after),
    });
    if let (Value::Object(body), Value::Object(counters)) = (&mut body, &org) {
        body.extend(counters.clone());
        body.insert("org".to_owned(), org);
    }
    Ok(json_response(StatusCode::OK, &body))
}

pub(super) async fn organization(call: &Call) -> Result<Response, Refusal> {
    call.service.index().refresh(crate::index::AGE_MAX).await?;
    let running = call.service.all(call.org(), "").into_iter().filter(|view| view.word() == "running");
    let names: Vec<String> = running.map(|view| view.record.name.to_string()).collect();
    let organization = json!({
        "slug": call.org(),
        "sprites_enabled": true,
        "active_sprites": names,
        "max_sprites": SPRITES_PER_ORG_MAX,
        "active_sprite_limit": SPRITES_PER_ORG_MAX,
    });
    Ok(json_response(StatusCode::OK, &json!({ "organization": organization })))
}

/// Opaque to clients; pages stay right when sprites come and go in between.
pub(crate) fn token_after(name: &SpriteName) -> String {
    URL_SAFE_NO_PAD.encode(name.as_str())
}

/// The name that a page begins behind.
pub(crate) fn read_token(token: &str) -> Result<String, Refusal> {
    let name = URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let name = name.filter(|name| name.parse::<SpriteName>().is_ok());
    name.ok_or_else(|| {
        Refusal::Malformed(format!(
            "continuation_token {token:?} is not one that a list gave; start from the first page"
        ))
    })
}

pub(crate) fn size(text: &str) -> Result<SizeClass, Refusal> {
    text.parse().map_err(|error: proto::record::BadSize| Refusal::Invalid(error.to_string()))
}

fn disk_bytes(bytes: u64) -> Result<u64, Refusal> {
    if bytes.is_multiple_of(1 << 20) && (DISK_BYTES_DEFAULT..=DISK_BYTES_MAX).contains(&bytes) {
        return Ok(bytes);
    }
    Err(Refusal::Invalid(format!(
        "a disk of {bytes} bytes is not whole MiB from 100 GiB to 16 TiB; it is thin, so only what is written costs"
    )))
}

/// `{"sprite": "demo", "checkpoint": "v3"}` or `"demo@v3"`. Anything else is refused: a slip of the pen must not fork something else.
fn read_fork_source(from: &Value) -> Result<ForkSource, Refusal> {
    let wrong = || {
        let form =
            r#"`from` is {"sprite": "demo", "checkpoint": "v3"} or "demo@v3"; without a checkpoint, demo as it is now"#;
        Refusal::Invalid(form.to_owned())
    };
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned).ok_or_else(wrong);
    match from {
        Value::String(from) => {
            let (sprite, checkpoint) = match from.split_once('@') {
                Some((sprite, checkpoint)) => (sprite, Some(checkpoint)),
                None => (from.as_str(), None),
            };
            if sprite.is_empty() || checkpoint.is_some_and(str::is_empty) {
                return Err(wrong());
            }
            Ok(ForkSource { sprite: sprite.to_owned(), checkpoint: checkpoint.map(str::to_owned) })
        }
        Value::Object(fields) if fields.keys().all(|key| matches!(key.as_str(), "sprite" | "checkpoint")) => {
            let sprite = text(fields.get("sprite").unwrap_or(&Value::Null))?;
            let checkpoint = fields.get("checkpoint").filter(|checkpoint| !checkpoint.is_null());
            Ok(ForkSource { sprite, checkpoint: checkpoint.map(text).transpose()? })
        }
        _ => Err(wrong()),
    }
}

fn url_auth(text: &str) -> Result<UrlAuth, Refusal> {
    match text {
        "sprite" => Ok(UrlAuth::Sprite),
        "public" => Ok(UrlAuth::Public),
        other => Err(Refusal::Invalid(format!("url_settings.auth {other:?} is neither sprite nor public"))),
    }
}

/// Tokens have no roles yet, so what would keep others of the organisation out is refused: nobody shall believe that it does.
fn private_access(text: &str) -> Result<String, Refusal> {
    match text {
        "org_users" => Ok(text.to_owned()),
        "admins" => Err(Refusal::Invalid(
            "url_settings.private_access \"admins\" is not supported yet: every token of the organisation opens a private URL (\"org_users\")"
                .to_owned(),
        )),
        other => Err(Refusal::Invalid(format!("url_settings.private_access {other:?} is not org_users"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forked_is_said_exactly() {
        let read = |from: Value| read_fork_source(&from).ok().map(|from| (from.sprite, from.checkpoint));
        let source = |checkpoint: Option<&str>| Some(("demo".to_owned(), checkpoint.map(str::to_owned)));
        assert_eq!(read(json!({ "sprite": "demo", "checkpoint": "v3" })), source(Some("v3")));
        assert_eq!(read(json!({ "sprite": "demo", "checkpoint": null })), source(None));
        assert_eq!(read(json!("demo@v3")), source(Some("v3")));
        assert_eq!(read(json!("demo")), source(None));
        for wrong in [
            json!({}),
            json!({ "sprite": "demo", "chekpoint": "v9" }),
            json!({ "sprite": "demo", "checkpoint": "" }),
            json!({ "sprite": 7 }),
            json!("demo@"),
            json!("@v3"),
            json!(""),
            json!(["demo"]),
            json!(3),
        ] {
            assert_eq!(read(wrong.clone()), None, "{wrong}");
        }
    }
}

//! `sprite url` and `sprite config`

use clap::{Args, Subcommand, ValueEnum};
use http::Method;
use serde_json::{Value, json};

use super::Done;
use crate::{
    api::{Api, Call},
    context::Context,
    failure::Failure,
    output,
    sprite::{self, Sprite, about},
    target::Target,
    units,
};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  curl -H \"Authorization: Bearer $SPRITE_TOKEN\" \"$(sprite url demo)\"
  sprite url demo --public         anybody can open it
  sprite url demo --private

It reaches port 8080 in the sprite and wakes it.")]
pub(crate) struct Url {
    #[command(subcommand)]
    command: Option<UrlCommand>,
    /// The sprite
    name: Option<String>,
    /// Let anybody open it
    #[arg(long, conflicts_with = "private")]
    public: bool,
    /// Only with a token of the organisation
    #[arg(long)]
    private: bool,
}

#[derive(Clone, Debug, Subcommand)]
enum UrlCommand {
    /// Say who may open it
    Update {
        /// Who
        #[arg(long)]
        auth: Auth,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Auth {
    /// With a token of the organisation
    #[value(alias = "default", alias = "private")]
    Sprite,
    /// Anybody
    Public,
}

impl Auth {
    fn settings(self) -> Value {
        json!({ "auth": match self { Self::Sprite => "sprite", Self::Public => "public" } })
    }
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite config update -s demo --url-auth public
  sprite config update -s demo --idle-timeout never --label ci --label nightly
  sprite config update -s demo --clear-labels")]
pub(crate) struct Config {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum ConfigCommand {
    /// Change settings; what is not named stays
    Update(Update),
}

#[derive(Clone, Debug, Args)]
struct Update {
    /// The sprite
    name: Option<String>,
    /// Who may open its URL
    #[arg(long)]
    url_auth: Option<Auth>,
    /// For compatibility; every token of the organisation opens a private URL
    #[arg(long, value_name = "org_users", hide = true)]
    private_access: Option<String>,
    /// Its labels from now on, instead of those it has; may be repeated
    #[arg(long = "label", value_name = "LABEL", conflicts_with = "clear_labels")]
    labels: Vec<String>,
    /// Remove all labels
    #[arg(long)]
    clear_labels: bool,
    /// Sleeps after this long without use, or `never`
    #[arg(long, value_name = "DURATION", value_parser = units::duration_or_never)]
    idle_timeout: Option<String>,
    /// Never sleeps, and is started again after a loss
    #[arg(long, value_name = "true|false")]
    always_on: Option<bool>,
    /// Print the sprite as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn url(context: &Context, arguments: Url) -> Done {
    let name = context.sprite(arguments.name.as_deref())?;
    let api = context.api()?;
    let auth = match (arguments.command, arguments.public, arguments.private) {
        (Some(UrlCommand::Update { auth }), _, _) => Some(auth),
        (None, true, _) => Some(Auth::Public),
        (None, false, true) => Some(Auth::Sprite),
        (None, false, false) => None,
    };
    let sprite = match auth {
        None => sprite::get(&api, &name).await?,
        Some(auth) => put(&api, &name, &json!({ "url_settings": auth.settings() })).await?,
    };
    if auth.is_some() {
        output::note(if sprite.is_public() {
            "✓ public: anybody can open it"
        } else {
            "✓ private: only with a token of the organisation"
        });
    }
    match sprite.text("url") {
        "" => Err(Failure::new(format!("{name} has no URL"))),
        url => output::answer(url).map(|()| 0),
    }
}

pub(crate) async fn config(context: &Context, arguments: Config) -> Done {
    let ConfigCommand::Update(update) = arguments.command;
    let name = context.sprite(update.name.as_deref())?;
    let body = body(&update);
    if body.as_object().is_some_and(serde_json::Map::is_empty) {
        return Err(Failure::usage("nothing to change").advise("`sprite config update --help` shows what can be"));
    }
    let sprite = put(&context.api()?, &name, &body).await?;
    if update.json {
        output::json(&sprite.0)?;
    } else {
        output::answer(format!("✓ Changed {name}"))?;
    }
    Ok(0)
}

fn body(update: &Update) -> Value {
    let mut body = json!({});
    if let Some(auth) = update.url_auth {
        body["url_settings"] = auth.settings();
    }
    if let Some(access) = &update.private_access {
        body["url_settings"]["private_access"] = json!(access);
    }
    if !update.labels.is_empty() {
        body["labels"] = json!(update.labels);
    }
    if update.clear_labels {
        body["clear_labels"] = json!(true);
    }
    if let Some(timeout) = &update.idle_timeout {
        body["idle_timeout"] = json!(timeout);
    }
    if let Some(always_on) = update.always_on {
        body["always_on"] = json!(always_on);
    }
    body
}

async fn put(api: &Api, name: &str, body: &Value) -> Result<Sprite, Failure> {
    api.json(&Call::new(Method::PUT, Target::sprite(name)).json(body)).await.map(Sprite).map_err(about(name))
}

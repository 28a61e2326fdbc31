//! `sprite login`, `auth setup`, `logout`, `org`

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use clap::{Args, Subcommand};

use super::Done;
use crate::{
    api::{Api, Call},
    config::{Config, org_of_token},
    connection::Origin,
    context::Context,
    failure::Failure,
    output,
    table::Table,
    target::Target,
};

/// A token has about a hundred.
const TOKEN_CHARS_MAX: usize = 4096;

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite login https://api.sprites.example
  sprite login https://api.sprites.example --token acme/org-1/tok-1/secret
  pass show sprites | sprite login https://api.sprites.example

The token is checked and kept in ~/.sprites/sprites.json, which only you can read.")]
pub(crate) struct Login {
    /// The API [default: SPRITES_API_URL, or the last one]
    url: Option<String>,
    /// The token; without it you are asked, or it is read from stdin
    #[arg(long)]
    token: Option<String>,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite auth setup --token acme/org-1/tok-1/secret --url https://api.sprites.example")]
pub(crate) struct Auth {
    #[command(subcommand)]
    command: AuthCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum AuthCommand {
    /// Keep a token, without questions
    Setup {
        /// organisation/id/token-id/secret
        #[arg(long)]
        token: String,
        /// The API [default: SPRITES_API_URL, or the last one]
        #[arg(long)]
        url: Option<String>,
    },
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite logout                                forgets every token
  sprite logout https://api.sprites.example    those of one API")]
pub(crate) struct Logout {
    /// The API
    url: Option<String>,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  sprite org list")]
pub(crate) struct Org {
    #[command(subcommand)]
    command: OrgCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum OrgCommand {
    /// Show those whose tokens are kept; * is the one in use
    #[command(visible_alias = "ls")]
    List,
}

pub(crate) async fn login(context: &Context, arguments: Login) -> Done {
    let token = match arguments.token {
        Some(token) => token,
        None => ask_for_token()?,
    };
    keep(context, arguments.url, &token).await
}

pub(crate) async fn auth(context: &Context, arguments: Auth) -> Done {
    let AuthCommand::Setup { token, url } = arguments.command;
    keep(context, url, &token).await
}

pub(crate) fn logout(arguments: &Logout) -> Done {
    let path = Config::path()?;
    let mut config = Config::load(&path)?;
    let url = arguments.url.as_deref().map(|url| url.trim_end_matches('/'));
    let forgotten = config.sign_out(url);
    if forgotten > 0 {
        config.save(&path)?;
    }
    output::note(format!("✓ forgot {forgotten} token{}", if forgotten == 1 { "" } else { "s" }));
    if std::env::var_os("SPRITE_TOKEN").is_some() {
        output::note("  SPRITE_TOKEN is set in this shell and goes on to be used");
    }
    Ok(0)
}

pub(crate) fn org(arguments: Org) -> Done {
    let OrgCommand::List = arguments.command;
    let config = Config::load(&Config::path()?)?;
    let mut table = Table::new(&["", "ORGANISATION", "API"]);
    for (url, org, current) in config.orgs() {
        table.row([if current { "*" } else { "" }.to_owned(), org.to_owned(), url.to_owned()]);
    }
    output::answer(table)?;
    Ok(0)
}

async fn keep(context: &Context, url: Option<String>, token: &str) -> Done {
    let path = Config::path()?;
    let mut config = Config::load(&path)?;
    let url = match url {
        Some(url) => url,
        None => Context::api_url(&config)?,
    };
    let origin = Origin::parse(&url)?;
    let url = origin.url.clone();
    let token = token.trim();
    // Before it is kept: a typing error is found now, not at the next command.
    let list = Api::new(origin, token.to_owned())?.json(&Call::get(Target::sprites().with("max_results", "1"))).await?;
    let told = [&list["name"], &list["org"]["name"]]
        .into_iter()
        .find_map(|name| name.as_str().filter(|name| !name.is_empty()));
    let org = told.or(org_of_token(token)).or(context.org()).unwrap_or("default").to_owned();
    config.sign_in(&url, &org, token);
    config.save(&path)?;
    output::note(format!("✓ logged in to {url} as {org}; kept in {}", path.display()));
    Ok(0)
}

/// What is typed is shown: turning that off is not worth a terminal left blind. A token is pasted, and the line is erased.
fn ask_for_token() -> Result<String, Failure> {
    let stdin = io::stdin();
    let asked = stdin.is_terminal();
    if asked {
        drop(write!(io::stderr(), "Token: "));
    }
    let mut token = String::new();
    io::Read::take(stdin.lock(), u64::try_from(TOKEN_CHARS_MAX).unwrap_or(u64::MAX))
        .read_line(&mut token)
        .map_err(|error| Failure::new(format!("no token on standard input: {error}")))?;
    if asked {
        // Up one line and clear it.
        drop(write!(io::stderr(), "\x1b[1A\x1b[2K"));
    }
    if token.trim().is_empty() {
        return Err(Failure::usage("no token was given").advise("--token TOKEN, or on stdin"));
    }
    Ok(token)
}

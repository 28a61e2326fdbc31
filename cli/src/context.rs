//! Who asks whom about which sprite: the global options, the environment and the files, in this order.

use clap::Args;

use crate::{
    api::Api,
    config::{Config, Folder},
    connection::Origin,
    failure::Failure,
};

/// Options of every command.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Globals {
    /// The sprite; without it the one that `sprite use` chose for this folder
    #[arg(short = 's', long, global = true, value_name = "NAME")]
    sprite: Option<String>,
    /// The organisation, if you have tokens of several
    #[arg(short = 'o', long, global = true, value_name = "SLUG", env = "SPRITE_ORG")]
    org: Option<String>,
}

/// What every command starts from.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    globals: Globals,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

impl Context {
    pub(crate) fn new(globals: Globals) -> Self {
        Self { globals }
    }

    pub(crate) fn org(&self) -> Option<&str> {
        self.globals.org.as_deref().filter(|org| !org.is_empty())
    }

    /// SPRITES_API_URL, else where the user last logged in.
    pub(crate) fn api_url(config: &Config) -> Result<String, Failure> {
        let selected = || config.current_selection.as_ref().map(|selection| selection.url.clone());
        variable("SPRITES_API_URL").or_else(selected).ok_or_else(|| {
            Failure::usage("no cluster to talk to")
                .advise("for a local one: `./dev up`, then `eval \"$(./dev env)\"`. Else set SPRITES_API_URL, or `sprite login URL`")
        })
    }

    pub(crate) fn api(&self) -> Result<Api, Failure> {
        // With both in the environment, a damaged file or a missing home is nobody's business.
        let config = match (variable("SPRITES_API_URL"), variable("SPRITE_TOKEN")) {
            (Some(_), Some(_)) => Config::default(),
            _ => Config::load(&Config::path()?)?,
        };
        let origin = Origin::parse(&Self::api_url(&config)?)?;
        let org = self.org().map(str::to_owned).or(self.folder_org()?);
        let kept = || config.token(&origin.url, org.as_deref()).map(str::to_owned);
        let token = variable("SPRITE_TOKEN").or_else(kept).ok_or_else(|| {
            let whose = org.as_ref().map(|org| format!(" of {org}")).unwrap_or_default();
            Failure::usage(format!("no token{whose} for {}", origin.url))
                .advise(format!("`sprite login {}`, or set SPRITE_TOKEN", origin.url))
        })?;
        Api::new(origin, token)
    }

    fn folder_org(&self) -> Result<Option<String>, Failure> {
        Ok(Self::folder()?.and_then(|folder| folder.organization))
    }

    fn folder() -> Result<Option<Folder>, Failure> {
        match std::env::current_dir() {
            Ok(here) => Folder::find(&here),
            // A folder that was deleted under us has no choice in it.
            Err(_gone) => Ok(None),
        }
    }

    /// `-s`, else `positional`, else the folder's.
    pub(crate) fn sprite(&self, positional: Option<&str>) -> Result<String, Failure> {
        let name = match (self.globals.sprite.as_deref(), positional) {
            (Some(one), Some(other)) if one != other => {
                return Err(Failure::usage(format!("-s says {one:?}, the command {other:?}: which sprite is meant?")));
            }
            (Some(name), _) | (None, Some(name)) => name.to_owned(),
            (None, None) => match Self::folder()? {
                Some(folder) => folder.sprite,
                None => {
                    return Err(Failure::usage("which sprite? Say -s NAME")
                        .advise("`sprite list` shows yours; `sprite use NAME` chooses one for this folder"));
                }
            },
        };
        if name.is_empty() {
            return Err(Failure::usage("the sprite's name is empty"));
        }
        Ok(name)
    }

    /// As given on the command line, for commands that make a sprite.
    pub(crate) fn given(&self, positional: Option<String>) -> Result<Option<String>, Failure> {
        match (&self.globals.sprite, &positional) {
            (None, None) => Ok(None),
            (_, Some(name)) if name.is_empty() => Ok(positional),
            _ => self.sprite(positional.as_deref()).map(Some),
        }
    }
}

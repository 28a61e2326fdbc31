//! `sprited token`: API tokens of this cluster.

use clap::{Args, Subcommand};

use crate::{config::Settings, parts};

#[derive(Args)]
pub(crate) struct TokenArguments {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Prints the first token, which the cluster's start wrote into the data folder.
    Show(Settings),
    /// Mints another token; it is shown once and only its hash is kept.
    Mint(Settings),
}

pub(crate) async fn run(arguments: TokenArguments) -> anyhow::Result<()> {
    match arguments.command {
        TokenCommand::Show(settings) => {
            let path = settings.check()?.data.token();
            let token = std::fs::read_to_string(&path).map_err(|error| {
                anyhow::anyhow!("no token at {}: {error}; the first start of `sprited dev` makes it", path.display())
            })?;
            println!("{}", token.trim());
        }
        TokenCommand::Mint(settings) => println!("{}", parts::mint_token(&settings.check()?).await?),
    }
    Ok(())
}

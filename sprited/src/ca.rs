//! `sprited ca`: the local certificate authority, for tools that have to trust it.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Subcommand};

use crate::{
    config::{DATA_DEFAULT, absolute},
    data_dir::DataDir,
};

#[derive(Args)]
pub(crate) struct CaArguments {
    /// The data folder whose authority is meant.
    #[arg(long, value_name = "DIR", env = "SPRITES_DATA", default_value = DATA_DEFAULT, global = true)]
    data: PathBuf,
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Subcommand)]
enum CaCommand {
    /// Prints the path of the certificate.
    Path,
    /// Prints the certificate (PEM).
    Show,
}

pub(crate) fn run(arguments: &CaArguments) -> anyhow::Result<ExitCode> {
    let path = DataDir::at(absolute(arguments.data.clone())?).ca_certificate();
    let pem = std::fs::read_to_string(&path)
        .with_context(|| format!("no certificate at {}; the first start of `sprited dev` makes it", path.display()))?;
    match arguments.command {
        CaCommand::Path => println!("{}", path.display()),
        CaCommand::Show => print!("{pem}"),
    }
    Ok(ExitCode::SUCCESS)
}

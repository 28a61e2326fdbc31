//! `sprited status`: is a cluster running on this data folder, and where does it answer?

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    config::{DATA_DEFAULT, absolute},
    data_dir::DataDir,
    ready::Ready,
};

/// As `systemctl status` does for "not running".
const EXIT_NOT_RUNNING: u8 = 3;

#[derive(Args)]
pub(crate) struct StatusArguments {
    /// The data folder to look at.
    #[arg(long, value_name = "DIR", env = "SPRITES_DATA", default_value = DATA_DEFAULT)]
    data: PathBuf,
    /// Print what the cluster says about itself as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &StatusArguments) -> anyhow::Result<ExitCode> {
    let data = DataDir::at(absolute(arguments.data.clone())?);
    let Some(pid) = data.holder() else {
        println!("not running on {}", data.path().display());
        return Ok(ExitCode::from(EXIT_NOT_RUNNING));
    };
    let ready = match Ready::read(&data.ready()) {
        Ok(ready) if ready.pid == pid => ready,
        Ok(_) | Err(_) => {
            println!("starting or stopping (pid {pid})");
            return Ok(ExitCode::from(EXIT_NOT_RUNNING));
        }
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&ready)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("running        pid {}, since {}", ready.pid, ready.started_at.strftime("%F %T UTC"));
    println!("API            {}", ready.api_url);
    println!("sprites        https://<name>-<oid>.{}", ready.domain);
    println!("bucket         {}", ready.bucket);
    println!("acceleration   {}", ready.acceleration);
    for notice in &ready.notices {
        println!("note           {notice}");
    }
    Ok(ExitCode::SUCCESS)
}

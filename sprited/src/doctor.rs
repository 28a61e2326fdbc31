//! `sprited doctor`: explains this host. Every finding is the result of trying, where trying is possible, and says what to do.
//!
//! Exits with 1 when something fails that sprites cannot live without, so that scripts can ask.

mod machine;
mod network;
mod storage;

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use clap::Args;
use serde::Serialize;

use crate::config::{DATA_DEFAULT, absolute};

#[derive(Args)]
pub(crate) struct DoctorArguments {
    /// The data folder whose file system is examined.
    #[arg(long, value_name = "DIR", env = "SPRITES_DATA", default_value = DATA_DEFAULT)]
    data: PathBuf,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// Sprites work, but slower, smaller or less isolated than they could.
    Warn,
    /// Sprites cannot work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    found: String,
    /// What to do about it; none when there is nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: None }
    }
    fn warn(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, found: found.into(), advice: Some(advice.into()) }
    }
    fn fail(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

pub(crate) fn run(arguments: &DoctorArguments) -> anyhow::Result<ExitCode> {
    let data = absolute(arguments.data.clone())?;
    let mut findings = machine::examine();
    findings.extend(storage::examine(&data));
    findings.extend(network::examine());
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print(&findings);
    }
    let failed = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(findings: &[Finding]) {
    for Finding { check, level, found, advice } in findings {
        let mark = match level {
            Level::Ok => "✓",
            Level::Warn => "!",
            Level::Fail => "✗",
        };
        println!("{mark} {check:<14} {found}");
        if let Some(advice) = advice {
            println!("  {:<14} → {advice}", "");
        }
    }
    let count = |wanted| findings.iter().filter(|finding| finding.level == wanted).count();
    println!("\n{} ok, {} warnings, {} failures", count(Level::Ok), count(Level::Warn), count(Level::Fail));
}

/// Standard output of a command that succeeded; otherwise what went wrong, in one line.
fn output_of(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}", complaint.lines().next().unwrap_or("failed without a word")))
}

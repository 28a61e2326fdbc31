//! `dev-s3`: an S3 server for development that can misbehave on demand. Prints its address when it is ready.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Parser;
use dev_s3::{Config, Faults, Rate};

/// A small S3 server for development and tests, with faults on demand
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address to listen on; port 0 picks a free one
    #[arg(long, default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// Folder that keeps the objects; without it they are kept in memory
    #[arg(long)]
    root: Option<PathBuf>,
    /// Bucket that exists from the start (repeatable)
    #[arg(long, default_value = "sprites")]
    bucket: Vec<String>,
    #[arg(long, env = "AWS_ACCESS_KEY_ID", default_value = "dev")]
    access_key: String,
    #[arg(long, env = "AWS_SECRET_ACCESS_KEY", default_value = "devsecret", hide_env_values = true)]
    secret_key: String,
    /// Delay before each request
    #[arg(long, default_value_t = 0, value_name = "MS")]
    latency_ms: u64,
    /// Share of requests answered with 500 and not carried out
    #[arg(long, default_value = "0", value_name = "0..1")]
    fail_rate: Rate,
    /// Share of writes carried out and then answered with 500
    #[arg(long, default_value = "0", value_name = "0..1")]
    fail_after_apply_rate: Rate,
    /// Share of conditional writes answered with 409 and not carried out
    #[arg(long, default_value = "0", value_name = "0..1")]
    conflict_rate: Rate,
    /// Share of requests carried out whose connection closes without an answer
    #[arg(long, default_value = "0", value_name = "0..1")]
    drop_reply_rate: Rate,
    /// Share of reads whose body ends in the middle
    #[arg(long, default_value = "0", value_name = "0..1")]
    truncate_rate: Rate,
    /// Pretend that If-Match and If-None-Match were not there
    #[arg(long)]
    ignore_conditions: bool,
    /// Accept ETags in If-Match only without quotes, as Ceph RGW does
    #[arg(long)]
    refuse_quoted_etag: bool,
    /// Refuse every write
    #[arg(long)]
    read_only: bool,
    /// Seed of the faults
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Args {
    fn into_config(self) -> Config {
        let faults = Faults {
            latency: Duration::from_millis(self.latency_ms),
            fail: self.fail_rate,
            fail_after_apply: self.fail_after_apply_rate,
            conflict: self.conflict_rate,
            drop_reply: self.drop_reply_rate,
            truncate: self.truncate_rate,
            ignore_conditions: self.ignore_conditions,
            refuse_quoted_etag: self.refuse_quoted_etag,
            read_only: self.read_only,
        };
        Config {
            listen: self.listen,
            root: self.root,
            buckets: self.bucket,
            access_key: self.access_key,
            secret_key: self.secret_key,
            faults,
            seed: self.seed,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let server = dev_s3::serve(Args::parse().into_config()).await?;
    println!("{}", server.endpoint());
    tokio::select! {
        () = server.wait() => Ok(()),
        done = tokio::signal::ctrl_c() => Ok(done?),
    }
}

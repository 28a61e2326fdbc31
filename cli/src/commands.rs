//! The subcommands, one file each. A command returns the exit code of the process.

use clap::{CommandFactory, Subcommand};

use crate::{context::Context, failure::Failure};

mod api;
mod checkpoint;
mod completion;
mod console;
mod create;
mod destroy;
mod exec;
mod http_exec;
mod info;
mod list;
mod login;
mod proxy;
mod resize;
mod sessions;
mod settings;
mod sleep;
mod sync;
mod use_sprite;

type Done = Result<u8, Failure>;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a sprite, and open a shell in it
    Create(create::Arguments),
    /// Choose the sprite for commands in this folder
    Use(use_sprite::Arguments),
    /// Show sprites with their states, ages, sizes and URLs
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    /// Show everything about a sprite
    Info(info::Arguments),
    /// Remove a sprite, its disk and its checkpoints
    Destroy(destroy::Arguments),
    /// Run a command
    #[command(visible_alias = "x")]
    Exec(exec::Arguments),
    /// Open a shell
    #[command(visible_alias = "c")]
    Console(console::Arguments),
    /// Running commands: list, attach, kill
    #[command(visible_alias = "s")]
    Sessions(sessions::Arguments),
    /// Connect this terminal to a running command
    Attach(sessions::Attach),
    /// Kept states of the disk: create, list, info, delete, restore
    #[command(visible_alias = "checkpoints")]
    Checkpoint(checkpoint::Arguments),
    /// Bring the disk back to a checkpoint
    Restore(checkpoint::Restore),
    /// Put a sprite to sleep now
    Sleep(sleep::Sleep),
    /// Wake a sprite, now or later
    Wake(sleep::Wake),
    /// Wait until everything a sprite wrote is in the bucket
    Sync(sync::Arguments),
    /// Grow a sprite's disk
    Resize(resize::Arguments),
    /// Show a sprite's address, or say who may open it
    Url(settings::Url),
    /// Change a sprite's settings
    Config(settings::Config),
    /// Forward ports of a sprite to this machine
    Proxy(proxy::Arguments),
    /// Call the REST API
    Api(api::Arguments),
    /// Keep a token for an API
    Login(login::Login),
    /// Keep a token without questions, for scripts
    Auth(login::Auth),
    /// Forget tokens
    Logout(login::Logout),
    /// Organisations with a kept token
    #[command(visible_aliases = ["orgs", "organizations", "o"])]
    Org(login::Org),
    /// Print a completion script for a shell
    Completion(completion::Arguments),
}

/// Carries out one command of the command line `C`.
pub(crate) async fn run<C: CommandFactory>(context: &Context, command: Command) -> Done {
    match command {
        Command::Create(arguments) => create::run(context, arguments).await,
        Command::Use(arguments) => use_sprite::run(context, arguments).await,
        Command::List(arguments) => list::run(context, arguments).await,
        Command::Info(arguments) => info::run(context, arguments).await,
        Command::Destroy(arguments) => destroy::run(context, arguments).await,
        Command::Exec(arguments) => exec::run(context, arguments).await,
        Command::Console(arguments) => console::run(context, arguments).await,
        Command::Sessions(arguments) => sessions::run(context, arguments).await,
        Command::Attach(arguments) => sessions::attach(context, arguments).await,
        Command::Checkpoint(arguments) => checkpoint::run(context, arguments).await,
        Command::Restore(arguments) => checkpoint::restore(context, arguments).await,
        Command::Sleep(arguments) => sleep::sleep(context, arguments).await,
        Command::Wake(arguments) => sleep::wake(context, arguments).await,
        Command::Sync(arguments) => sync::run(context, arguments).await,
        Command::Resize(arguments) => resize::run(context, arguments).await,
        Command::Url(arguments) => settings::url(context, arguments).await,
        Command::Config(arguments) => settings::config(context, arguments).await,
        Command::Proxy(arguments) => proxy::run(context, arguments).await,
        Command::Api(arguments) => api::run(context, arguments).await,
        Command::Login(arguments) => login::login(context, arguments).await,
        Command::Auth(arguments) => login::auth(context, arguments).await,
        Command::Logout(arguments) => login::logout(&arguments),
        Command::Org(arguments) => login::org(arguments),
        Command::Completion(arguments) => completion::run::<C>(&arguments),
    }
}

//! What a user does, against one cluster that all these tests share. One file per topic.

mod checkpoint;
mod create;
mod exec;
mod names;
mod network;
mod sleep;
mod terminal;
mod url;

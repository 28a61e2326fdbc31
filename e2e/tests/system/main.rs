//! What a user does, against one cluster that all these tests share. One file per topic.

mod checkpoint;
mod clones;
mod create;
mod deaths;
mod disk;
mod docker;
mod exec;
mod fork;
mod grpc;
mod kernel;
mod limits;
mod mdm;
mod names;
mod network;
mod readme;
mod sleep;
mod terminal;
mod url;
mod volume;

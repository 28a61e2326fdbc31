pub mod ca;
mod headers;
mod host;
mod path;

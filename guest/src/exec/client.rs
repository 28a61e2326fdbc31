//! One client of a session: what it sends, and what it is sent.

use std::{sync::Arc, time::Duration};

use proto::agent::{ExecInput, ExecOutput, exec_input::Input, exec_output::Output};
use tokio::sync::{mpsc, watch};

use super::{
    pump::Stdin,
    session::{Attachment, Message},
    signals,
};
use crate::{
    log,
    ports::{self, Listening, Ports},
};

/// A client hears of ports only once its command has run for this long; most commands end before.
const PORTS_AFTER: Duration = Duration::from_millis(500);

/// Passes the session's messages to its client, and what ports are opened and closed meanwhile.
pub(super) async fn pass_on(
    backlog: Vec<Output>,
    mut messages: mpsc::Receiver<Message>,
    to: &mpsc::Sender<Message>,
    ports: &Ports,
) {
    for output in backlog {
        if to.send(Ok(ExecOutput { output: Some(output) })).await.is_err() {
            return;
        }
    }
    let mut watching = None;
    let begin = tokio::time::sleep(PORTS_AFTER);
    tokio::pin!(begin);
    loop {
        let news = tokio::select! {
            biased;
            message = messages.recv() => match message {
                Some(message) => vec![message],
                None => return,
            },
            () = &mut begin, if watching.is_none() => {
                let mut listening = ports.watch().await;
                let known = Arc::clone(&listening.borrow_and_update());
                watching = Some((listening, known));
                continue;
            }
            news = port_news(&mut watching) => news,
        };
        for message in news {
            if to.send(message).await.is_err() {
                return;
            }
        }
    }
}

async fn port_news(watching: &mut Option<(watch::Receiver<Listening>, Listening)>) -> Vec<Message> {
    let Some((listening, known)) = watching else { return std::future::pending().await };
    if listening.changed().await.is_err() {
        return std::future::pending().await;
    }
    let now = Arc::clone(&listening.borrow_and_update());
    let events = ports::changes(known, &now);
    *known = now;
    events.into_iter().map(|event| Ok(ExecOutput { output: Some(Output::Port(event)) })).collect()
}

/// Ends when the client has left.
pub(super) async fn take_inputs(attachment: &Attachment, mut inputs: tonic::Streaming<ExecInput>) {
    let session = attachment.session();
    while let Ok(Some(ExecInput { input })) = inputs.message().await {
        match input {
            Some(Input::Stdin(data)) => session.write(Stdin::Data(data)).await,
            Some(Input::StdinEof(true)) => session.write(Stdin::Eof).await,
            Some(Input::Resize(size)) => attachment.resize(size),
            Some(Input::Signal(name)) => match signals::parse(&name) {
                Some(signal) => {
                    if let Err(error) = session.signal(signal) {
                        log!("{name} to session {}: {error}", session.about.id);
                    }
                }
                None => log!("session {}: {name:?} is not a signal", session.about.id),
            },
            Some(Input::StdinEof(false) | Input::Start(_) | Input::Attach(_)) | None => {}
        }
    }
}

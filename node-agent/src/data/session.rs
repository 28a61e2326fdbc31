//! One command and one client, joined: the part that WebSocket exec, attach and control have in common.

use axum::http::StatusCode;
use futures_util::StreamExt as _;
use proto::agent::{ExecInput, ExecOutput, SessionInfo, exec_input, exec_output};
use tokio::{sync::mpsc, time::Duration};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    frames::{self, Dialect},
    refusal::Refusal,
    websocket::{Gone, Input, Output},
};
use crate::agent::{AgentClient, CallError};

/// Inputs on their way to the guest; behind them the client's socket is not read.
const INPUTS_MAX: usize = 16;
/// From the call to the first word of the session.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A command that runs, seen from here.
#[derive(Debug)]
pub(super) struct Session {
    pub info: SessionInfo,
    /// Ends with a disconnect when dropped.
    pub input: mpsc::Sender<ExecInput>,
    pub output: Streaming<ExecOutput>,
}

/// How a session ended for its client.
#[derive(Debug)]
pub(super) enum Ended {
    Exit(i32),
    /// The client left; the command goes on as long as it was told to.
    Disconnected,
    /// The guest or its host went away.
    Lost(String),
}

impl Session {
    /// Starts a command or attaches, and returns when the guest has said which session it is.
    pub(super) async fn open(agent: &AgentClient, first: exec_input::Input) -> Result<Self, Refusal> {
        let session = match &first {
            exec_input::Input::Attach(attach) => Some(attach.session_id.clone()),
            _ => None,
        };
        match tokio::time::timeout(START_LIMIT, Self::start(agent, first)).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => Err(Refusal::of_call(&error, session.as_deref())),
            Err(_elapsed) => Err(Refusal::new(
                StatusCode::GATEWAY_TIMEOUT,
                "the sprite does not answer",
                "the command may not have started; try again",
            )),
        }
    }

    async fn start(agent: &AgentClient, first: exec_input::Input) -> Result<Self, CallError> {
        let (input, inputs) = mpsc::channel(INPUTS_MAX);
        // There is room: the channel is new.
        drop(input.try_send(ExecInput { input: Some(first) }));
        let mut output = agent.exec(ReceiverStream::new(inputs)).await?;
        let error = |status: tonic::Status| CallError { call: "Exec", source: Box::new(status) };
        match output.message().await.map_err(error)? {
            Some(ExecOutput { output: Some(exec_output::Output::Info(info)) }) => Ok(Self { info, input, output }),
            Some(_) | None => Err(error(tonic::Status::internal("the guest did not say which session this is"))),
        }
    }

    /// Moves bytes both ways until one side ends. Everything the command printed was sent before `Exit` is returned.
    pub(super) async fn join(&mut self, client_out: &mut Output, client_in: &mut Input, dialect: Dialect) -> Ended {
        let tty = self.info.tty;
        let inward = pump_in(client_in, &self.input, tty, dialect);
        let outward = pump_out(&mut self.output, client_out, tty);
        tokio::select! {
            ended = outward => ended,
            () = inward => Ended::Disconnected,
        }
    }
}

/// Ends when the client has left.
async fn pump_in(client: &mut Input, guest: &mpsc::Sender<ExecInput>, tty: bool, dialect: Dialect) {
    while let Some(Ok(message)) = client.next().await {
        if matches!(message, axum::extract::ws::Message::Close(_)) {
            return;
        }
        for input in frames::inputs(message, tty, dialect) {
            // The command has ended; what comes now is too late, and the end is on its way the other way.
            drop(guest.send(input).await);
        }
    }
}

async fn pump_out(guest: &mut Streaming<ExecOutput>, client: &mut Output, tty: bool) -> Ended {
    loop {
        let due = client.keepalive_due();
        let sent = tokio::select! {
            output = guest.message() => match output {
                Ok(Some(ExecOutput { output: Some(output) })) => match output {
                    exec_output::Output::Exit(code) => return Ended::Exit(code),
                    output => send_output(client, output, tty).await,
                },
                Ok(Some(ExecOutput { output: None })) => Ok(()),
                Ok(None) => return Ended::Lost("the sprite was stopped".into()),
                Err(status) => return Ended::Lost(status.message().to_owned()),
            },
            () = tokio::time::sleep_until(due) => keep_alive(client).await,
        };
        if let Err(Gone) = sent {
            return Ended::Disconnected;
        }
    }
}

async fn keep_alive(client: &mut Output) -> Result<(), Gone> {
    client.ping().await?;
    client.json(&frames::keepalive()).await
}

async fn send_output(client: &mut Output, output: exec_output::Output, tty: bool) -> Result<(), Gone> {
    use exec_output::Output as Guest;
    match output {
        Guest::Stdout(data) | Guest::Stderr(data) if tty => client.binary(data).await,
        Guest::Stdout(data) => client.binary(frames::output(frames::Output::Stdout, &data)).await,
        Guest::Stderr(data) => client.binary(frames::output(frames::Output::Stderr, &data)).await,
        Guest::Port(event) => client.json(&frames::port(&event)).await,
        // Told once, at the beginning; the exit is the caller's.
        Guest::Info(_) | Guest::Exit(_) => Ok(()),
    }
}

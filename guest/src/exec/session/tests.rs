use super::*;
use crate::reaper::Reaper;

const STALLED_MAX: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(20);

/// A session whose process does not exist: no signal reaches anybody, and it never ends.
fn session() -> Arc<Session> {
    let child = Reaper::default().fork(|| Ok(i32::MAX)).unwrap();
    let ((stdout, _), (stderr, _)) = (nix::unistd::pipe().unwrap(), nix::unistd::pipe().unwrap());
    let about = About {
        id: "test".into(),
        command: "true".into(),
        workdir: "/".into(),
        tty: false,
        pid: 1,
        max_run: None,
        stalled_max: STALLED_MAX,
        size: TerminalSize::default(),
    };
    Session::over(about, child, Streams::Pipes { stdin: None, stdout, stderr }).unwrap().session
}

async fn print(session: &Session, messages: usize) {
    for _ in 0..messages {
        session.print(Stream::Stdout, "text".into()).await;
    }
}

fn is_full(session: &Session) -> bool {
    session.state().clients[0].queue.capacity() == 0
}

/// All messages that are left: how much was printed, and the last one.
async fn rest(mut messages: mpsc::Receiver<Message>) -> (usize, Option<Message>) {
    let (mut count, mut last) = (0, None);
    while let Some(message) = messages.recv().await {
        match message {
            Ok(ExecOutput { output: Some(Output::Stdout(_)) }) => count += 1,
            other => last = Some(other),
        }
    }
    (count, last)
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped_for_the_others() {
    let session = session();
    let (stalled, mut reader) = (session.attach(None).unwrap(), session.attach(None).unwrap());
    let printing = tokio::time::timeout(LIMIT, print(&session, CLIENT_QUEUE * 4));
    let reading = async {
        for _ in 0..CLIENT_QUEUE * 4 {
            reader.messages.recv().await.unwrap().unwrap();
        }
    };
    let (printed, ()) = tokio::join!(printing, reading);
    printed.expect("a client that does not read stops the command");
    assert_eq!(*session.attached().borrow(), 1, "it counts as a client no more");
    let (got, last) = rest(stalled.messages).await;
    assert_eq!(got, CLIENT_QUEUE);
    let refusal = last.unwrap().unwrap_err();
    assert!(refusal.message().contains("attach again"), "{refusal}");
}

#[tokio::test]
async fn the_pace_of_a_single_client_is_the_commands() {
    let session = session();
    let mut only = session.attach(None).unwrap();
    let printing = tokio::time::timeout(STALLED_MAX * 3, print(&session, CLIENT_QUEUE + 1)).await;
    assert!(printing.is_err() && is_full(&session), "the command has to wait for its reader");
    let reading = async { while only.messages.recv().await.is_some() {} };
    let printing = async {
        print(&session, CLIENT_QUEUE * 4).await;
        session.finish(0);
    };
    tokio::join!(reading, printing);
}

#[tokio::test]
async fn a_client_that_stalled_alone_is_dropped_once_another_comes() {
    let session = session();
    let stalled = session.attach(None).unwrap();
    let printing = tokio::spawn({
        let session = Arc::clone(&session);
        async move { print(&session, CLIENT_QUEUE + 1).await }
    });
    while !is_full(&session) {
        tokio::task::yield_now().await;
    }
    let second = session.attach(None).unwrap();
    tokio::time::timeout(LIMIT, printing).await.expect("still waits for the first client").unwrap();
    session.finish(7);
    assert_eq!(rest(stalled.messages).await.0, CLIENT_QUEUE);
    // What was printed before it came is in its backlog.
    assert_eq!(second.backlog.len(), 2);
    assert!(matches!(rest(second.messages).await, (0, Some(Ok(ExecOutput { output: Some(Output::Exit(7)) })))));
}

/// A signal to all goes to this group and the command's own: twice to one would be "at once" for many programs.
#[tokio::test]
async fn a_command_without_a_terminal_has_no_other_group_to_signal() {
    let session = session();
    assert_eq!(session.foreground(), None);
    session.signal_all(Signal::SIGTERM).unwrap();
}

#[tokio::test]
async fn an_exit_code_waits_for_nobody() {
    let session = session();
    let (stalled, second) = (session.attach(None).unwrap(), session.attach(None).unwrap());
    print(&session, CLIENT_QUEUE).await;
    session.finish(3);
    for client in [stalled, second] {
        let (got, last) = rest(client.messages).await;
        assert!(matches!(last, Some(Ok(ExecOutput { output: Some(Output::Exit(3)) }))) && got == CLIENT_QUEUE);
    }
}

#[tokio::test]
async fn of_several_that_do_not_read_one_stays_and_sets_the_pace() {
    let session = session();
    let clients = [session.attach(None).unwrap(), session.attach(None).unwrap(), session.attach(None).unwrap()];
    let printing = tokio::time::timeout(STALLED_MAX * 5, print(&session, CLIENT_QUEUE + 1)).await;
    assert!(printing.is_err(), "somebody may still want to read it");
    assert_eq!(*session.attached().borrow(), 1);
    drop(clients);
}

//! Two upgraded connections become one: WebSockets, and whatever else a program switches to.
//!
//! Each direction ends by itself (half-close), the tunnel when both have, when one side breaks, when nothing moves for [`SILENCE_MAX`], or when
//! the edge stops. Nothing here reads the bytes: frames are the affair of the two ends.

use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional_with_sizes},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access_log::Record,
    activity::{Activity, Watched},
};

/// The dialect pings every 15 s; somebody who says nothing for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(15 * 60);
const SILENCE_CHECK: Duration = Duration::from_secs(30);
/// Both sides were answered with 101, so that the switch itself is only a matter of scheduling.
const SWITCH_DEADLINE: Duration = Duration::from_secs(10);
/// For each direction.
const BUFFER_BYTES: usize = 16 << 10;

/// All tunnels of one edge.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tunnels {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Tunnels {
    /// Joins the two sides once both have switched, in a task of its own.
    pub(crate) fn open(&self, client: OnUpgrade, sprite: OnUpgrade, record: Record) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let mut record = record;
            tokio::select! {
                () = run(client, sprite, &mut record) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Cuts all tunnels. Sessions behind them live on; clients attach again.
    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn run(client: OnUpgrade, sprite: OnUpgrade, record: &mut Record) {
    let switched = timeout(SWITCH_DEADLINE, async { tokio::try_join!(client, sprite) }).await;
    let Ok(Ok((client, sprite))) = switched else {
        return;
    };
    let activity = Activity::begin();
    let mut client = Watched::new(TokioIo::new(client), activity.clone(), ());
    let mut sprite = TokioIo::new(sprite);
    let copied = tokio::select! {
        copied = copy_bidirectional_with_sizes(&mut client, &mut sprite, BUFFER_BYTES, BUFFER_BYTES) => copied,
        () = long_silence(&activity) => return,
    };
    match copied {
        Ok((received, sent)) => record.tunnelled(received, sent, true),
        Err(error) => {
            tracing::debug!("a tunnel broke: {error}");
            record.tunnelled(0, 0, false);
            // The side that still listens is told; the other is gone.
            for outcome in [client.shutdown().await, sprite.shutdown().await] {
                if let Err(gone) = outcome {
                    tracing::trace!("closing a broken tunnel: {gone}");
                }
            }
        }
    }
}

async fn long_silence(activity: &Activity) {
    while activity.silent_for() < SILENCE_MAX {
        tokio::time::sleep(SILENCE_CHECK).await;
    }
}

//! What happens on one connection from outside: requests in flight, and when a byte last moved. Shared by the socket, the requests on it and the
//! task that ends it when it is idle.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Duration, Instant},
};

#[derive(Debug)]
pub(crate) struct Activity {
    began_at: Instant,
    /// Milliseconds after `began_at`.
    byte_moved_ms: AtomicU64,
    request_ended_ms: AtomicU64,
    in_flight: AtomicU32,
}

/// One request in flight, until dropped.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Activity>);

impl Activity {
    pub(crate) fn begin() -> Arc<Self> {
        Arc::new(Self {
            began_at: Instant::now(),
            byte_moved_ms: AtomicU64::new(0),
            request_ended_ms: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
        })
    }

    pub(crate) fn request(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) > 0
    }

    /// How long no byte moved, in either direction.
    pub(crate) fn silent_for(&self) -> Duration {
        self.since(&self.byte_moved_ms)
    }

    /// How long there was no request; zero while there is one.
    pub(crate) fn idle_for(&self) -> Duration {
        if self.is_busy() { Duration::ZERO } else { self.since(&self.request_ended_ms) }
    }

    fn since(&self, mark: &AtomicU64) -> Duration {
        self.began_at.elapsed().saturating_sub(Duration::from_millis(mark.load(Ordering::Relaxed)))
    }

    fn set(&self, mark: &AtomicU64) {
        let now_ms = u64::try_from(self.began_at.elapsed().as_millis()).unwrap_or(u64::MAX);
        mark.store(now_ms, Ordering::Relaxed);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.set(&self.0.request_ended_ms);
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that records its bytes, and holds `permit` for as long as it is open, whoever owns it after an upgrade.
pub(crate) struct Watched<S, P> {
    stream: S,
    activity: Arc<Activity>,
    _permit: P,
}

impl<S, P> Watched<S, P> {
    pub(crate) fn new(stream: S, activity: Arc<Activity>, permit: P) -> Self {
        Self { stream, activity, _permit: permit }
    }
}

impl<S: AsyncRead + Unpin, P: Unpin> AsyncRead for Watched<S, P> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = ready!(Pin::new(&mut this.stream).poll_read(context, into));
        this.activity.set(&this.activity.byte_moved_ms);
        Poll::Ready(outcome)
    }
}

impl<S: AsyncWrite + Unpin, P: Unpin> AsyncWrite for Watched<S, P> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = ready!(Pin::new(&mut this.stream).poll_write(context, bytes));
        this.activity.set(&this.activity.byte_moved_ms);
        Poll::Ready(outcome)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = ready!(Pin::new(&mut this.stream).poll_write_vectored(context, slices));
        this.activity.set(&this.activity.byte_moved_ms);
        Poll::Ready(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

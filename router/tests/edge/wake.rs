//! Requests that wait for a sprite, and routes that turn out to be old.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use axum::response::IntoResponse;
use http::StatusCode;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::world::{API, ASLEEP, BEARER, BREAKS_OFF, NOWHERE, PRIVATE, PUBLIC, World, soon};

/// A node that does not have the sprite.
fn not_here() -> impl IntoResponse {
    (StatusCode::NOT_FOUND, [("x-sprite-error", proto::paths::NOT_HERE)], "")
}

#[tokio::test]
async fn the_first_request_is_held_while_the_sprite_wakes() {
    let world = Arc::new(World::start().await);
    let gate = Arc::new(Semaphore::new(0));
    let of_node = Arc::clone(&gate);
    let node = world.node("node.sock", move |_| {
        let gate = Arc::clone(&of_node);
        async move {
            let _permit = gate.acquire().await.unwrap();
            ([("x-sprite-wake", "memory")], "awake")
        }
    });
    let client = Arc::clone(&world);
    let waiting = tokio::spawn(async move { client.get(ASLEEP, "/", &[]).await });
    node.reach(1).await;
    assert!(!waiting.is_finished());
    gate.add_permits(1);
    let reply = soon("the held request", waiting).await.unwrap();
    assert_eq!((reply.status.as_u16(), reply.body.as_str(), reply.header("x-sprite-wake")), (200, "awake", "memory"));
    assert_eq!(node.all().len(), 1, "sent once");
}

#[tokio::test]
async fn a_sprite_without_a_host_is_given_one_however_long_that_takes() {
    let world = Arc::new(World::start().await);
    let node = world.plain_node();
    let taken = Arc::clone(&world).take_wake_gate().await;
    let mut clients = JoinSet::new();
    for _ in 0..5 {
        let world = Arc::clone(&world);
        clients.spawn(async move { world.get(NOWHERE, "/", &[]).await });
    }
    soon("the order to wake it", async {
        while world.coordinator.wakes.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(clients.try_join_next().is_none());
    drop(taken);
    for reply in soon("the held requests", clients.join_all()).await {
        assert_eq!((reply.status.as_u16(), reply.body.as_str()), (200, "ok"));
    }
    assert_eq!(node.all().len(), 5);
    assert_eq!(world.coordinator.wakes.load(SeqCst), 1, "one question for all who wait");
    // The next one knows the way.
    assert_eq!(world.get(NOWHERE, "/", &[]).await.status, 200);
}

#[tokio::test]
async fn a_wake_that_is_refused_says_why() {
    let world = World::start().await;
    for (code, verdict) in [
        (tonic::Code::ResourceExhausted, (503, "SPR-U06")),
        (tonic::Code::FailedPrecondition, (503, "SPR-U06")),
        (tonic::Code::Unavailable, (503, "SPR-U05")),
        (tonic::Code::DeadlineExceeded, (504, "SPR-U03")),
        (tonic::Code::NotFound, (404, "SPR-R01")),
    ] {
        world.set("away-a1b2c3", |sprite| sprite.wakes_at = Err(code));
        let reply = world.get(NOWHERE, "/", &[]).await;
        assert_eq!(reply.verdict(), verdict, "{code:?}");
        if code == tonic::Code::NotFound {
            break;
        }
    }
}

#[tokio::test]
async fn those_who_wait_for_one_sprite_are_counted_and_the_rest_is_unharmed() {
    let world = Arc::new(World::start().await);
    let gate = Arc::new(Semaphore::new(0));
    let of_node = Arc::clone(&gate);
    let node = world.node("node.sock", move |request| {
        let gate = Arc::clone(&of_node);
        async move {
            if request.uri().path() == "/held" {
                gate.acquire().await.unwrap().forget();
            }
            ([("x-sprite-wake", "memory")], "ok")
        }
    });
    let senders = [world.http2(ASLEEP).await, world.http2(ASLEEP).await];
    let mut held = JoinSet::new();
    for n in 0..128 {
        let (world, sender) = (Arc::clone(&world), senders[n % 2].clone());
        held.spawn(async move { world.get2(&sender, ASLEEP, "/held").await });
    }
    node.reach(128).await;
    let refused = world.get(ASLEEP, "/held", &[]).await;
    assert_eq!((refused.verdict(), refused.header("retry-after")), ((503, "SPR-L01"), "1"));
    assert_eq!(world.get(PUBLIC, "/", &[]).await.status, 200, "another sprite");
    gate.add_permits(1);
    node.reach(129).await;
    let first = soon("one of the held", held.join_next()).await.unwrap().unwrap();
    assert_eq!(first.status, 200);
    gate.add_permits(128);
    assert!(soon("all others", held.join_all()).await.iter().all(|reply| reply.status == 200));
    assert_eq!(world.get(ASLEEP, "/", &[]).await.status, 200);
}

#[tokio::test]
async fn a_client_that_goes_away_gives_up_its_place_and_its_request() {
    let world = Arc::new(World::start().await);
    let (began, ended) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (told, cut) = (Arc::clone(&began), Arc::clone(&ended));
    world.node("node.sock", move |_| {
        let (told, cut) = (Arc::clone(&told), GivesPermit(Arc::clone(&cut)));
        async move {
            told.add_permits(1);
            std::future::pending::<()>().await;
            drop(cut);
        }
    });
    for sender_is_http2 in [false, true] {
        let client = Arc::clone(&world);
        let request = tokio::spawn(async move {
            if sender_is_http2 {
                let sender = client.http2(ASLEEP).await;
                client.get2(&sender, ASLEEP, "/").await
            } else {
                client.get(ASLEEP, "/", &[]).await
            }
        });
        soon("the request at the node", began.acquire()).await.unwrap().forget();
        request.abort();
        soon("the end of the request at the node", ended.acquire()).await.unwrap().forget();
    }
}

struct GivesPermit(Arc<Semaphore>);

impl Drop for GivesPermit {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

#[tokio::test]
async fn a_stale_route_costs_one_more_question_and_is_not_seen() {
    let world = World::start().await;
    let old = world.node("node.sock", async |_| not_here());
    world.get(PUBLIC, "/", &[]).await;
    let new = world.node("new.sock", async |_| ([("x-sprite-wake", "none")], "moved"));
    world.set("open-a1b2c3", |sprite| sprite.node = Some("new.sock"));
    let before = old.all().len();
    let reply = world.get(PUBLIC, "/", &[]).await;
    assert_eq!((reply.status.as_u16(), reply.body.as_str()), (200, "moved"));
    assert_eq!(new.all().len(), 1);
    assert!(old.all().len() <= before + 1);
    assert_eq!(world.get(PUBLIC, "/", &[]).await.body, "moved");
    assert!(old.all().len() <= before + 1, "the new route is remembered");
}

#[tokio::test]
async fn a_sprite_that_no_node_admits_to_have_is_moving() {
    let world = World::start().await;
    world.node("node.sock", async |_| not_here());
    let reply = world.get(PUBLIC, "/", &[]).await;
    assert_eq!((reply.verdict(), reply.header("retry-after")), ((503, "SPR-R04"), "1"));
    let exec = world.get(API, "/v1/sprites/demo/exec", &[BEARER]).await;
    assert_eq!(exec.verdict(), (503, "SPR-R04"));
}

#[tokio::test]
async fn a_404_of_the_program_itself_is_passed_on() {
    let world = World::start().await;
    let node = world.node("node.sock", async |_| (StatusCode::NOT_FOUND, [("x-sprite-error", "mine")], "no such page"));
    let reply = world.get(PUBLIC, "/x", &[]).await;
    assert_eq!((reply.status.as_u16(), reply.body.as_str()), (404, "no such page"));
    assert_eq!(node.all().len(), 1);
}

#[tokio::test]
async fn a_node_that_is_gone_or_breaks_off_is_named() {
    let world = World::start().await;
    assert_eq!(world.get(PUBLIC, "/", &[]).await.verdict(), (503, "SPR-U01"));
    let listener = tokio::net::UnixListener::bind(world.path("node.sock")).unwrap();
    tokio::spawn(async move {
        loop {
            // Accepts and says nothing.
            drop(listener.accept().await);
        }
    });
    assert_eq!(world.get(PRIVATE, "/", &[BEARER]).await.verdict(), (502, "SPR-U02"));
}

#[tokio::test]
async fn a_coordinator_that_breaks_off_is_not_taken_for_a_host() {
    let world = World::start().await;
    assert_eq!(world.get(API, BREAKS_OFF, &[BEARER]).await.verdict(), (502, "SPR-U07"));
}

#[tokio::test]
async fn a_node_that_restarts_is_waited_for() {
    let world = Arc::new(World::start().await);
    let client = Arc::clone(&world);
    let reply = tokio::spawn(async move { client.get(PUBLIC, "/", &[]).await });
    soon("the route", async {
        while world.coordinator.resolves.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world.plain_node();
    assert_eq!(soon("the answer", reply).await.unwrap().status, 200);
}

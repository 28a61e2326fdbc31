use proptest::prelude::*;

use super::*;

fn at(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

fn running(now: Instant) -> Vm {
    Vm::new(Settled::Running, IdlePolicy::default(), false, now)
}

#[test]
fn an_unused_sprite_goes_down_step_by_step() {
    let start = Instant::now();
    let mut vm = running(start);
    assert_eq!(vm.step(Event::Tick, at(start, 29)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 30)), Ok(Some(Change::Pause)));
    assert_eq!(vm.step(Event::Settled(Settled::Paused), at(start, 30)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 60)), Ok(Some(Change::Suspend)));
    assert_eq!(vm.step(Event::Settled(Settled::Suspended), at(start, 61)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 660)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 661)), Ok(Some(Change::GoCold)));
    assert_eq!(vm.step(Event::Settled(Settled::Cold), at(start, 662)), Ok(None));
    assert_eq!(vm.step(Event::Used, at(start, 700)), Ok(Some(Change::Boot)));
}

#[test]
fn a_request_holds_it_awake_and_the_clock_starts_when_it_ends() {
    let start = Instant::now();
    let mut vm = running(start);
    vm.step(Event::Used, at(start, 1)).unwrap();
    assert_eq!(vm.step(Event::Tick, at(start, 1000)), Ok(None));
    vm.step(Event::Released, at(start, 1000)).unwrap();
    assert_eq!(vm.step(Event::Tick, at(start, 1029)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 1030)), Ok(Some(Change::Pause)));
}

#[test]
fn a_request_during_the_pause_wakes_it_right_after() {
    let start = Instant::now();
    let mut vm = running(start);
    assert_eq!(vm.step(Event::Tick, at(start, 30)), Ok(Some(Change::Pause)));
    assert_eq!(vm.step(Event::Used, at(start, 30)), Ok(None));
    assert_eq!(vm.step(Event::Settled(Settled::Paused), at(start, 31)), Ok(Some(Change::Unpause)));
}

#[test]
fn an_order_to_sleep_beats_open_connections_until_the_next_request() {
    let start = Instant::now();
    let mut vm = running(start);
    vm.step(Event::Used, at(start, 1)).unwrap();
    assert_eq!(vm.step(Event::SleepOrdered(Depth::Cold), at(start, 2)), Ok(Some(Change::GoCold)));
    assert_eq!(vm.step(Event::Settled(Settled::Cold), at(start, 3)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 4000)), Ok(None));
    assert_eq!(vm.step(Event::Used, at(start, 4001)), Ok(Some(Change::Boot)));
}

#[test]
fn an_order_to_sleep_is_carried_out_before_a_request_that_comes_on_the_way_down() {
    let start = Instant::now();
    for (depth, down, asleep, up) in [
        (Depth::Paused, Change::Pause, Settled::Paused, Change::Unpause),
        (Depth::Suspended, Change::Suspend, Settled::Suspended, Change::Resume),
        (Depth::Cold, Change::GoCold, Settled::Cold, Change::Boot),
    ] {
        let mut vm = running(start);
        assert_eq!(vm.step(Event::SleepOrdered(depth), start), Ok(Some(down)));
        assert_eq!(vm.step(Event::Used, at(start, 1)), Ok(None));
        assert_eq!(vm.step(Event::Settled(asleep), at(start, 2)), Ok(Some(up)), "the request waits");
        assert_eq!(vm.step(Event::Settled(Settled::Running), at(start, 3)), Ok(None), "the order is over");
    }
}

#[test]
fn an_order_to_sleep_that_comes_during_a_wake_holds_and_the_request_is_served_after_it() {
    let start = Instant::now();
    let mut vm = Vm::new(Settled::Suspended, IdlePolicy::default(), false, start);
    assert_eq!(vm.step(Event::Used, start), Ok(Some(Change::Resume)));
    assert_eq!(vm.step(Event::SleepOrdered(Depth::Suspended), start), Ok(None));
    assert_eq!(vm.step(Event::Settled(Settled::Running), at(start, 1)), Ok(Some(Change::Suspend)));
    assert_eq!(vm.step(Event::Settled(Settled::Suspended), at(start, 2)), Ok(Some(Change::Resume)));
    assert_eq!(vm.step(Event::Settled(Settled::Running), at(start, 3)), Ok(None));
}

#[test]
fn the_deepest_of_several_orders_is_carried_out() {
    let start = Instant::now();
    let mut vm = running(start);
    assert_eq!(vm.step(Event::Tick, at(start, 30)), Ok(Some(Change::Pause)));
    vm.step(Event::SleepOrdered(Depth::Cold), at(start, 30)).unwrap();
    vm.step(Event::Used, at(start, 30)).unwrap();
    vm.step(Event::SleepOrdered(Depth::Paused), at(start, 30)).unwrap();
    assert_eq!(vm.step(Event::Settled(Settled::Paused), at(start, 31)), Ok(Some(Change::GoCold)));
    assert_eq!(vm.step(Event::Settled(Settled::Cold), at(start, 32)), Ok(Some(Change::Boot)));
}

#[test]
fn an_order_to_sleep_that_fails_is_over() {
    let start = Instant::now();
    let mut vm = running(start);
    assert_eq!(vm.step(Event::SleepOrdered(Depth::Suspended), start), Ok(Some(Change::Suspend)));
    assert_eq!(vm.step(Event::Settled(Settled::Running), at(start, 1)), Ok(None));
    assert_eq!(vm.step(Event::SleepOrdered(Depth::Cold), at(start, 2)), Ok(Some(Change::GoCold)));
    assert_eq!(vm.step(Event::Settled(Settled::Suspended), at(start, 3)), Ok(None), "the bucket is away");
}

#[test]
fn always_on_never_sleeps_by_itself_and_wakes_by_itself() {
    let start = Instant::now();
    let mut vm = Vm::new(Settled::Cold, IdlePolicy::default(), true, start);
    assert_eq!(vm.step(Event::Tick, start), Ok(Some(Change::Boot)));
    vm.step(Event::Settled(Settled::Running), at(start, 1)).unwrap();
    assert_eq!(vm.step(Event::Tick, at(start, 100_000)), Ok(None));
}

#[test]
fn never_means_never() {
    let start = Instant::now();
    let idle = IdlePolicy { pause_after_ms: None, ..IdlePolicy::default() };
    let mut vm = Vm::new(Settled::Running, idle, false, start);
    assert_eq!(vm.step(Event::Tick, at(start, 1_000_000)), Ok(None));
    assert_eq!(vm.deadline(), None);
}

#[test]
fn a_dead_process_is_booted_by_the_next_request_only() {
    let start = Instant::now();
    let mut vm = running(start);
    vm.step(Event::Used, start).unwrap();
    vm.step(Event::Released, start).unwrap();
    assert_eq!(vm.step(Event::ProcessDied, at(start, 1)), Ok(None));
    assert_eq!(*vm.state(), State::Failed);
    assert_eq!(vm.step(Event::Tick, at(start, 1000)), Ok(None));
    assert_eq!(vm.step(Event::Used, at(start, 1001)), Ok(Some(Change::Boot)));
}

#[test]
fn a_wake_that_finds_no_room_is_over_until_the_next_request() {
    let start = Instant::now();
    let mut vm = Vm::new(Settled::Suspended, IdlePolicy::default(), false, start);
    assert_eq!(vm.step(Event::Used, start), Ok(Some(Change::Resume)));
    assert_eq!(vm.step(Event::Settled(Settled::Suspended), at(start, 1)), Ok(None), "whoever waited was told");
    vm.step(Event::Released, at(start, 1)).unwrap();
    assert_eq!(vm.step(Event::Used, at(start, 2)), Ok(Some(Change::Resume)));
}

#[test]
fn always_on_tries_again_without_spinning() {
    let start = Instant::now();
    let mut vm = Vm::new(Settled::Cold, IdlePolicy::default(), true, start);
    assert_eq!(vm.step(Event::Tick, start), Ok(Some(Change::Boot)));
    assert_eq!(vm.step(Event::Settled(Settled::Cold), at(start, 1)), Ok(None));
    assert_eq!(vm.deadline(), Some(at(start, 11)));
    assert_eq!(vm.step(Event::Tick, at(start, 10)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 11)), Ok(Some(Change::Boot)));
    vm.step(Event::Settled(Settled::Running), at(start, 12)).unwrap();
    assert_eq!(vm.step(Event::ProcessDied, at(start, 13)), Ok(None));
    assert_eq!(vm.step(Event::Tick, at(start, 23)), Ok(Some(Change::Boot)));
}

#[test]
fn sleep_by_order_deepens_with_time_unless_the_policy_is_never() {
    let start = Instant::now();
    let mut vm = running(start);
    assert_eq!(vm.step(Event::SleepOrdered(Depth::Paused), start), Ok(Some(Change::Pause)));
    vm.step(Event::Settled(Settled::Paused), start).unwrap();
    assert_eq!(vm.step(Event::Tick, at(start, 30)), Ok(Some(Change::Suspend)));
    let idle = IdlePolicy { pause_after_ms: None, ..IdlePolicy::default() };
    let mut vm = Vm::new(Settled::Suspended, idle, false, start);
    assert_eq!(vm.deadline(), None);
    assert_eq!(vm.step(Event::Tick, at(start, 1_000_000)), Ok(None));
}

/// A deadline in the past that changes nothing would make the owner task spin.
fn assert_no_spin(vm: &mut Vm, now: Instant) -> Option<Change> {
    let due = vm.deadline().is_some_and(|at| at <= now);
    let change = vm.step(Event::Tick, now).ok().flatten();
    assert!(!due || change.is_some(), "a past deadline without a change: {vm:?}");
    change
}

#[test]
fn only_one_restore_waits() {
    let start = Instant::now();
    let mut vm = running(start);
    let order = |n: &str| Event::RestoreOrdered { checkpoint: n.into() };
    assert_eq!(vm.step(order("v1"), start), Ok(Some(Change::Restore { checkpoint: "v1".into() })));
    assert_eq!(vm.step(order("v2"), start), Ok(None));
    assert_eq!(vm.step(order("v3"), start), Err(Refused::JobPending));
    let second = vm.step(Event::Settled(Settled::Running), start);
    assert_eq!(second, Ok(Some(Change::Restore { checkpoint: "v2".into() })));
}

/// What the owner task could report for a change.
fn outcomes(change: &Change) -> Vec<Settled> {
    match change {
        Change::Pause => vec![Settled::Paused, Settled::Running, Settled::Failed],
        Change::Unpause | Change::Boot | Change::Reboot => vec![Settled::Running, Settled::Cold, Settled::Failed],
        Change::Resume => vec![Settled::Running, Settled::Suspended, Settled::Cold, Settled::Failed],
        Change::Suspend => vec![Settled::Suspended, Settled::Running, Settled::Failed],
        Change::GoCold => vec![Settled::Cold, Settled::Suspended, Settled::Failed],
        Change::Restore { .. } => vec![Settled::Running, Settled::Cold, Settled::Failed],
        Change::Destroy => vec![Settled::Destroyed, Settled::Failed],
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Used),
        4 => Just(Event::Released),
        2 => any::<bool>().prop_map(Event::Busy),
        1 => Just(Event::Active),
        1 => prop_oneof![Just(Depth::Paused), Just(Depth::Suspended), Just(Depth::Cold)].prop_map(Event::SleepOrdered),
        1 => Just(Event::RestoreOrdered { checkpoint: "v1".into() }),
        1 => Just(Event::RebootOrdered),
        1 => Just(Event::ProcessDied),
        1 => Just(Event::DestroyOrdered),
        6 => Just(Event::Tick),
    ]
}

/// A change may only begin in a state it is defined for.
fn allowed_from(change: &Change, from: &State) -> bool {
    match change {
        Change::Pause => *from == State::Running,
        Change::Unpause => *from == State::Paused,
        Change::Suspend => matches!(from, State::Running | State::Paused),
        Change::Resume => *from == State::Suspended,
        Change::Boot => matches!(from, State::Cold | State::Failed),
        Change::GoCold => matches!(from, State::Running | State::Paused | State::Suspended),
        Change::Restore { .. } | Change::Reboot | Change::Destroy => {
            !matches!(from, State::Creating | State::Changing(_) | State::Destroyed)
        }
    }
}

/// What was ordered and not yet done, kept without the machine's own rules.
#[derive(Debug, Default)]
struct OpenOrder(Option<Depth>);

impl OpenOrder {
    fn given(&mut self, depth: Depth, state: &State) {
        if depth_of(state) < Some(depth) {
            self.0 = self.0.max(Some(depth));
        }
    }

    /// A change ended: fulfilled, or failed, or still open.
    fn ended(&mut self, change: &Change, settled: Settled) {
        let failed =
            matches!(change, Change::Pause | Change::Suspend | Change::GoCold) && settled != outcomes(change)[0];
        if failed || depth_of(&settled.into()) >= self.0 {
            self.0 = None;
        }
    }
}

fn depth_of(state: &State) -> Option<Depth> {
    match state {
        State::Paused => Some(Depth::Paused),
        State::Suspended => Some(Depth::Suspended),
        State::Cold | State::Failed | State::Destroyed => Some(Depth::Cold),
        State::Creating | State::Running | State::Changing(_) => None,
    }
}

proptest! {
    /// Random events and outcomes: one change at a time, each from a legal state; destroyed stays destroyed; an order to sleep is carried out before
    /// anything wakes the sprite; a used sprite comes up.
    #[test]
    fn the_machine_keeps_its_promises(
        events in proptest::collection::vec((any_event(), 0u64..120, any::<prop::sample::Index>(), any::<bool>()), 1..200),
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut vm = running(now);
        let mut order = OpenOrder::default();
        let mut under_way: Option<Change> = None;
        for (event, seconds, pick, ends) in events {
            now += Duration::from_secs(seconds);
            let before = vm.state().clone();
            let next = match under_way.take() {
                Some(change) if ends => {
                    let settled = *pick.get(&outcomes(&change));
                    order.ended(&change, settled);
                    let next = vm.step(Event::Settled(settled), now).expect("a change was under way");
                    if let Some(next) = &next {
                        prop_assert!(allowed_from(next, &settled.into()), "{next:?} from {settled:?}");
                    }
                    next
                }
                busy => {
                    let stepped = vm.step(event.clone(), now);
                    match (&stepped, event) {
                        (Ok(_), Event::SleepOrdered(depth)) => order.given(depth, &before),
                        (Ok(_), _) => {}
                        (Err(refused), _) => prop_assert!(matches!(refused, Refused::Destroyed | Refused::JobPending)),
                    }
                    let next = stepped.ok().flatten();
                    prop_assert!(busy.is_none() || next.is_none(), "a second change, {next:?}, beside {busy:?}");
                    if let Some(next) = &next {
                        // The process may have died in the same step.
                        prop_assert!(allowed_from(next, &before) || allowed_from(next, &State::Failed), "{next:?} from {before:?}");
                    }
                    under_way = busy;
                    next
                }
            };
            prop_assert!(before != State::Destroyed || *vm.state() == State::Destroyed);
            if *vm.state() == State::Failed {
                order = OpenOrder::default();
            }
            let begun = next.or_else(|| assert_no_spin(&mut vm, now));
            if let Some(Change::Unpause | Change::Resume | Change::Boot) = begun {
                prop_assert!(order.0.is_none(), "woken against {order:?}: {vm:?}");
            }
            under_way = begun.or(under_way);
        }
        // A new request brings it up within a few successful changes, unless it is to be destroyed.
        let mut change = under_way;
        if let Ok(Some(next)) = vm.step(Event::Used, now) {
            change = Some(next);
        }
        for _ in 0..6 {
            let Some(done) = change.take() else { break };
            change = vm.step(Event::Settled(outcomes(&done)[0]), now).expect("a change was under way");
        }
        prop_assert!(matches!(vm.state(), State::Running | State::Destroyed), "{vm:?}");
    }
}
